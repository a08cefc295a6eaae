"""A server that fails, stalls and breaks off; a cache of bounded size that several readers share."""

from __future__ import annotations

import json
import time
from io import BytesIO
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.config.data import SourceConfig
from qwen2audio_train.data.audio.decode import clip_duration, load_audio
from qwen2audio_train.data.examples import Clip, clips_of
from qwen2audio_train.data.loading.build import build_batches
from qwen2audio_train.data.manifests.cache import find_manifests, good_examples
from qwen2audio_train.data.storage import remote as remote_module
from qwen2audio_train.data.storage.blobs import BlobError, TarMember
from qwen2audio_train.data.storage.paths import expand_paths
from qwen2audio_train.data.storage.remote import Remote, RemoteError
from qwen2audio_train.data.storage.remote_state import State, is_another
from tests.data.corpora import equal, is_filler, small_config, write_corpus
from tests.data.file_server import Server
from tests.data.storage.test_blobs import write_tar


def remote(tmp_path: Path, **kwargs: float) -> Remote:
    quick = {"retries": 3, "timeout_s": 0.5, "backoff_s": 0.01}
    return Remote(str(tmp_path / "cache"), **(quick | kwargs))  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", [500, 503, 429, "stall", "break"])
def test_a_passing_fault_is_retried(server: Server, tmp_path: Path, fault: int | str) -> None:
    server.files["/a"] = bytes(range(256)) * 1000
    server.faults["/a"] = [fault, fault]
    assert remote(tmp_path).read(server.url("/a"), 10**6) == server.files["/a"]
    assert len(server.asked) == 3


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_transfer_goes_on_where_it_stopped(server: Server, tmp_path: Path, ranges: bool) -> None:
    server.files["/a.tar"] = bytes(range(256)) * 1000
    server.faults["/a.tar"] = ["break", "break"]
    server.ranges = ranges
    place = remote(tmp_path).shard(server.url("/a.tar"))
    assert Path(place).read_bytes() == server.files["/a.tar"]
    assert [asked for _, asked in server.asked][:2] == [None, "bytes=128000-"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_file_that_changes_while_it_is_fetched_is_fetched_anew(server: Server, tmp_path: Path, ranges: bool) -> None:
    """Never half of one and half of the other."""
    first = bytes(range(256)) * 1000
    server.files["/a.tar"], server.ranges = first, ranges
    server.faults["/a.tar"] = ["break and change"]
    assert Path(remote(tmp_path).shard(server.url("/a.tar"))).read_bytes() == bytes(reversed(first))


def test_a_tar_that_changed_under_its_url_is_refused(server: Server, tmp_path: Path) -> None:
    """At the next start, and where room was made for others and it is fetched again."""
    url = server.url("/x.tar")
    for content in (b"one", b"two"):
        server.files["/x.tar"] = write_tar(tmp_path / "x.tar", {"a": content}).read_bytes()
        remote_module._STATES.clear()
        if content == b"one":
            place = Path(remote(tmp_path).current_tar(url))
            assert remote(tmp_path).current_tar(url) == str(place)
    with pytest.raises(
        RemoteError, match=r"x\.tar: has changed on its server .* to take the new one, delete .*x\.tar\*"
    ):
        remote(tmp_path).current_tar(url)
    assert remote(tmp_path).read_clip(f"{url}::a", 10) == b"one"  # which a run goes on with
    place.unlink()
    with pytest.raises(RemoteError, match=r"x\.tar: has changed on its server"):
        remote(tmp_path).read_clip(f"{url}::a", 10)
    for path in place.parent.glob(f"{place.name}*"):
        path.unlink()
    remote_module._FAILED.clear()
    assert remote(tmp_path).read_clip(f"{url}::a", 10) == b"two"


@pytest.mark.parametrize(
    ("first", "second", "another"),
    [
        (["e", "t", "1"], ["e", "t", "1"], False),
        (["e", "t", "1"], ["e", "t", "2"], True),
        (["e", "t", "1"], ["f", "t", "1"], False),  # another server's ETag
        (["e", "t", "1"], ["f", "u", "1"], True),
        (["e", None, None], ["f", "u", "1"], True),
        (["e", None, "1"], [None, "u", "1"], False),
        ([None, None, None], ["e", "t", "1"], False),
    ],
)
def test_what_tells_one_state_of_a_file_from_another(first: State, second: State, another: bool) -> None:
    assert is_another(first, second) is another


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (403, 1), (500, 4), (429, 4)])
def test_a_lasting_fault_is_told(server: Server, tmp_path: Path, status: int, tries: int) -> None:
    server.files["/a"] = b"x"
    server.faults["/a"] = [status] * 9
    with pytest.raises(RemoteError, match=rf"cannot be fetched.*{status}"):
        remote(tmp_path).read(server.url("/a"), 10)
    assert len(server.asked) == tries


def test_bounds_and_unknown_protocols(server: Server, tmp_path: Path) -> None:
    server.files["/a"] = b"x" * 11
    with pytest.raises(RemoteError, match="limit of 10 bytes"):
        remote(tmp_path).read(server.url("/a"), 10)
    with pytest.raises(BlobError, match=r"nowhere://a/b: cannot be fetched; expected one of file, http, https, hf"):
        remote(tmp_path).read("nowhere://a/b", 10)
    with pytest.raises(RemoteError, match="cannot be fetched after 4 tries"):
        remote(tmp_path).read("http://127.0.0.1:1/a", 10)


def test_members_of_a_remote_shard_cost_one_transfer(server: Server, tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "x.tar", {"a": b"one", "b": b"two"})
    server.files["/x.tar"] = tar.read_bytes()
    url = server.url("/x.tar")
    assert remote(tmp_path).read_clip(TarMember("a", 512, 3).placed(url), 10) == b"one"
    assert remote(tmp_path).read_clip(f"{url}::b", 10) == b"two"
    assert len(server.asked) == 1
    assert remote(tmp_path).read_clip(str(tar), 10) is None
    with pytest.raises(RemoteError, match=r"http://.*/none\.tar: cannot be fetched .*404"):
        remote(tmp_path).read_clip(f"{server.url('/none.tar')}::b", 10)


def test_slices_of_a_remote_file_cost_one_transfer(server: Server, tmp_path: Path) -> None:
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 32_000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    server.files["/a.wav"] = (tmp_path / "a.wav").read_bytes()
    for number in range(20):
        start = number / 10
        clip = Clip(server.url("/a.wav"), None, start, start + 0.1)
        np.testing.assert_array_equal(
            load_audio(clip, remote=remote(tmp_path)), wave[round(start * 16_000) :][:1600], str(clip)
        )
    assert len(server.asked) == 1


def test_a_remote_file_whose_length_is_asked_for_costs_one_transfer(server: Server, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", np.zeros(32_000), 16_000)
    server.files["/a.flac"] = (tmp_path / "a.flac").read_bytes()
    clip = Clip(server.url("/a.flac"), None)
    assert clip_duration(clip, remote=remote(tmp_path)) == 2
    assert len(load_audio(clip, remote=remote(tmp_path))) == 32_000
    assert len(load_audio(Clip(clip.path, 2.0), remote=remote(tmp_path))) == 32_000  # the copy is there
    assert len(server.asked) == 1


def test_a_remote_manifest_is_written_down_once(server: Server, tmp_path: Path) -> None:
    """Using a copy does not make it another file."""
    server.files["/a%20b/t.csv"] = b"file_name,text\nc d.wav,hello\n"
    source = SourceConfig([server.url("/a%20b/t.csv")], columns={"target": "text"}, constants={"task": "asr"})
    first = find_manifests("s", source, remote(tmp_path))
    time.sleep(0.02)
    assert find_manifests("s", source, remote(tmp_path)) == first
    assert len(server.asked) == 1
    (example,) = good_examples(first)
    assert clips_of(example) == (Clip(server.url("/a%20b/c%20d.wav"), None),)


def test_a_remote_manifest_that_changed_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    """At the next start; a run that reads the old copy goes on, and where nobody answers the last one is read."""
    url = server.url("/m.jsonl")

    def at_a_start(target: str | None) -> tuple[str, list[str]]:
        remote_module._STATES.clear()
        if target is not None:
            record = {"id": "u", "audio": "a.wav", "task": "asr", "target": target}
            server.files["/m.jsonl"] = (json.dumps(record) + "\n").encode()
        (manifest,) = find_manifests("s", SourceConfig([url]), remote(tmp_path))
        return manifest.path, [example.target for example in good_examples([manifest])]  # type: ignore[union-attr]

    first, found = at_a_start("one")
    assert (found, at_a_start("one")) == (["one"], (first, ["one"]))
    second, found = at_a_start("two")
    assert found == ["two"]
    assert "one" in Path(first).read_text()
    assert len(server.asked) == 2
    server.files.clear()
    assert at_a_start(None) == (second, ["two"])


def test_what_nobody_will_answer_is_not_asked_again(tmp_path: Path) -> None:
    """The hub, offline (as all tests are), and a protocol without its plug-in; globs too, and as the user's to mend."""
    patient = remote(tmp_path, backoff_s=600)
    with pytest.raises(RemoteError, match="offline mode is enabled"):
        patient.read("hf://datasets/someone/something/a.wav", 10)
    with pytest.raises(BlobError, match=r"\*\.jsonl: its files cannot be listed .*offline"):
        expand_paths(["hf://datasets/someone/something/*.jsonl"], "x")
    with pytest.raises(BlobError, match=r"nowhere://x/\*\.jsonl: cannot be fetched; expected one of file, http"):
        expand_paths(["nowhere://x/*.jsonl"], "x")


def test_a_host_that_is_not_there_is_not_waited_for_by_every_clip(tmp_path: Path) -> None:
    began = []
    for name in "ab":
        with pytest.raises(RemoteError, match="cannot be fetched after 4 tries"):
            remote(tmp_path, timeout_s=60, backoff_s=0.1 if not began else 600).read(f"http://127.0.0.1:9/{name}", 10)
        began.append(name)


def test_a_shard_that_cannot_be_had_is_not_waited_for_by_every_example(server: Server, tmp_path: Path) -> None:
    server.faults["/x.tar"] = [500] * 10
    for name in "abc":
        with pytest.raises(RemoteError, match=r"x\.tar: cannot be fetched after 4 tries"):
            remote(tmp_path, timeout_s=60).read_clip(f"{server.url('/x.tar')}::{name}", 10)
    assert len(server.asked) == 4


def test_the_cache_keeps_what_was_used_last(server: Server, tmp_path: Path) -> None:
    """Room for three of 1 MiB; the one in use stays, and what went is fetched again."""
    for name in "abcd":
        server.files[f"/{name}.tar"] = name.encode() * 2**20
    small = remote(tmp_path, max_gib=3 / 1024)
    for name in "abcad":
        time.sleep(0.02)  # the order of use is that of times
        assert Path(small.shard(server.url(f"/{name}.tar"))).read_bytes()[:1] == name.encode()
    kept = {path.name[-5] for path in (tmp_path / "cache" / "shards").glob("*.tar")}
    assert kept == {"a", "c", "d"}
    small.shard(server.url("/b.tar"))
    assert [path for path, _ in server.asked] == ["/a.tar", "/b.tar", "/c.tar", "/d.tar", "/b.tar"]


def test_many_readers_fetch_once(server: Server, tmp_path: Path) -> None:
    server.files["/a.tar"] = b"x" * 10**6
    wanted = [remote(tmp_path).prefetch(server.url("/a.tar")) for _ in range(8)]
    assert len({future.result() for future in wanted}) == 1
    assert len(server.asked) == 1


def test_fsspec_protocols(tmp_path: Path) -> None:
    with fsspec.open("memory://x/a.bin", "wb") as file:
        file.write(b"abc")
    assert remote(tmp_path).read("memory://x/a.bin", 10) == b"abc"
    with pytest.raises(RemoteError, match="cannot be fetched"):
        remote(tmp_path).read("memory://x/none", 10)


def test_half_of_a_file_is_never_taken_for_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the protocol: its file says how long it is, and ends before."""

    class Half(BytesIO):
        size = 10

    monkeypatch.setattr(fsspec, "open", lambda *args: Half(b"12345"))
    with pytest.raises(RemoteError, match="the connection ended after 5 of 10 bytes"):
        remote(tmp_path).shard("memory://x/half.tar")
    assert not list((tmp_path / "cache" / "shards").glob("*.tar"))


def test_training_from_remote_shards(server: Server, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Shards over http, twice as many as fit into the cache, are trained on as local ones are, and resumed exactly."""
    write_corpus(tmp_path, "a", [0.2] * 60)
    urls = []
    for shard in range(20):
        members = {}
        for i in range(3 * shard, 3 * shard + 3):
            members |= {f"{i}.wav": (tmp_path / "a" / f"{i}.wav").read_bytes(), f"{i}.txt": b"hello"}
        server.files[f"/{shard}.tar"] = write_tar(tmp_path / f"{shard}.tar", members).read_bytes()
        urls.append(server.url(f"/{shard}.tar"))
    size = len(server.files["/0.tar"])
    source = SourceConfig(urls, constants={"task": "asr", "language": "en"})
    config = small_config(
        tmp_path, {"s": source}, cache_max_gib=10.5 * size / 2**30, max_bad_examples=0, window_examples=10
    )
    loader = build_batches(config, tokenizer, epochs=1)
    whole = list(loader)
    assert sum(len(batch["cu_q"]) - 1 for batch in whole if not is_filler(batch)) == 60
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) <= 10
    resumed = build_batches(config, tokenizer, epochs=1)
    assert resumed.batches_per_step == 3
    first = iter(resumed)
    for _ in range(6):
        next(first)
    again = build_batches(config, tokenizer, epochs=1)
    again.load_state_dict(resumed.state_dict())
    assert all(equal(a, b) for a, b in zip(again, whole[6:], strict=True))
