"""Forms that users bring, as a source reads them: which clip is meant, what is said of it, and where an error is."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, Features, Value
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.config.data import SourceConfig
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.examples import TaskExample
from qwen2audio_train.data.loading.build import build_batches
from qwen2audio_train.data.manifests.cache import find_manifests
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.order.index import PART_BYTES
from qwen2audio_train.data.storage.remote import Remote
from qwen2audio_train.data.tools.check import CheckOptions, check
from qwen2audio_train.data.tools.convert import ConvertOptions, convert
from tests.data.corpora import small_config, write_corpus
from tests.data.storage.test_blobs import write_tar

ASR = {"task": "asr", "language": "en"}
TEXT = {"target": "text"}
Found = list[tuple[Any, ...] | str]


def write(folder: Path, files: Mapping[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def read(folder: Path, path: str, constants: Mapping[str, str] = ASR, **source: Any) -> Found:
    """(id, path below the folder, start, end, target) of every example of a source; the words of an error."""
    config = SourceConfig([str(folder / path)], constants=dict(constants), **source)
    manifests = find_manifests("s", config, Remote(str(folder.parent / "cache")))
    found: Found = []
    for manifest in manifests:
        for _, item in manifest.lines():
            if isinstance(item, ManifestError):
                found.append(str(item).replace(f"{folder}/", ""))
                continue
            assert isinstance(item, TaskExample)
            clip = item.clip
            found.append((item.id, clip.path.replace(f"{folder}/", ""), clip.start_s, clip.end_s, item.target))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "d").mkdir()
    return tmp_path / "d"


def test_audiofolder_with_a_table(folder: Path) -> None:
    """`metadata` tables beside the audio, one for each split; what a Mac leaves behind is none."""
    lines = ('{"file_name": "a.wav", "text": "one"}\n', '{"file_name": "x/b.wav", "text": "two"}\n')
    write(
        folder,
        {"train/metadata.jsonl": "".join(lines), "test/metadata.jsonl": lines[0], "train/a.wav": "", "test/a.wav": ""},
    )
    write(folder, {"train/._metadata.jsonl": "\0", "train/x/b.wav": "", "README.md": "x", "train/notes.csv": "a,b\n"})
    train = [
        ("metadata.jsonl:1", "train/a.wav", 0.0, None, "one"),
        ("metadata.jsonl:2", "train/x/b.wav", 0.0, None, "two"),
    ]
    assert read(folder, "", split="train", columns=TEXT) == train
    both = [("test/metadata.jsonl:1", "test/a.wav", 0.0, None, "one"), *((f"train/{id}", *rest) for id, *rest in train)]
    assert read(folder, "", columns=TEXT) == both
    write(folder, {"c/metadata.csv": 'file_name,text\n"a, b.wav",one\n'})
    assert read(folder, "c", columns=TEXT) == [("metadata.csv:2", "c/a, b.wav", 0.0, None, "one")]
    with pytest.raises(ConfigError, match=r"no file of the split 'dev' \(3 files; splits there: test, train\)"):
        read(folder, "", split="dev", columns=TEXT)


def test_audiofolder_with_a_folder_for_each_class(folder: Path) -> None:
    names = ("train/dog/1.wav", "train/cat/1.v2.FLAC", "test/dog/2.ogg", "train/dog/._1.wav", "train/dog/notes.txt")
    write(folder, dict.fromkeys(names, ""))
    train = [("train/cat/1.v2.FLAC", "cat"), ("train/dog/1.wav", "dog")]
    expected = [(name, name, 0.0, None, label) for name, label in train]
    assert read(folder, "", {"task": "sec"}, split="training") == expected
    assert read(folder, "", {"task": "sec"}) == [("test/dog/2.ogg", "test/dog/2.ogg", 0.0, None, "dog"), *expected]


def test_nemo_offsets_cut_slices(folder: Path) -> None:
    """Paths relative to the manifest and absolute; an offset without a length goes to the end of the file."""
    rows: list[dict[str, Any]] = [
        {"audio_filepath": "x/a.wav", "offset": 0.5, "duration": 1.25, "text": "one"},
        {"audio_filepath": str(folder / "x/a.wav"), "offset": 0, "duration": 1.0, "text": "two"},
        {"audio_filepath": "x/a.wav", "duration": 3.0, "text": "three", "offset": None},
        {"audio_filepath": "x/a.wav", "offset": 2.0, "text": "four"},
        {"audio_filepath": "x/a.wav", "offset": "0.5", "duration": 1, "text": "five"},
        {"audio_filepath": "x/a.wav", "offset": -1, "duration": 1, "text": "six"},
        {"audio_filepath": "x/a.wav", "offset": 2.5, "duration": 1.5, "text": "beyond the end"},
    ]
    write(folder, {"n.json": "".join(json.dumps(row) + "\n" for row in rows)})
    write_corpus(folder, "y", [3.0])
    os.renames(folder / "y" / "0.wav", folder / "x" / "a.wav")
    *good, negative, beyond = read(folder, "n.json")
    bounds = [(0.5, 1.75, "one"), (0.0, 1.0, "two"), (0.0, None, "three"), (2.0, None, "four"), (0.5, 1.5, "five")]
    assert good == [(f"n.json:{n}", "x/a.wav", *told) for n, told in enumerate(bounds, 1)]
    assert 'n.json:6: field "audio.start_s": expected a number of seconds, at least 0' in negative
    assert beyond[2:] == (2.5, 4.0, "beyond the end")
    output = folder / "out" / "m.jsonl"
    done = convert(ConvertOptions(str(folder / "n.json"), str(output), constants=ASR, skip_bad=True, num_workers=1))
    assert done.written == 5
    assert "is 3.000 s long: no slice from 2.5 s to 4 s" in done.errors[1]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["duration_s"] for line in lines] == [1.25, 1.0, 3.0, 1.0, 1.0]
    (checked,) = check(CheckOptions([str(output)], num_workers=1))
    assert checked.num_errors == 0


def test_lines_keep_their_numbers_over_files_pieces_and_gzip(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A broken line is named by its own number wherever it is told: by a check, by the index, and in training."""
    write_corpus(folder, "a", [0.2])
    line = json.loads((folder / "a.jsonl").read_text())
    long = "x" * 100_000  # so that a few lines reach over the border of a part of the index

    def lines(name: str, number: int) -> list[str]:
        return [json.dumps(line | {"id": f"{name}{n}", "meta": {"note": long}}) for n in range(number)]

    many = 2 * PART_BYTES // 100_000
    first, second = (
        ["", *lines("a", many), "{", *lines("b", many), '{"id": 1}'],
        [*lines("c", 2), "", "{", *lines("d", 1)],
    )
    write(folder, {"1.jsonl": "\n".join(first)})
    second_text = "\n".join(["\ufeff" + second[0], *second[1:]]) + "\n"
    write(folder, {"2.jsonl.gz": gzip.compress(second_text.encode())})
    places = [f"1.jsonl:{many + 2}", f"1.jsonl:{2 * many + 3}", "2.jsonl.gz:4"]
    checked = check(CheckOptions([str(folder / "*.jsonl*")], decode=False, cache_dir=str(folder / "cache")))
    bad = [f for one in checked for f in one.findings if f.kind == "bad line" and "a.jsonl" not in f.file]
    assert [f"{Path(f.file).name}:{f.line}" for f in bad] == places
    source = SourceConfig([str(folder / "[12].jsonl*")])
    listed = folder / "bad.jsonl"
    build_batches(small_config(folder, {"s": source}, max_bad_share=1.0), tokenizer, epochs=1, bad_examples_path=listed)
    entries = [json.loads(entry) for entry in listed.read_text().splitlines()]
    assert [Path(entry["example"]).name for entry in entries] == places
    assert [str(entry["line"]) for entry in entries] == [place.rpartition(":")[2] for place in places]
    assert all(entry["reason"].startswith(f"{entry['example']}: ") for entry in entries)


def test_rows_keep_their_numbers_where_lines_are_blank(folder: Path) -> None:
    write(folder, {"wav.scp": "\ufeffu1 1.wav\n\nu2 2.wav\n", "text": "\ufeffu1 one\n\nu2 two\nu3 three\n"})
    one, two, three = read(folder, "")
    assert (one, two) == (("u1", "1.wav", 0.0, None, "one"), ("u2", "2.wav", 0.0, None, "two"))
    assert three.startswith('text:4: field "audio": expected a plain file for "u3"')
    write(folder, {"t.csv": "file,text\n1.wav,one\n\n2.wav\n3.wav,three\n"})
    one, two, three = read(folder, "t.csv", columns={"audio": "file", **TEXT})
    assert (one[0], three[0], two) == ("t.csv:2", "t.csv:5", "t.csv:4: expected 2 cells, found 1")


INVISIBLE = {
    "zero width": "\u200b",
    "byte order mark": "\ufeff",
    "no-break space": "\u00a0",
    "control": "\x07",
    "marks of direction": "\u200e\u200f\u202e\u202c",
    "word joiner": "\u2060",
    "soft hyphen": "\u00ad",
    "selector": "\ufe0f",
    "tag": "\U000e0041",
    "ideographic space": "\u3000",
    "fillers": "\u3164\u2800\u115f",
    "several": " \u200b\u00a0\ufeff\t",
}
VISIBLE = ["\u200bhi", "\ufeffhi", "\u202bسلام\u202c", "👩\u200d👧", "ก็", "नमस्ते", "你好", "?", "a\u00a0b", "e\u0301"]


def test_an_answer_that_cannot_be_seen_is_none(folder: Path) -> None:
    """In every form, and what can be seen beside it stays as it is."""
    texts = [*INVISIBLE.values(), *VISIBLE]
    rows = [{"id": str(n), "audio": "a.wav", "target": text} for n, text in enumerate(texts)]
    write(folder, {"j.jsonl": "".join(json.dumps(row | {"task": "asr"}) + "\n" for row in rows)})
    write(folder, {"c.csv": "id,audio,text\n" + "".join(f"{n},a.wav,{text}\n" for n, text in enumerate(texts))})
    write(
        folder,
        {"t.tsv": "id\taudio\ttext\n" + "".join(f"{n}\ta.wav\t{x}\n" for n, x in enumerate(texts) if "\t" not in x)},
    )
    write_tar(
        folder / "w.tar", {f"{n}.{kind}": text.encode() for n, text in enumerate(texts) for kind in ("wav", "txt")}
    )
    columns = {"id": "id", "audio": "audio", **TEXT}
    for name, source in {
        "j.jsonl": {"constants": {}},
        "c.csv": {"columns": columns},
        "t.tsv": {"columns": columns},
        "w.tar": {},
    }.items():
        found = read(folder, name, **source)  # type: ignore[arg-type]
        refused = [item for item in found if isinstance(item, str)]
        assert len(refused) == len(INVISIBLE) - (name == "t.tsv"), name
        assert all('"target": expected' in words for words in refused), name
        seen = [item[-1] for item in found if not isinstance(item, str)]
        assert seen == [text.removeprefix("\ufeff") if name == "w.tar" else text for text in VISIBLE], name


def test_the_same_id_in_two_files_is_told(folder: Path) -> None:
    write_corpus(folder, "a", [0.2])
    wav = (folder / "a" / "0.wav").read_bytes()
    for shard in (0, 1):
        write_tar(folder / f"s{shard}.tar", {"0.wav": wav, "0.txt": b"hello"})
        write(folder, {f"p{shard}.csv": f"id,file,text\nx,a/0.wav,hello\ny{shard},a/0.wav,hi\n"})
    options = ConvertOptions(str(folder / "s{0,1}.tar"), str(folder / "o.jsonl"), constants=ASR, num_workers=1)
    (error,) = convert(options).errors
    assert 's1.tar:1: field "id": expected an id of its own, found "0", as in line 1 of' in error
    assert "columns.id=__path__" in error
    options.columns = {"id": "__path__"}
    assert convert(options).written == 2
    columns = {"id": "id", "audio": "file", **TEXT}
    (error,) = convert(
        ConvertOptions(str(folder / "p{0,1}.csv"), str(folder / "o.jsonl"), columns, ASR, num_workers=1)
    ).errors
    assert 'p1.csv:2: field "id": expected an id of its own, found "x", as in line 2 of' in error
    assert "__path__" not in error
    sources = {"w": SourceConfig([str(folder / "s{0,1}.tar")], constants=ASR)}
    (checked,) = check(CheckOptions([], sources, decode=False, cache_dir=str(folder / "cache")))
    assert [(f.severity, f.kind, Path(f.file).name, f.line) for f in checked.findings] == [
        ("error", "duplicate id", "s1.tar", 1)
    ]


def test_tars_of_a_mac_dots_in_names_and_compressed_ones(folder: Path) -> None:
    write_tar(
        folder / "mac.tar",
        {
            "._a.wav": b"x",
            "a.wav": b"WAV",
            "a.txt": b"hello",
            ".DS_Store": b"x",
            "__MACOSX/._a.txt": b"x",
            "b/._c.txt": b"x",
        },
    )
    ((id, path, *_, target),) = read(folder, "mac.tar")
    assert (id, path.rpartition("::")[2], target) == ("a", "a.wav", "hello")
    write_tar(
        folder / "dots.tar",
        {"x/v1.0/a.wav": b"WAV", "x/v1.0/a.txt": b"one", "v1.0.a.wav": b"WAV", "v1.0.a.txt": b"two"},
    )
    good, bad = read(folder, "dots.tar")
    assert (good[0], good[-1]) == ("x/v1.0/a", "one")
    assert 'a key has no dot (WebDataset\'s rule), found "v1.0.a.txt"' in bad
    packed = gzip.compress((folder / "mac.tar").read_bytes(), 0)
    for name in ("m.tar.gz", "m.tgz"):
        write(folder, {name: packed})
        with pytest.raises(ConfigError, match=rf"{name} is compressed as a whole; unpack it to a plain \.tar"):
            read(folder, name)
    write(folder, {"false.tar": packed})
    assert "a damaged or compressed one; only plain .tar is read" in read(folder, "false.tar")[0]


def test_paths_in_parquet_are_relative_to_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not to the copy in the cache; a cell without bytes and path, and a stream of the same rows, alike."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "hf"))
    write_corpus(folder, "a", [0.2])
    absolute = str(folder / "a" / "0.wav")
    cells = [{"bytes": None, "path": path} for path in ("a/0.wav", absolute, "a/gone.wav", None)]
    features = Features({"audio": Audio(decode=False), "text": Value("string")})
    table = pa.Table.from_pydict({"audio": cells, "text": list("wxyz")}, schema=features.arrow_schema)
    pq.write_table(table, folder / "p.parquet")
    one, two, gone, _ = read(folder, "p.parquet")
    assert [item[:2] for item in (one, two, gone)] == [("p/0", "a/0.wav"), ("p/1", "a/0.wav"), ("p/2", "a/gone.wav")]
    output = str(folder / "o" / "m.jsonl")
    done = convert(ConvertOptions(str(folder / "p.parquet"), output, constants=ASR, skip_bad=True, num_workers=1))
    assert [json.loads(line)["audio"] for line in Path(output).read_text().splitlines()] == ["../a/0.wav"] * 2
    assert ["no such file" in done.errors[0], "holds no audio" in done.errors[1]] == [True, True]
    pq.write_table(pa.table({"audio": ["a/0.wav"], "text": ["w"]}), folder / "t.parquet")
    assert read(folder, "t.parquet") == [("t/0", "a/0.wav", 0.0, None, "w")]
    write(folder, {"cut.parquet": (folder / "p.parquet").read_bytes()[:200]})
    with pytest.raises(ConfigError, match=r"cut\.parquet: cannot be loaded"):
        read(folder, "cut.parquet")


def test_two_columns_of_one_name(folder: Path) -> None:
    write(folder, {"t.csv": "file,text,text\na.wav,one,two\n", "u.csv": "file,text,,\na.wav,one,,\n"})
    assert read(folder, "t.csv", columns={"audio": "file", **TEXT}) == [
        't.csv:1: field "text": expected column names of their own, found 2 alike'
    ]
    assert read(folder, "u.csv", columns={"audio": "file", **TEXT})[0][-1] == "one"  # type: ignore[index]


def test_lines_that_a_mac_ended(folder: Path) -> None:
    write(folder, {"t.csv": 'file,text\ra.wav,one\r"b.wav","t\u2028wo"\r'})
    found = read(folder, "t.csv", columns={"audio": "file", **TEXT})
    assert [(item[0], item[-1]) for item in found] == [("t.csv:2", "one"), ("t.csv:3", "t\u2028wo")]
