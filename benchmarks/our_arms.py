"""Our trainer on the clips of `workload.py`, whole and with one trick taken back to what the stock path does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments
from workload import Example, Workload

from qwen2audio_train.batch import tensors
from qwen2audio_train.config.schema import CheckpointingPolicy
from qwen2audio_train.data.samples.collate import pack
from qwen2audio_train.data.samples.sample import build_sample
from qwen2audio_train.families.qwen2_audio import num_audio_tokens, num_encoder_frames
from qwen2audio_train.layout import SAMPLING_RATE
from qwen2audio_train.model.activation_checkpointing import set_activation_checkpointing
from qwen2audio_train.model.loss import label_nll
from qwen2audio_train.model.outputs import PackedOutput
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio, PackedQwen2AudioModel
from qwen2audio_train.training.trainers.language_model import AudioTrainer
from qwen2audio_train.training.trainers.packed import RunFiles


class Packs:
    """A packed batch of every micro-batch, over and over, made from the waveforms each time."""

    source_names = ("noise",)
    telemetry = SimpleNamespace(take=dict)
    plan = 0

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        examples, clips = self.workload.examples, self.workload.clips
        while True:
            for start in range(0, len(examples), clips):
                yield self.pack(examples[start : start + clips])

    shares_prefixes = True

    def pack(self, examples: list[Example]) -> dict[str, Tensor]:
        samples = [build_sample(e.rendered, [e.waveform], self.workload.tokenizer) for e in examples]
        return tensors(pack(samples, share_prefixes=self.shares_prefixes))


class SeparatePacks(Packs):
    """The same without a look at what the samples begin with."""

    shares_prefixes = False


class PaddedPacks(Packs):
    """The same with the stock extractor's features, `mel` (A, 128, 3000); ours, thrown away, cost little."""

    def pack(self, examples: list[Example]) -> dict[str, Tensor]:
        extract = self.workload.processor.feature_extractor
        waveforms = [example.waveform for example in examples]
        features = extract(waveforms, sampling_rate=SAMPLING_RATE, return_tensors="pt")["input_features"]
        return super().pack(examples) | {"mel": features}


class PaddedEncoder(PackedQwen2AudioModel):
    """The tower's stock forward over windows of 30 s, whose padding is masked as the stock model masks it."""

    def encode(self, mel: Tensor, clip_frames: Tensor, index: Any = None) -> Tensor:
        frames = clip_frames.tolist()
        positions = self.audio_tower.max_source_positions
        attended = _before([num_encoder_frames(f) for f in frames], positions, mel.device)
        mask = attended[:, None, None, :].expand(-1, 1, positions, -1)
        windows = self.audio_tower(mel, attention_mask=mask).last_hidden_state
        kept = _before([num_audio_tokens(f) for f in frames], windows.size(1), mel.device)
        return self.multi_modal_projector(windows)[kept]


class PaddedDecoder(PackedQwen2Audio):
    """Rows padded to the longest, and transformers' own causal mask."""

    def forward_packed(
        self, *, predict_from: Tensor, target: Tensor, weight: Tensor, source_id: Tensor | None = None, **batch: Any
    ) -> PackedOutput:
        lengths = batch["cu_q"].diff().tolist()
        attended = _before(lengths, max(lengths), target.device)
        place = attended.flatten().nonzero()[:, 0]
        ids = torch.zeros(attended.shape, dtype=torch.long, device=target.device)
        ids.view(-1)[place] = batch["input_ids"][0]
        embeds = self.model.embed(ids, batch["mel"], batch["clip_frames"], place[batch["audio_slot"]])
        out = self.model.language_model(inputs_embeds=embeds, attention_mask=attended.long(), use_cache=False)
        loss = label_nll(out.last_hidden_state.flatten(0, 1)[place[predict_from]], self.lm_head, target, weight)
        return PackedOutput(nll_sum=loss.nll_sum, weight_sum=weight.sum(), nll=loss.nll, correct=loss.correct)


class WholeHead(PackedQwen2Audio):
    """Logits of every position, kept for backward."""

    def forward_packed(
        self, *, predict_from: Tensor, target: Tensor, weight: Tensor, source_id: Tensor | None = None, **batch: Any
    ) -> PackedOutput:
        logits = self.lm_head(self.model(**batch).last_hidden_state[0]).float()
        labels = torch.full((len(logits),), -100, device=logits.device).index_copy(0, predict_from, target)
        nll = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")[predict_from]
        correct = logits[predict_from].argmax(-1) == target
        return PackedOutput(nll_sum=(nll * weight).sum(), weight_sum=weight.sum(), nll=nll.detach(), correct=correct)


def _before(lengths: list[int], columns: int, device: Any) -> Tensor:
    """(rows, columns) bool: the first `lengths[row]` places of a row."""
    return torch.arange(columns, device=device) < torch.tensor(lengths, device=device)[:, None]


def our_trainer(
    workload: Workload,
    callback: TrainerCallback,
    prepare: Callable[[Any], Any],
    *,
    whole: type[PackedQwen2Audio] = PackedQwen2Audio,
    inner: type[PackedQwen2AudioModel] = PackedQwen2AudioModel,
    packs: type[Packs] = Packs,
    recomputed: Sequence[str] = ("audio_tower", "language_model"),
    policy: CheckpointingPolicy = CheckpointingPolicy.selective,
) -> Trainer:
    """Our trainer; the classes of the model and of its batches hold the tricks, but for what layers keep."""

    def make(config: Any) -> PackedQwen2Audio:
        model = whole(config)
        model.model.__class__ = inner
        set_activation_checkpointing(model, recomputed, policy)
        return model

    return AudioTrainer(
        model=prepare(workload.build(make)),
        args=TrainingArguments(**workload.arguments()),
        loader=packs(workload),
        files=RunFiles("", {}, lambda folder: None),
        sources=list(packs.source_names),
        callbacks=[callback],
    )


OUR_ARMS: dict[str, Callable[..., Any]] = {
    "ours": our_trainer,
    "without_shared_prefixes": partial(our_trainer, packs=SeparatePacks),
    "without_packed_encoder": partial(our_trainer, inner=PaddedEncoder, packs=PaddedPacks),
    "without_packed_decoder": partial(our_trainer, whole=PaddedDecoder, packs=SeparatePacks),
    "without_label_head": partial(our_trainer, whole=WholeHead),
    "without_selective": partial(our_trainer, recomputed=()),
}
