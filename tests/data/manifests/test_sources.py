"""One corpus in every form that a reader knows: what comes out is what the plain manifest gives."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Audio, ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.config.data import DataConfig, SourceConfig, SourceFormat
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.loading.build import build_batches
from qwen2audio_train.data.manifests.cache import ERROR_KEY, find_manifests, good_examples
from qwen2audio_train.data.manifests.corpus import open_corpus
from qwen2audio_train.data.manifests.json_object import ManifestError
from qwen2audio_train.data.storage.paths import expand_braces, expand_paths
from qwen2audio_train.data.storage.remote import Remote
from tests.data.corpora import fingerprint, small_config, write_corpus

Tok = PreTrainedTokenizerFast
SECONDS = [0.1, 0.25, 0.4, 0.3, 0.55, 0.2]
CONSTANTS = {"task": "asr", "language": "en"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus `a` with its plain manifest."""
    folder = tmp_path_factory.mktemp("forms")
    write_corpus(folder, "a", SECONDS)
    return folder


def clips(folder: Path) -> list[Path]:
    return [folder / "a" / f"{i}.wav" for i in range(len(SECONDS))]


def kaldi(folder: Path) -> SourceConfig:
    place = folder / "kaldi"
    place.mkdir()
    (place / "wav.scp").write_text("".join(f"r{i} ../a/{i}.wav\n" for i in range(len(SECONDS))))
    (place / "text").write_text("".join(f"u{i} hello {i}\n" for i in range(len(SECONDS))))
    (place / "segments").write_text("".join(f"u{i} r{i} 0.0 {s}\n" for i, s in enumerate(SECONDS)))
    return SourceConfig([str(place)], constants=CONSTANTS)


def lhotse(folder: Path, name: str = "cuts.jsonl") -> SourceConfig:
    lines = []
    for i, seconds in enumerate(SECONDS):
        source = {"type": "file", "channels": [0], "source": f"a/{i}.wav"}
        size = round(seconds * 16_000)
        recording = {
            "id": f"r{i}",
            "sources": [source],
            "sampling_rate": 16_000,
            "num_samples": size,
            "duration": seconds,
        }
        spoken = {"id": f"s{i}", "recording_id": f"r{i}", "start": 0.0, "duration": seconds, "text": f"hello {i}"}
        cut = {
            "id": f"c{i}",
            "start": 0.0,
            "duration": seconds,
            "channel": 0,
            "supervisions": [spoken | {"language": "English"}],
        }
        lines.append(json.dumps(cut | {"recording": recording, "type": "MonoCut"}) + "\n")
    data = "".join(lines).encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return SourceConfig([str(folder / name)], constants=CONSTANTS)


def webdataset(folder: Path) -> SourceConfig:
    (folder / "wds").mkdir()
    for shard in range(2):
        with tarfile.open(folder / "wds" / f"s-{shard:02d}.tar", "w") as archive:
            for i in range(3 * shard, 3 * shard + 3):
                add(archive, f"x/{i}.wav", clips(folder)[i].read_bytes())
                add(archive, f"x/{i}.json", json.dumps({"text": f"hello {i}", "length": SECONDS[i]}).encode())
    columns = {"target": "json.text", "duration_s": "json.length"}
    return SourceConfig([str(folder / "wds" / "s-{00..01}.tar")], columns=columns, constants=CONSTANTS)


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def as_dataset(folder: Path) -> Dataset:
    rows = {
        "id": [f"h{i}" for i in range(len(SECONDS))],
        "audio": [{"bytes": path.read_bytes(), "path": None} for path in clips(folder)],
        "sentence": [f"hello {i}" for i in range(len(SECONDS))],
    }
    features = Features({"id": Value("string"), "audio": Audio(decode=False), "sentence": Value("string")})
    return Dataset(pa.Table.from_pydict(rows, schema=features.arrow_schema))  # from_dict would want torchcodec


COLUMNS = {"id": "id", "target": "sentence"}


def on_disk(folder: Path) -> SourceConfig:
    DatasetDict({"train": as_dataset(folder)}).save_to_disk(folder / "hf", num_shards={"train": 2})
    return SourceConfig([str(folder / "hf")], split="train", columns=COLUMNS, constants=CONSTANTS)


def parquet(folder: Path, name: str = "pq") -> SourceConfig:
    (folder / name).mkdir()
    as_dataset(folder).to_parquet(folder / name / "train-00000-of-00001.parquet")
    return SourceConfig([str(folder / name)], split="train", columns=COLUMNS, constants=CONSTANTS)


def parquet_files(folder: Path) -> SourceConfig:
    parquet(folder, "files")
    return SourceConfig([str(folder / "files" / "*.parquet")], columns=COLUMNS, constants=CONSTANTS)


def gzipped(folder: Path) -> SourceConfig:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    return SourceConfig([str(folder / "a.jsonl.gz")])


def tar_members(folder: Path) -> SourceConfig:
    """Our own manifest, with members of a tar by their names."""
    with tarfile.open(folder / "m.tar", "w") as archive:
        for i, path in enumerate(clips(folder)):
            add(archive, f"y/{i}.wav", path.read_bytes())
    lines = (folder / "a.jsonl").read_text().splitlines()
    (folder / "m.jsonl").write_text(
        "\n".join(line.replace('"a/', '"m.tar::y/', 2).replace('"id": "m.tar::y/', '"id": "a/') for line in lines)
        + "\n"
    )
    return SourceConfig([str(folder / "m.jsonl")])


FORMS: dict[str, Callable[[Path], SourceConfig]] = {
    "kaldi": kaldi,
    "lhotse": lhotse,
    "lhotse, gzipped": lambda folder: lhotse(folder, "cuts.jsonl.gz"),
    "webdataset": webdataset,
    "Hugging Face on disk": on_disk,
    "Hugging Face Parquet": parquet,
    "Parquet files": parquet_files,
    "gzipped": gzipped,
    "members of a tar": tar_members,
}


def batches(config: DataConfig, tokenizer: Tok) -> list[tuple[bytes, ...]]:
    """An epoch with one example per batch, in no order."""
    one = dataclasses.replace(config, samples_per_pack=1, packs_per_step=1, max_bad_examples=0)
    return sorted(fingerprint(batch) for batch in build_batches(one, tokenizer, epochs=1))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_samples(
    folder: Path, tokenizer: Tok, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "hf_cache"))
    # one prompt for all, as it is chosen by the id, and ids differ between the forms
    one_prompt = pools()
    monkeypatch.setattr("qwen2audio_train.data.prompts.pools._pools", lambda: one_prompt)
    expected = batches(small_config(folder, {"s": SourceConfig([str(folder / "a.jsonl")])}), tokenizer)
    found = batches(small_config(folder, {"s": FORMS[form](folder)}), tokenizer)
    assert len(expected) == len(SECONDS)
    assert found == expected


def pools() -> dict[str, Any]:
    from qwen2audio_train.data.prompts.pools import _pools

    return {name: dataclasses.replace(pool, prompts=pool.prompts[:1]) for name, pool in _pools().items()}


def manifests(source: SourceConfig, cache: Path) -> list[dict[str, Any]]:
    """The lines as they are written down; a row that could not be read is the words of its error."""
    files = find_manifests("s", source, Remote(str(cache)))
    rows = [json.loads(line) for file in files for line in Path(file.path).read_text().splitlines()]
    return [{ERROR_KEY: str(ManifestError(*row[ERROR_KEY]))} if ERROR_KEY in row else row for row in rows]


def test_written_manifests_say_where_the_audio_is(folder: Path, tmp_path: Path) -> None:
    """Slices, placed members and cells; the second time nothing is written."""
    (folder / "again").mkdir()
    write_corpus(folder / "again", "a", SECONDS)
    first = manifests(webdataset(folder / "again"), tmp_path)
    assert [record["id"] for record in first] == [f"x/{i}" for i in range(6)]
    assert first[0]["audio"] == "s-00.tar::512+3244::x/0.wav"
    assert first[0]["source"] == "s"
    (file, *_) = find_manifests("s", SourceConfig([str(folder / "again" / "wds" / "s-00.tar")]), Remote(str(tmp_path)))
    assert file.place == str(folder / "again" / "wds" / "s-00.tar")
    written = os.stat(file.path).st_mtime_ns
    find_manifests("s", SourceConfig([str(folder / "again" / "wds" / "s-00.tar")]), Remote(str(tmp_path)))
    assert os.stat(file.path).st_mtime_ns == written


def test_kaldi_without_segments_and_with_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "wav.scp").write_text("u1 /data/1.wav\nu2 sox 2.sph -t wav - |\n")
    (tmp_path / "text").write_text("u1 one\nu2 two\nu3 three\n")
    (tmp_path / "utt2dur").write_text("u1 1.5\n")
    one, two, three = manifests(SourceConfig([str(tmp_path)]), tmp_path / "cache")
    assert (one["audio"], one["duration_s"], one["target"]) == ("/data/1.wav", 1.5, "one")
    assert "sox 2.sph" in two["__error__"]
    assert 'a plain file for "u3" in wav.scp' in three["__error__"]
    (tmp_path / "segments").write_text("u1 u1 0.5 -1\nu4 u1 0 1\n")
    one, *_, four = manifests(SourceConfig([str(tmp_path)]), tmp_path / "cache")
    assert one["audio"] == {"path": "/data/1.wav", "start_s": 0.5}
    assert 'a line for "u4", which stands in segments' in four["__error__"]


def test_lhotse_tells_channels_and_what_it_would_change(folder: Path, tmp_path: Path) -> None:
    """A cut of the second channel is that channel; audio that lhotse would have to make is refused."""
    lines = [json.loads(line) for line in Path(lhotse(folder, "channels.jsonl").path[0]).read_text().splitlines()[:4]]
    second, sped, several, resampled = lines
    for cut in lines:
        cut["recording"]["sources"][0]["channels"] = [0, 1]
    second["channel"] = 1
    sped["recording"]["transforms"] = [{"name": "Speed", "kwargs": {"factor": 1.1}}]
    several["channel"] = [0, 1]
    resampled["recording"]["transforms"] = [{"name": "Resample", "kwargs": {}}]
    (tmp_path / "cuts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    one, two, three, four = manifests(SourceConfig([str(tmp_path / "cuts.jsonl")], constants=CONSTANTS), tmp_path)
    assert (one["audio"]["channel"], four["audio"]["channel"]) == (1, 0)
    assert "recording.transforms" in two["__error__"]
    assert "Speed" in two["__error__"]
    assert "a MonoCut of one recording" in three["__error__"]


def test_class_labels_are_told_by_their_names(folder: Path, tmp_path: Path) -> None:
    rows = {"audio": [{"bytes": path.read_bytes(), "path": None} for path in clips(folder)[:3]], "mood": [1, 0, -1]}
    features = Features({"audio": Audio(decode=False), "mood": ClassLabel(names=["calm", "glad"])})
    Dataset(pa.Table.from_pydict(rows, schema=features.arrow_schema)).to_parquet(tmp_path / "train.parquet")
    Dataset(pa.Table.from_pydict(rows, schema=features.arrow_schema)).save_to_disk(tmp_path / "disk")
    source = SourceConfig([str(tmp_path / "disk")], columns={"target": "mood"}, constants={"task": "ser"})
    one, two, three = manifests(source, tmp_path)
    assert (one["target"], two["target"], "target" in three) == ("glad", "calm", False)
    stream = open_corpus("s", dataclasses.replace(source, path=[f"{tmp_path}/*.parquet"], streaming=True), Remote())
    rows_read = [row for _, row, _ in stream.rows_with_bytes(0)]
    assert [row["mood"] for row in rows_read if isinstance(row, dict)] == ["glad", "calm", None]
    with pytest.raises(ConfigError, match="2 data sets in one stream"):
        open_corpus("s", dataclasses.replace(source, path=["a", "b"], split="train", streaming=True), Remote())


def test_rows_that_are_no_examples_are_counted(folder: Path, tmp_path: Path, tokenizer: Tok) -> None:
    """A cut without audio, a member that is no JSON, a tar that breaks off: each is told with its place."""
    source = lhotse(folder, "broken.jsonl")
    path = Path(source.path[0])
    lines = path.read_text().splitlines()
    lines[1] = json.dumps({"id": "mixed", "type": "MixedCut", "tracks": []})
    path.write_text("\n".join(lines))
    config = small_config(tmp_path, {"s": dataclasses.replace(source, format=SourceFormat.lhotse)}, max_bad_share=1.0)
    listed = tmp_path / "bad.jsonl"
    loader = build_batches(config, tokenizer, epochs=1, bad_examples_path=listed)
    list(loader)
    (entry,) = [json.loads(line) for line in listed.read_text().splitlines()]
    assert entry["example"] == f"{path}:2"
    assert "MixedCut" in entry["reason"]
    assert loader.planner.mixture.sources[0].size == 5


def test_an_unknown_column_is_named_with_the_nearest(folder: Path, tmp_path: Path) -> None:
    source = SourceConfig([str(folder / "a.jsonl")], columns={"target": "targget"})
    with pytest.raises(
        ConfigError,
        match=r"data\.sources\.s\.columns\.target: no row of .* has a column \"targget\"; did you mean 'target'",
    ):
        find_manifests("s", source, Remote(str(tmp_path)))


def test_our_manifest_with_other_column_names(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        json.dumps({"utt": "u", "wav": "u.wav", "labels": {"text": "hi"}, "lang": "en"}) + "\n"
    )
    columns = {"id": "utt", "audio": "wav", "target": "labels.text", "language": "lang"}
    source = SourceConfig([str(tmp_path / "x.jsonl")], columns=columns, constants={"task": "asr"})
    (example,) = good_examples(find_manifests("s", source, Remote(str(tmp_path))))
    assert (example.id, example.target, example.clip.path) == ("u", "hi", str(tmp_path / "u.wav"))  # type: ignore[union-attr]


def test_looks_tell_the_form_or_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "what").mkdir()
    with pytest.raises(
        ConfigError, match=r"data\.sources\.s\.format: .*set format to one of auto, manifest, webdataset"
    ):
        find_manifests("s", SourceConfig([str(tmp_path / "what")]), Remote(str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"data\.sources\.s\.path: no file"):
        find_manifests("s", SourceConfig([str(tmp_path / "none.jsonl")]), Remote(str(tmp_path)))


def test_braces_and_globs(tmp_path: Path) -> None:
    assert expand_braces("a-{08..11}.{x,y}") == [f"a-{n}.{e}" for n in ("08", "09", "10", "11") for e in "xy"]
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / name).touch()
    assert expand_paths([f"{tmp_path}/*.tar"], "x") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    assert expand_paths(["https://h/{1..2}.tar"], "x") == ["https://h/1.tar", "https://h/2.tar"]
