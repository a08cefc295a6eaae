"""What is kept of a large file: looked at once for each of its states, by one process."""

from __future__ import annotations

import json
import os
import threading
from functools import partial
from pathlib import Path

import pytest

from qwen2audio_train.config.data import SampleRecipe, SourceConfig
from qwen2audio_train.data.examples import Example, clips_of
from qwen2audio_train.data.manifests import cache
from qwen2audio_train.data.manifests.cache import Manifest, find_manifests
from qwen2audio_train.data.order import index
from qwen2audio_train.data.order.index import Index, Measured, open_index
from qwen2audio_train.data.samples.maker import with_duration
from qwen2audio_train.data.storage import files
from qwen2audio_train.data.storage.files import content_hash, json_lines, remembered
from qwen2audio_train.data.storage.remote import Remote
from tests.data.corpora import write_corpus


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were written just now are taken for old ones."""
    monkeypatch.setattr(files, "UNSETTLED_NS", 0)


@pytest.mark.usefixtures("settled")
def test_a_file_is_looked_at_once_for_each_of_its_states(tmp_path: Path) -> None:
    path, read = tmp_path / "a", []

    def work(file: str) -> str:
        read.append(file)
        return Path(file).read_text()

    path.write_text("one")
    assert [remembered(str(path), tmp_path / "c", "w", work) for _ in range(3)] == ["one"] * 3
    assert len(read) == 1
    assert remembered(str(path), tmp_path / "c", "other work", work) == "one"
    status = path.stat()
    path.write_text("two")  # in place, as large, and with its old time of change
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert remembered(str(path), tmp_path / "c", "w", work) == "two"
    other = tmp_path / "b"
    other.write_text("six")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)
    assert remembered(str(path), tmp_path / "c", "w", work) == "six"
    path.write_text("four")
    assert remembered(str(path), tmp_path / "c", "w", work) == "four"
    assert len(read) == 5


def test_what_was_changed_just_now_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    assert remembered(str(tmp_path / "a"), tmp_path / "c", "w", content_hash) == content_hash(str(tmp_path / "a"))
    assert not (tmp_path / "c").exists()


def test_an_index_of_lengths_that_were_heard_holds_where_they_were(tmp_path: Path) -> None:
    """The same lines beside other audio are another corpus; with lengths of their own they are the same one."""

    def indexed(folder: str, line: dict[str, object]) -> Index:
        path = tmp_path / folder / "m.jsonl"
        path.write_text(json.dumps({"id": "u", "audio": "a/0.wav", "task": "asr", "target": "x"} | line) + "\n")
        measure = partial(_length, SampleRecipe())
        return open_index([Manifest(str(path), str(path))], measure, "key", tmp_path / "cache")

    for folder, seconds in (("one", 0.2), ("two", 0.3)):
        write_corpus(tmp_path / folder, "a", [seconds])
    heard = [indexed("one", {}), indexed("two", {}), indexed("one", {})]
    assert [round(float(found.records["duration_s"][0]), 4) for found in heard] == [0.2, 0.3, 0.2]
    assert heard[0].folder == heard[2].folder
    told = [indexed(folder, {"duration_s": 0.25}) for folder in ("one", "two")]
    assert told[0].folder == told[1].folder
    bad = [indexed(folder, {"task": "none"}).bad()[0].example for folder in ("one", "two")]
    assert bad == [f"{tmp_path}/{folder}/m.jsonl:1" for folder in ("one", "two")]


def _length(recipe: SampleRecipe, example: Example) -> Measured:
    return Measured(sum(with_duration(clip, recipe).duration_s or 0 for clip in clips_of(example)), 25, 5, "asr")


@pytest.mark.usefixtures("settled")
def test_of_many_ranks_one_reads_the_manifest_and_later_starts_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hash and its form; and of rows in another form one rank writes the manifest."""
    source = SourceConfig([str(write_corpus(tmp_path, "a", [0.2] * 3))])
    (tmp_path / "t.csv").write_text("file,text\na/0.wav,one\n")
    table = SourceConfig(
        [str(tmp_path / "t.csv")], columns={"audio": "file", "target": "text"}, constants={"task": "asr"}
    )
    read: list[str] = []

    def counted(module: object, name: str) -> None:
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: (read.append(name), plain(*args))[1])

    counted(index, "content_hash")
    counted(cache, "_form_of")
    counted(cache, "_lines")

    def start() -> None:
        remote = Remote(str(tmp_path / "cache"))
        for manifests in (find_manifests("s", source, remote), find_manifests("t", table, remote)):
            open_index(manifests, lambda example: Measured(1.0, 25, 5, "asr"), "key", remote.cache_dir)

    ranks = [threading.Thread(target=start) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    once = ["_form_of", "_lines", "content_hash", "content_hash"]
    assert sorted(read) == once
    start()
    assert sorted(read) == once


def test_texts_with_line_separators_stay_in_their_line(tmp_path: Path) -> None:
    """U+2028 and U+0085 end a line for Python's str, and stand in answers of models."""
    path = tmp_path / "texts.jsonl"
    records = [{"text": "one\u2028two\u0085three"}, {"text": "four\x0b\r\n"}]
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    assert list(json_lines(path)) == records
