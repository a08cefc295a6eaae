"""Changes to the audio in training. What happens to an example is a pure function of (seed, pass, id).

Order: speed, reverberation, noise, gain on the waveform; SpecAugment (Park et al., arXiv:1904.08779) on the log-mel.
Shapes: a waveform is (n,) float32 at 16 kHz, a mel (bins, columns) float32 of which the first L columns are the clip.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import soxr
from numpy.typing import NDArray

from qwen2audio_train.config.data import AugmentConfig
from qwen2audio_train.config.schema import ConfigError
from qwen2audio_train.data.audio.decode import load_audio
from qwen2audio_train.data.audio.files import LIMITS, AudioError, AudioLimits
from qwen2audio_train.data.examples import Clip
from qwen2audio_train.data.manifests.tables import read_table
from qwen2audio_train.data.order.permutation import hash_key
from qwen2audio_train.data.storage.paths import expand_paths
from qwen2audio_train.layout import MAX_SAMPLES, MIN_FRAMES, SAMPLING_RATE, num_frames

Wave = NDArray[np.float32]
Mel = NDArray[np.float32]

DECAY = 6.908
"""ln(1000): an amplitude falls by 60 dB in the reverberation time."""

MOST_NOISE_TRIES = 5


@dataclass(frozen=True)
class Augmenter:
    """The recipe's changes to the audio, ready for use in workers."""

    config: AugmentConfig
    seed: int
    noises: tuple[Clip, ...] = ()
    limits: AudioLimits = LIMITS

    def for_example(self, number: int, id: str) -> tuple[Callable[[Wave], Wave], Callable[[Mel, int], Mel]]:
        """What to do with the waveforms and with the mels of an example in pass `number` over its source."""
        rng = np.random.default_rng(hash_key(self.seed, "augment", number, id))
        return lambda wave: self.change_wave(wave, rng), lambda mel, frames: self.change_mel(mel, frames, rng)

    def change_wave(self, wave: Wave, rng: np.random.Generator) -> Wave:
        """Speed, reverberation, noise and gain, each with its probability."""
        config = self.config
        if rng.random() < config.speed:
            wave = change_speed(wave, float(rng.choice(config.speed_factors)))
        if rng.random() < config.reverb:
            wave = reverberate(wave, _between(config.reverb_rt60_s, rng), rng)
        if rng.random() < config.noise:
            wave = add_noise(wave, self._noise(len(wave), rng), _between(config.noise_snr_db, rng))
        if rng.random() < config.gain:
            wave = wave * np.float32(10 ** (_between(config.gain_db, rng) / 20))
        return wave

    def change_mel(self, mel: Mel, frames: int, rng: np.random.Generator) -> Mel:
        """SpecAugment with its probability."""
        config = self.config
        if rng.random() >= config.spec_augment:
            return mel
        changed = mel.copy()
        clip = time_warp(changed[:, :frames], config.time_warp, rng)
        longest = min(config.time_mask_frames, int(config.time_mask_share * frames))
        mean = clip.mean()
        for _ in range(config.num_freq_masks):
            start, stop = _stretch(clip.shape[0], config.freq_mask_bins, rng)
            clip[start:stop] = mean
        for _ in range(config.num_time_masks):
            start, stop = _stretch(frames, longest, rng)
            clip[:, start:stop] = mean
        changed[:, :frames] = clip
        return changed

    def _noise(self, length: int, rng: np.random.Generator) -> Wave:
        """A random stretch of a random noise clip, which is repeated if it is too short."""
        for _ in range(MOST_NOISE_TRIES):
            clip = self.noises[int(rng.integers(len(self.noises)))]
            try:
                noise = load_audio(clip, limits=self.limits)
                break
            except AudioError as error:
                failure = error
        else:
            raise failure
        start = int(rng.integers(max(len(noise) - length, 0) + 1))
        return np.resize(noise[start:], length)


def augmenter_of(config: AugmentConfig, seed: int, limits: AudioLimits = LIMITS) -> Augmenter | None:
    """The augmenter of a recipe, None where everything is switched off; noises are read within `limits`.

    Raises:
        ConfigError: noise without clips, bounds the wrong way round, a share that is none.
        FileNotFoundError: a path of noise that names nothing.
    """
    chances = {name: getattr(config, name) for name in ("spec_augment", "speed", "gain", "noise", "reverb")}
    for name, chance in chances.items():
        if not 0 <= chance <= 1:
            raise ConfigError(f"data.augment.{name}: a probability is between 0 and 1, found {chance}")
    for name in ("gain_db", "noise_snr_db", "reverb_rt60_s"):
        bounds = getattr(config, name)
        if len(bounds) != 2 or bounds[0] > bounds[1]:
            raise ConfigError(f"data.augment.{name}: expected [lowest, highest], found {bounds}")
    if not config.speed_factors or min(config.speed_factors) < 0.5 or max(config.speed_factors) > 2:
        raise ConfigError(f"data.augment.speed_factors: expected factors of 0.5 to 2, found {config.speed_factors}")
    if not any(chances.values()):
        return None
    noises = find_noises(config.noise_path) if config.noise else ()
    return Augmenter(config, seed, noises, limits)


def find_noises(paths: Sequence[str]) -> tuple[Clip, ...]:
    """The clips of audio files, and of manifests (.jsonl) whose lines have an `audio`.

    Raises:
        FileNotFoundError: a path that names nothing.
        ConfigError: no clips in them.
    """
    clips: list[Clip] = []
    for path in expand_paths(paths, "data.augment.noise_path"):
        if not path.endswith(".jsonl"):
            clips.append(Clip(path, None))
            continue
        for _, row in read_table(path):
            audio = row.get("audio") if isinstance(row, dict) else None
            fields = audio if isinstance(audio, dict) else {"path": audio}
            name = fields.get("path")
            if isinstance(name, str):
                place = os.path.join(os.path.dirname(path), name)
                clips.append(Clip(place, None, float(fields.get("start_s") or 0.0), fields.get("end_s")))
    if not clips:
        raise ConfigError(f"data.augment.noise_path: no clip in {', '.join(paths)}")
    return tuple(clips)


def change_speed(wave: Wave, factor: float) -> Wave:
    """Faster by `factor`, pitch and all (Ko et al. 2015); left alone where that would cross a bound of the encoder."""
    length = round(len(wave) / factor)
    if num_frames(length) < MIN_FRAMES or length > MAX_SAMPLES >= len(wave):
        return wave
    return soxr.resample(wave, SAMPLING_RATE * factor, SAMPLING_RATE, quality="HQ").astype(np.float32)


def reverberate(wave: Wave, rt60_s: float, rng: np.random.Generator) -> Wave:
    """A room of exponentially decaying noise behind the direct sound; length and level stay."""
    length = max(round(rt60_s * SAMPLING_RATE), 1)
    times = np.arange(length) / SAMPLING_RATE
    room = rng.standard_normal(length) * np.exp(-DECAY / rt60_s * times)
    room *= 1 / np.sqrt(np.sum(room**2))
    room[0] += 1
    size = len(wave) + length - 1
    wet = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(room, size), size)[: len(wave)]
    level = np.sqrt(np.mean(wave**2) / max(float(np.mean(wet**2)), 1e-20))
    return (wet * level).astype(np.float32)


def add_noise(wave: Wave, noise: Wave, snr_db: float) -> Wave:
    """Noise of the same length at a signal-to-noise ratio; silence on either side changes nothing."""
    signal_power, noise_power = float(np.mean(wave**2)), float(np.mean(noise**2))
    if signal_power == 0 or noise_power == 0:
        return wave
    scale = np.sqrt(signal_power / noise_power / 10 ** (snr_db / 10))
    return (wave + noise * np.float32(scale)).astype(np.float32)


def time_warp(mel: Mel, bound: int, rng: np.random.Generator) -> Mel:
    """Move a random frame by up to `bound` frames and stretch both sides linearly; short clips stay as they are."""
    frames = mel.shape[1]
    if bound <= 0 or frames <= 2 * bound + 1:
        return mel.copy()
    centre = int(rng.integers(bound + 1, frames - bound))
    moved = centre + int(rng.integers(-bound, bound + 1))
    source = np.interp(np.arange(frames), [0, moved, frames - 1], [0, centre, frames - 1])
    left = np.minimum(source.astype(np.int64), frames - 2)
    share = (source - left).astype(np.float32)
    return mel[:, left] * (1 - share) + mel[:, left + 1] * share


def _between(bounds: Sequence[float], rng: np.random.Generator) -> float:
    return float(rng.uniform(bounds[0], bounds[1]))


def _stretch(size: int, longest: int, rng: np.random.Generator) -> tuple[int, int]:
    """A stretch of 0 .. longest places of `size`: its length first, then its start, both uniform."""
    length = min(int(rng.integers(longest + 1)), size)
    start = int(rng.integers(size - length + 1))
    return start, start + length
