"""Outputs of a frozen audio tower on disk, so that an epoch after the first one need not run it.

An entry is named by the content of the clip's spectrogram and the tower's weights: nothing has to be invalidated, and
ranks and runs share a folder without locks. Worth it where the same clips come back as they were: augmented ones never
do. An entry takes 50 bytes per second of audio and unit of width in bfloat16: 64 kB per second for Qwen2-Audio, against
66 GFLOP. ZeRO-3 cannot use it, since there every rank has to run the same modules.

Shape legend as in `encoder`: A clips, F mel columns, n audio tokens, d tower width.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qwen2audio_train.config.schema import ConfigError, StageConfig
from qwen2audio_train.families.family import Family

Listen = Callable[[Tensor, Tensor], Tensor]
"""mel (num_mel_bins, F) and clip_frames (A,) -> the tower's outputs (n, d)."""


def weights_digest(tower: nn.Module) -> str:
    """SHA-256 over the names, types and values of the tower's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(tower.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def check_encoder_cache(config: StageConfig) -> None:
    """Refuse a cache under which the tower's outputs would not come back as they were.

    Raises:
        ConfigError: naming the key that stands in the way.
    """
    model, adapter = config.model, config.adapter
    adapted = adapter.modules if adapter.kind.value != "none" else []
    reason = None
    if config.stage.value == "encoder":
        reason = "stage=encoder: the tower is trained; train another stage"
    elif adapter.kind.value == "none" and not model.freeze.audio_tower:
        reason = "model.freeze.audio_tower=false: the tower is trained; freeze it"
    elif "audio_tower" in (*adapted, *adapter.modules_to_save):
        reason = "adapter.modules: an adapter on audio_tower changes it; leave it out"
    elif changing := config.data.augment.changing():
        reason = f"data.augment.{changing[0]}: clips change from epoch to epoch; switch it off"
    elif config.deepspeed.stage == 3:
        reason = "deepspeed.stage=3: every rank has to run the same modules; use stage 2 or less"
    if model.encoder_cache_dir is not None and reason:
        raise ConfigError(f"model.encoder_cache_dir and {reason}, or unset model.encoder_cache_dir")


def encoder_cache_of(config: StageConfig, tower: nn.Module, family: Family, ranks: int) -> EncoderCache | None:
    """The cache that a recipe asks for, if it does, for a tower whose weights are loaded."""
    if config.model.encoder_cache_dir is None:
        return None
    max_bytes = int(config.model.encoder_cache_max_gib * 2**30)
    return EncoderCache(config.model.encoder_cache_dir, tower, family, max_bytes, ranks)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


class EncoderCache:
    """A folder of encoder outputs that grows up to a limit and then only answers.

    Nothing is evicted: when clips come back once an epoch, the least recently used one is the next one needed.

    Args:
        folder: made if it is not there.
        tower: frozen; its weights are read once, here.
        family: whose tower it is.
        max_bytes: limit of the folder's size. Ranks that write at the same time each count their own share of it.
        ranks: how many processes write to the folder.
    """

    def __init__(
        self, folder: str | os.PathLike[str], tower: nn.Module, family: Family, max_bytes: int, ranks: int = 1
    ) -> None:
        self.folder, self.family = Path(folder), family
        self.folder.mkdir(parents=True, exist_ok=True)
        self.digest = weights_digest(tower)
        present = sum(file.stat().st_size for file in self.folder.glob("*/*.safetensors"))
        self.room = (max_bytes - present) // ranks
        self.hits = self.misses = 0

    def encode(self, listen: Listen, mel: Tensor, clip_frames: Tensor) -> Tensor:
        """What `listen` gives, running the tower on the clips that are not in the folder.

        Args:
            mel: (num_mel_bins, F), clips in slot layout.
            clip_frames: (A,) mel frames of each clip, A > 0.

        Returns:
            (n, d), clips in their order, without gradient.
        """
        frames = clip_frames.tolist()
        slots = mel.split([self.family.mel_columns(f) for f in frames], dim=1)
        names = [self._name(slot, f) for slot, f in zip(slots, frames, strict=True)]
        found = [self._read(name) for name in names]
        missing = [i for i, entry in enumerate(found) if entry is None]
        self.hits += len(found) - len(missing)
        self.misses += len(missing)
        if missing:
            fresh = self._run(listen, [slots[i] for i in missing], clip_frames[missing])
            for i, entry in zip(missing, fresh, strict=True):
                self._write(names[i], entry)
                found[i] = entry
        return torch.cat([entry.to(mel.device) for entry in found if entry is not None])

    @torch.no_grad()
    def _run(self, listen: Listen, slots: Sequence[Tensor], clip_frames: Tensor) -> tuple[Tensor, ...]:
        """Outputs of some clips, one by one."""
        encoded = listen(torch.cat(list(slots), dim=1), clip_frames)
        return encoded.split([self.family.num_audio_tokens(f) for f in clip_frames.tolist()])

    def _name(self, slot: Tensor, frames: int) -> Path:
        """File of a clip: what goes in, through which weights, in which precision."""
        device = slot.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else "own"
        digest = hashlib.sha256(f"{self.digest} {precision} {frames} {slot.dtype}".encode())
        digest.update(_bytes(slot))
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, file: Path) -> Tensor | None:
        """An entry, or None where there is none, or none that can be read."""
        try:
            return load_file(file)["audio"]
        except (FileNotFoundError, SafetensorError):
            return None

    def _write(self, file: Path, audio: Tensor) -> None:
        """Add an entry while there is room; a reader sees all of it or nothing."""
        size = audio.numel() * audio.element_size()
        if size > self.room:
            return
        file.parent.mkdir(exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.partial")
        save_file({"audio": audio.contiguous().cpu()}, partial)
        self.room -= partial.stat().st_size
        partial.replace(file)
