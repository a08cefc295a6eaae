"""Augmentation: each change measured, the whole a pure function of (seed, pass, id), off by default."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from transformers import PreTrainedTokenizerFast

from qwen2audio_train.config.data import AugmentConfig
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.audio.augment import (
    Augmenter,
    add_noise,
    augmenter_of,
    change_speed,
    find_noises,
    reverberate,
    time_warp,
)
from qwen2audio_train.data.audio.mel import log_mel
from qwen2audio_train.data.loading.build import build_batches
from tests.data.corpora import equal, small_config, take_steps, two_sources

RNG = np.random.default_rng


def tone(hertz: float = 440, seconds: float = 2.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * 16_000)) / 16_000)).astype(np.float32)


def loudest_hertz(wave: np.ndarray) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(wave * np.hanning(len(wave))))) * 16_000 / len(wave))


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_speed_changes_length_and_pitch(factor: float) -> None:
    fast = change_speed(tone(), factor)
    assert len(fast) == pytest.approx(32_000 / factor, abs=2)
    assert loudest_hertz(fast) == pytest.approx(440 * factor, abs=1)
    assert fast.dtype == np.float32


def test_speed_does_not_cross_the_bounds_of_the_encoder() -> None:
    almost = np.zeros(29 * 16_000, dtype=np.float32)
    assert change_speed(almost, 0.9) is almost
    short = np.zeros(350, dtype=np.float32)
    assert change_speed(short, 1.5) is short
    assert len(change_speed(np.zeros(40 * 16_000, dtype=np.float32), 0.8)) == 50 * 16_000


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 20.0])
def test_noise_has_the_asked_ratio(snr_db: float) -> None:
    noise = RNG(0).standard_normal(32_000).astype(np.float32)
    added = add_noise(tone(), noise, snr_db) - tone()
    assert 10 * np.log10(np.mean(tone() ** 2) / np.mean(added**2)) == pytest.approx(snr_db, abs=0.01)
    assert np.array_equal(add_noise(tone(), np.zeros(32_000, dtype=np.float32), 0), tone())


def test_reverberation_keeps_length_and_level_and_decays_as_asked() -> None:
    click = np.zeros(16_000, dtype=np.float32)
    click[0] = 1
    wet = reverberate(click, 0.5, RNG(0))
    assert len(wet) == 16_000
    assert np.mean(wet**2) == pytest.approx(np.mean(click**2), rel=1e-4)
    level = [10 * np.log10(np.mean(wet[start : start + 800] ** 2)) for start in (400, 4400)]
    assert level[0] - level[1] == pytest.approx(60 * 0.25 / 0.5, abs=2)  # 60 dB in half a second, over a quarter


def test_time_warp_moves_the_middle_and_not_the_ends() -> None:
    ramp = np.tile(np.arange(400, dtype=np.float32), (2, 1))
    moved = [time_warp(ramp, 80, RNG(i)) for i in range(50)]
    assert all(warped[0, 0] == 0 and warped[0, -1] == pytest.approx(399) for warped in moved)
    assert all((np.diff(warped[0]) > 0).all() for warped in moved)
    shifts = [np.abs(warped[0] - ramp[0]).max() for warped in moved]
    assert 40 < max(shifts) <= 80
    assert np.array_equal(time_warp(ramp[:, :160], 80, RNG(0)), ramp[:, :160])


def masks(mel: np.ndarray, frames: int, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the masks along frequency and time over 400 draws, without the warp."""
    config = AugmentConfig(spec_augment=1.0, time_warp=0, **kwargs)
    found = []
    for i in range(400):
        changed = Augmenter(config, 0).change_mel(mel, frames, RNG(i))
        same = changed == mel
        assert same[:, frames:].all()
        found.append(((~same).all(axis=1, where=np.arange(mel.shape[1]) < frames).sum(), (~same).all(axis=0).sum()))
    return tuple(np.array(column) for column in zip(*found, strict=True))  # type: ignore[return-value]


def test_spec_augment_is_librispeech_basic() -> None:
    """F 27, T 100, one mask each, uniform from 0; frames beyond the clip stay."""
    mel = RNG(0).standard_normal((128, 504)).astype(np.float32)
    freq, time = masks(mel, 500)
    assert (freq.min(), freq.max()) == (0, 27)
    assert (time.min(), time.max()) == (0, 100)
    assert freq.mean() == pytest.approx(13.5, abs=1.5)
    assert time.mean() == pytest.approx(50, abs=5)


def test_time_mask_is_bounded_by_its_share() -> None:
    mel = RNG(0).standard_normal((128, 64)).astype(np.float32)
    assert masks(mel, 60, time_mask_share=0.2)[1].max() == 12
    assert masks(mel, 60)[1].max() <= 60


def test_the_same_example_is_changed_alike_in_the_same_pass_alone() -> None:
    config = AugmentConfig(spec_augment=0.9, speed=0.5, gain=0.5, reverb=0.5)
    augmenter = Augmenter(config, 7)

    def outcome(augmenter: Augmenter, number: int, id: str) -> bytes:
        change_wave, change_mel = augmenter.for_example(number, id)
        mel, frames = log_mel(change_wave(tone()))
        return change_mel(mel, frames).tobytes()

    first = outcome(augmenter, 0, "a")
    assert first == outcome(augmenter, 0, "a")
    others = {outcome(augmenter, 1, "a"), outcome(augmenter, 0, "b"), outcome(Augmenter(config, 8), 0, "a")}
    assert len(others | {first}) == 4


def test_probabilities_are_respected() -> None:
    wave = tone(seconds=0.1)
    augmenter = Augmenter(AugmentConfig(gain=0.3), 0)
    changed = sum(not np.array_equal(augmenter.for_example(0, str(i))[0](wave), wave) for i in range(1000))
    assert changed == pytest.approx(300, abs=45)


def test_noise_from_files_and_manifests(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "n.wav", 0.1 * RNG(0).standard_normal(4_000), 16_000)
    lines = [{"audio": "n.wav"}, {"audio": {"path": "n.wav", "start_s": 0.1, "end_s": 0.2}}, {"x": 1}]
    (tmp_path / "n.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    noises = find_noises([f"{tmp_path}/n.*"])
    assert [(Path(clip.path).name, clip.start_s, clip.end_s) for clip in noises] == [
        ("n.wav", 0.0, None),
        ("n.wav", 0.1, 0.2),
        ("n.wav", 0.0, None),
    ]
    config = AugmentConfig(noise=1.0, noise_path=[f"{tmp_path}/n.jsonl"], noise_snr_db=[10.0, 10.0])
    augmenter = augmenter_of(config, 0)
    assert augmenter is not None
    added = augmenter.for_example(0, "a")[0](tone()) - tone()  # longer than the noise, which is repeated
    assert 10 * np.log10(np.mean(tone() ** 2) / np.mean(added**2)) == pytest.approx(10, abs=0.01)
    (tmp_path / "none.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(ConfigError, match=r"data\.augment\.noise_path: no clip"):
        find_noises([f"{tmp_path}/none.jsonl"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 1.5}, "data.augment.speed: a probability"),
        ({"gain_db": [3.0, -3.0]}, "data.augment.gain_db: expected"),
        ({"speed": 0.5, "speed_factors": [3.0]}, "data.augment.speed_factors"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        augmenter_of(AugmentConfig(**change), 0)
    assert augmenter_of(AugmentConfig(), 0) is None


def test_batches_are_augmented_the_same_by_any_worker(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = small_config(tmp_path, two_sources(tmp_path, 20, 10), max_bad_examples=0)
    plain = take_steps([build_batches(config, tokenizer)], 3)
    augment = AugmentConfig(spec_augment=1.0, speed=0.5, gain=0.5)
    config = dataclasses.replace(config, augment=augment)
    one, two = (take_steps([build_batches(dataclasses.replace(config, num_workers=n), tokenizer)], 3) for n in (0, 2))
    assert all(equal(a, b) for (x,), (y,) in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))
    assert not any(equal(a, b) for (x,), (y,) in zip(one, plain, strict=True) for a, b in zip(x, y, strict=True))
