"""Tables become manifests that can be read, or say which row and which column is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qwen2audio_train.data.tools.convert as convert_module
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.manifests.columns import map_row
from qwen2audio_train.data.manifests.manifest import read_manifest
from qwen2audio_train.data.manifests.tables import read_table
from qwen2audio_train.data.tools.convert import ConvertOptions, convert

Tone = Callable[..., Path]
COLUMNS = {"id": "id", "audio": "path", "target": "text", "language": "lang"}


@pytest.fixture
def options(tmp_path: Path) -> ConvertOptions:
    return ConvertOptions(
        input=str(tmp_path / "table.csv"),
        output=str(tmp_path / "out" / "speech.jsonl"),
        columns=dict(COLUMNS),
        constants={"task": "asr"},
    )


def test_csv(options: ConvertOptions, write_tone: Tone) -> None:
    path = write_tone("a.wav", seconds=1.25)
    Path(options.input).write_text('id,path,text,lang,split\nu1,a.wav,"one, two",en,train\nu2,b.wav,x,en,dev\n')
    options.where = {"split": "train"}
    assert convert(options).written == 1
    [example] = read_manifest(options.output)
    assert example.clip.path == str(path)  # type: ignore[union-attr]
    assert example.clip.duration_s == 1.25  # type: ignore[union-attr]
    assert (example.id, example.target, example.language, example.source) == ("u1", "one, two", "en", "speech")  # type: ignore[union-attr]
    assert '"audio": "../a.wav", "duration_s": 1.25' in Path(options.output).read_text()


def test_jsonl_with_objects_slices_and_a_folder_of_its_own(
    options: ConvertOptions, write_tone: Tone, write_manifest: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_tone("a.wav", seconds=3.0)
    row = {
        "id": "u1",
        "path": "a.wav",
        "text": None,
        "labels": {"emotion": "calm"},
        "from": 1.0,
        "to": 2.5,
        "lang": None,
    }
    table = tmp_path / "tables" / "t.jsonl"
    table.parent.mkdir()
    write_manifest([row]).rename(table)
    options.input, options.audio_dir = str(table), str(tmp_path)
    options.constants = {"task": "ser", "source": "mine"}
    options.columns |= {"target": "labels.emotion", "start_s": "from", "end_s": "to"}
    assert convert(options).errors == []
    [example] = read_manifest(options.output)
    assert (example.target, example.language, example.source) == ("calm", None, "mine")  # type: ignore[union-attr]
    clip = example.clip  # type: ignore[union-attr]
    assert (clip.path, clip.start_s, clip.end_s, clip.duration_s) == (str(path), 1.0, 2.5, 1.5)


def test_bad_rows_stop_it_or_are_left_out(options: ConvertOptions, write_tone: Tone) -> None:
    write_tone("a.wav")
    rows = ["u1,a.wav,x,en", "u1,a.wav,x,en", "u2,none.wav,x,en", "u3,a.wav,,en", "u4,a.wav,x", "u5,a.wav,x,en"]
    Path(options.input).write_text("\n".join(["id,path,text,lang", *rows]))
    result = convert(options)
    assert result.written == 0
    assert not Path(options.output).exists()
    first, second, third, fourth = map(str, result.errors)
    assert 'table.csv:3: field "id": expected an id of its own, found "u1", as in line 2' in first
    assert "none.wav: no such file" in second
    assert 'table.csv:5: field "target": expected non-empty text, found no such key' in third
    assert "table.csv:6: expected 4 cells, found 3" in fourth
    options.skip_bad = True
    assert convert(options).written == 2
    assert [example.id for example in read_manifest(options.output)] == ["u1", "u5"]


def test_a_conversion_that_was_broken_off_goes_on(
    options: ConvertOptions, write_tone: Tone, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tone("a.wav")
    rows = [f"{number},a.wav,{number}.5,en" for number in range(600)]
    Path(options.input).write_text("\n".join(["id,path,text,lang", *rows]))
    options.num_workers = 2
    assert convert(options).written == 600
    whole = Path(options.output).read_text()
    worked: list[int] = []
    plain = convert_module._outcomes

    def until_the_second(corpus: Any, options: ConvertOptions, rows: Any) -> str:
        if worked:
            raise KeyboardInterrupt
        worked.append(len(rows))
        return plain(corpus, options, rows)

    options.num_workers = 1
    Path(options.output).unlink()
    monkeypatch.setattr(convert_module, "_outcomes", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        convert(options)
    monkeypatch.setattr(
        convert_module, "_outcomes", lambda c, o, rows: (worked.append(len(rows)), plain(c, o, rows))[1]
    )
    assert convert(options).written == 600
    assert sum(worked) == 600
    assert Path(options.output).read_text() == whole
    assert [path.name for path in Path(options.output).parent.iterdir()] == ["speech.jsonl"]


def test_misspelt_columns(options: ConvertOptions) -> None:
    Path(options.input).write_text("id,path,text,lang\nu1,a.wav,x,en\n")
    options.columns["language"] = "langs"
    with pytest.raises(ConfigError, match=r"columns\.language: no row of .* \"langs\"; did you mean 'lang'\?"):
        convert(options)
    options.columns["language"], options.where = "lang", {"q": "1"}
    with pytest.raises(ConfigError, match=r"where\.q: no row of .* \"q\"; there are: 'id', 'lang', 'path', 'text'"):
        convert(options)


def test_whole_chats_pass_through(
    options: ConvertOptions, write_tone: Tone, write_manifest: Callable[[list[Any]], Path]
) -> None:
    write_tone("a.wav")
    turns = [
        {"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]},
        {"role": "assistant", "content": "Hi."},
    ]
    options.input = str(write_manifest([{"key": "c1", "conversation": turns}]))
    options.columns, options.constants = {"id": "key", "messages": "conversation"}, {}
    assert convert(options).written == 1
    [example] = read_manifest(options.output)
    assert [message.role for message in example.messages] == ["user", "assistant"]  # type: ignore[union-attr]


def test_rows_and_mapping(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("\ufeffid\tname\n1\tx y\n\n", encoding="utf-8")
    assert list(read_table(str(path))) == [(2, {"id": "1", "name": "x y"})]
    row = {"a.b": 1, "a": {"b": 2, "c": 3}, "d": "1.5", "e": ""}
    assert map_row(row, {"x": "a.b", "y": "a.c", "duration_s": "d", "z": "e"}, {"z": "constant"}) == {
        "x": 1,
        "y": 3,
        "duration_s": 1.5,
        "z": "constant",
    }


def test_numbers_become_text_where_text_is_wanted() -> None:
    """Hub data sets number their rows, and their labels may be numbers."""
    row = {"key": 17, "year": 1987, "c": "1"}
    record = map_row(row, {"id": "key", "target": "year", "channel": "c", "audio": "c"}, {})
    assert record == {"id": "17", "target": "1987", "audio": {"path": "1", "channel": 1}}


def test_a_kaldi_folder_becomes_a_manifest(tmp_path: Path, write_tone: Tone) -> None:
    write_tone("a.wav", 2.0)
    folder = tmp_path / "kaldi"
    folder.mkdir()
    (folder / "wav.scp").write_text("r ../a.wav\n")
    (folder / "text").write_text("u1 hello\nu2 world\n")
    (folder / "segments").write_text("u1 r 0.5 1.0\nu2 r 1.0 2.0\n")
    output = tmp_path / "out" / "m.jsonl"
    options = ConvertOptions(str(folder), str(output), constants={"task": "asr", "language": "en"})
    assert convert(options).written == 2
    assert json.loads(output.read_text().splitlines()[1]) == {
        "id": "u2",
        "source": "m",
        "audio": {"path": "../a.wav", "start_s": 1.0, "end_s": 2.0},
        "duration_s": 1.0,
        "task": "asr",
        "language": "en",
        "target": "world",
    }


def test_nothing_written_is_an_error_that_says_why(options: ConvertOptions, write_tone: Tone) -> None:
    write_tone("a.wav", seconds=0.5)
    table = Path(options.input)
    table.write_text("id,path,text,lang,split\nu1,a.wav,x,en,1\n")
    options.where, options.num_workers = {"split": "01"}, 1
    with pytest.raises(ConfigError, match=r"no row has where\.split=01; the column has '1' \(1\)"):
        convert(options)
    table.write_text("id,path,text,lang,split\n")
    with pytest.raises(ConfigError, match="it holds no rows"):
        convert(options)
    options.where = {}
    options.constants, options.columns = {"task": "asr"}, COLUMNS | {"start_s": "split"}
    table.write_text("id,path,text,lang,split\nu1,a.wav,x,en,0.49\nu2,a.wav,x,en,0.1\n")
    assert "a.wav: 0.010 s is too short for an audio token (0.04 s)" in convert(options).errors[0]
