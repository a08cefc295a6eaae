"""A decoder that never returns, or takes its process with it, costs the clip that it was given and nothing else."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.config.data import SourceConfig
from qwen2audio_train.data.audio import decode
from qwen2audio_train.data.audio.deadline import DeadlineError, within
from qwen2audio_train.data.audio.decode import load_audio
from qwen2audio_train.data.audio.files import AudioError, AudioLimits, Source
from qwen2audio_train.data.examples import Clip
from qwen2audio_train.data.loading.build import build_batches
from tests.data.corpora import is_filler, small_config, write_corpus

FOREVER = 10_000


def hold_the_interpreter() -> None:
    """As a C extension that loops without letting go of the interpreter."""
    ctypes.PyDLL(None).sleep(FOREVER)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash_the_first_time(folder: Path) -> str:
    """As a helper that was forked while another thread held a lock."""
    if not (folder / "been").exists():
        (folder / "been").touch()
        crash()
    return "done"


def number_of_process() -> int:
    return os.getpid()


def here() -> str:
    return os.getcwd()


def array(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.float32)


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (lambda: within(0.1, time.sleep, FOREVER), "was not done after 0.1 s"),
        (lambda: within(0.1, hold_the_interpreter), "was not done after 0.1 s"),
        (lambda: within(9, crash), r"crashed \(SIGKILL\)"),
    ],
)
def test_what_does_not_return_is_ended_and_replaced(work: Callable[[], object], says: str) -> None:
    before = within(9, number_of_process)
    with pytest.raises(DeadlineError, match=says):
        work()
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    assert within(9, number_of_process) not in (before, os.getpid())


def test_what_kills_a_new_helper_is_tried_on_a_second_one(tmp_path: Path) -> None:
    found: list[object] = []

    def fresh(work: Callable[..., object], *args: object) -> None:
        try:
            found.append(within(9, work, *args))
        except DeadlineError as error:
            found.append(str(error))

    for work in [(crash_the_first_time, tmp_path), (crash,)]:
        thread = threading.Thread(target=fresh, args=work)  # a thread of its own has no helper yet
        thread.start()
        thread.join()
    assert found == ["done", "crashed (SIGKILL)"]


def test_results_and_errors_come_back_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (0, 5, 10**6, 2**25 + 1):  # the last does not fit into the shared memory
        np.testing.assert_array_equal(within(60, array, size), array(size))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        within(9, os.stat, tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    assert within(9, here) == str(tmp_path)
    assert within(9, number_of_process) == within(9, number_of_process)
    assert within(None, number_of_process) == os.getpid()


def test_an_array_is_not_written_over_while_somebody_holds_it() -> None:
    """It lies in memory that the helper writes to; a view holds it as well, and what nobody holds is used again."""
    whole = within(9, array, 1000)
    held = [whole[10:20], within(9, array, 7)]
    del whole
    last = [within(9, array, size) + 0 for size in (3000, 10, 2_000_000, 3_000_000)]
    np.testing.assert_array_equal(held[0], np.arange(10, 20))
    np.testing.assert_array_equal(held[1], np.arange(7))
    for result in last:
        np.testing.assert_array_equal(result, array(len(result)))
    places = {within(9, array, 100).ctypes.data for _ in range(9)}
    assert len(places) == 1
    held.clear()
    assert within(9, array, 100).ctypes.data < min(places)


def test_every_thread_has_its_own_helper_and_takes_it_along() -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(within(9, number_of_process))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 3
    for process in found:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_audio_is_the_same_within_a_deadline(write_tone: Callable[..., Path]) -> None:
    clip = Clip(str(write_tone("a.flac", rate=22_050)), None)
    limits = AudioLimits(timeout_s=60)
    np.testing.assert_array_equal(load_audio(clip, limits=limits), load_audio(clip))
    data = Path(clip.path).read_bytes()
    np.testing.assert_array_equal(load_audio(clip, data, limits), load_audio(clip))
    with pytest.raises(AudioError, match=r"none\.wav: no such file"):
        load_audio(Clip("none.wav", None), limits=limits)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """It would be opened for ever."""
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(AudioError, match="no such file: it is a folder, a pipe or a device"):
        load_audio(Clip(str(tmp_path / "a.wav"), None))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_clip_that_a_decoder_never_returns_from_is_listed_by_name(
    num_workers: int, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = decode._waveform

    def hangs_on_the_third(clip: Clip, source: Source, limits: AudioLimits) -> np.ndarray:
        if clip.path.endswith("/3.wav"):
            hold_the_interpreter()
        return plain(clip, source, limits)

    manifest = write_corpus(tmp_path, "a", [0.2] * 8)
    hangs_on_the_third.__qualname__ = "_waveform"
    hangs_on_the_third.__module__ = decode.__name__
    monkeypatch.setattr(decode, "_waveform", hangs_on_the_third)
    config = small_config(
        tmp_path, {"s": SourceConfig([str(manifest)])}, decode_timeout_s=1.0, max_bad_share=1.0, num_workers=num_workers
    )
    listed = tmp_path / "bad.jsonl"
    made: list[int] = []

    def train() -> None:
        loader = build_batches(config, tokenizer, epochs=1, bad_examples_path=listed)
        made.append(sum(len(batch["cu_q"]) - 1 for batch in loader if not is_filler(batch)))

    thread = threading.Thread(target=train)  # so that its helper is one that knows of the decoder that hangs
    thread.start()
    thread.join()
    assert made == [7]
    (line,) = listed.read_text().splitlines()
    assert "a/3" in line
    assert "its decoder was not done after 1 s" in line
