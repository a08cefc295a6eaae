"""Audio language models on packed batches: encoder at real lengths, segments end to end, labels only at the LM head.

The classes here are mixed into transformers' own of a family (see `qwen2_audio`): they hold the weights under the same
names and behave like them when they get their arguments. A batch with `cu_q` among its keys is a packed one.

Shape legend: N tokens of the row, M labels, S segments, A clips, F mel columns, n audio tokens, d width of the language
model. A preference batch has B pairs in rows of T tokens besides.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from typing_extensions import override

from qwen2audio_train.families.family import Family
from qwen2audio_train.layout import MIN_FRAMES
from qwen2audio_train.model.attention import PACKED_ATTENTION, register_packed_attention
from qwen2audio_train.model.ctc import CtcHead
from qwen2audio_train.model.encoder import Clips, clip_index_of
from qwen2audio_train.model.encoder_cache import EncoderCache
from qwen2audio_train.model.loss import LabelHead, LabelObjective, label_nll
from qwen2audio_train.model.outputs import PackedHidden, PackedOutput


class PackedBackbone(PreTrainedModel):
    """A family's model without LM head, on packed or stock arguments.

    The family's class says how its tower listens (`listen`) and what projects (`project`); it has a `language_model`,
    and as `audio_tower` the module whose frozen outputs may be kept.
    """

    family: ClassVar[Family]
    audio_tower: Any
    language_model: Any
    encoder_cache: EncoderCache | None = None
    """Outputs of the frozen tower on disk, if the run keeps them."""

    @override
    def forward(self, *args: Any, cu_q: Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPast:
        """Stock forward, or with `cu_q` the packed one: see `forward_packed`."""
        if cu_q is None:
            return cast(BaseModelOutputWithPast, super().forward(*args, **kwargs))
        return self.forward_packed(*args, cu_q=cu_q, **kwargs)

    def listen(self, mel: Tensor, clip_frames: Tensor, index: Clips | None = None) -> Tensor:
        """What the tower makes of packed clips (n, tower width), before the projector; `index`: `Family.clip_index`."""
        raise NotImplementedError

    def project(self, audio: Tensor) -> Tensor:
        """That (n, tower width) as embeddings of the language model (n, d)."""
        raise NotImplementedError

    def rotary_positions(self, positions: Tensor) -> Tensor:
        """The batch's positions (1, N) as the language model takes them."""
        return positions

    def forward_packed(
        self,
        input_ids: Tensor,
        *,
        cu_q: Tensor,
        cu_k: Tensor,
        mel: Tensor,
        clip_frames: Tensor,
        audio_slot: Tensor,
        position_ids: Tensor | None = None,
        key_index: Tensor | None = None,
        packed_ids: Tensor | None = None,
        packed_positions: Tensor | None = None,
        scatter: Tensor | None = None,
        max_q: int | None = None,
        max_k: int | None = None,
        **clips: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a packed row.

        Args:
            input_ids, position_ids: (1, N) tokens and their positions; in a preference batch `packed_ids` and
                `packed_positions` are these, and `input_ids` (2 B, T) is not looked at.
            cu_q, cu_k: (S + 1,) int32 borders of segments; key_index: see `attention`.
            mel, clip_frames: (num_mel_bins, F) and (A,), see `encoder`; A may be 0.
            audio_slot: (n,) places of the audio tokens in the row, in the order of the clips.
            scatter: (2 B, T) places in the row whose hidden states are wanted, -1 for padding (zeros).
            max_q, max_k: longest segment of queries and of keys.
            clips: what `Family.clip_index` gives of the clips. What a batch lacks of it and of the maxima is computed
                here, and the host waits for the device.

        Returns:
            `last_hidden_state` (1, N, d), or (2 B, T, d) with `scatter`.
        """
        ids, positions = (input_ids, position_ids) if packed_ids is None else (packed_ids, packed_positions)
        audio = self.hear(mel, clip_frames, clip_index_of(clips))
        embeds = self.place(ids, audio, audio_slot)
        hidden = self.language_model(
            inputs_embeds=embeds,
            position_ids=None if positions is None else self.rotary_positions(positions),
            attention_mask=embeds.new_empty(1, 1, 0, 0),  # with four dimensions, every family takes it as it is
            use_cache=False,
            cu_q=cu_q,
            cu_k=cu_k,
            key_index=key_index,
            max_q=int(cu_q.diff().max()) if max_q is None else max_q,
            max_k=int(cu_k.diff().max()) if max_k is None else max_k,
        ).last_hidden_state
        if scatter is not None:
            hidden = hidden[0][scatter.clamp(min=0)] * (scatter >= 0).unsqueeze(-1)
        return PackedHidden(last_hidden_state=hidden, audio=audio)

    def embed(self, input_ids: Tensor, mel: Tensor, clip_frames: Tensor, audio_slot: Tensor) -> Tensor:
        """Token embeddings with the audio in its places: `hear`, then `place`."""
        return self.place(input_ids, self.hear(mel, clip_frames), audio_slot)

    def hear(self, mel: Tensor, clip_frames: Tensor, index: Clips | None = None) -> Tensor:
        """Audio embeddings (n, d) of packed clips; without a clip those of a dummy, of which `index` is to be.

        Every rank has to run the same modules: a pack without audio runs them on a clip that weighs nothing.
        """
        if len(clip_frames) == 0:
            mel = mel.new_zeros(mel.size(0), self.family.mel_columns(MIN_FRAMES))
            clip_frames = clip_frames.new_full((1,), MIN_FRAMES)
        return self.encode(mel, clip_frames, index)

    def place(self, input_ids: Tensor, audio: Tensor, audio_slot: Tensor) -> Tensor:
        """Token embeddings with audio embeddings (n, d) in their places.

        Args:
            input_ids: (rows, columns), one row in a packed batch.
            audio_slot: (n,) places in the flattened `input_ids`.

        Returns:
            (rows, columns, d).

        Raises:
            ValueError: `audio_slot` has not one place for every audio token of the clips.
        """
        embeds = self.get_input_embeddings()(input_ids)
        audio = audio.to(embeds.dtype)
        if len(audio_slot) == 0:
            return cast(Tensor, embeds + 0.0 * audio.sum())
        if len(audio_slot) != len(audio):
            raise ValueError(
                f"audio_slot names {len(audio_slot)} places, the clips have {len(audio)} audio tokens; give every clip "
                "family.num_audio_tokens(frames) placeholders"
            )
        flat = embeds.flatten(0, 1).index_copy(0, audio_slot, audio)
        return cast(Tensor, flat.view_as(embeds))

    def encode(self, mel: Tensor, clip_frames: Tensor, index: Clips | None = None) -> Tensor:
        """Projected audio embeddings (n, d) of packed clips.

        A frozen tower keeps neither graph nor activations.
        """
        trains = any(p.requires_grad for p in self.tower_parameters())
        if self.encoder_cache is not None and not trains:
            audio = self.encoder_cache.encode(self.listen, mel, clip_frames)
        else:
            with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
                audio = self.listen(mel, clip_frames, index)
        return self.project(audio)

    @property
    def num_encoder_layers(self) -> int:
        """Layers of the tower, between its stem and its last norm."""
        return len(self.audio_tower.layers)

    def tower_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the part `audio_tower`, without a projector that lies in it."""
        for name, parameter in self.audio_tower.named_parameters(prefix=self.family.parts["audio_tower"]):
            if self.family.part_of(name) == "audio_tower":
                yield parameter


class PackedAudioLM(PreTrainedModel):
    """A family's model with LM head, on packed or stock arguments; saved and loaded under the stock name."""

    family: ClassVar[Family]
    backbone: ClassVar[type[PackedBackbone]]

    checkpointed_parts: tuple[str, ...] = ("audio_tower", "language_model")
    """Parts whose layers recompute their activations when gradient checkpointing is on."""

    ctc_head: CtcHead | None
    """Reads the audio embeddings as tokens where that is an objective of the run."""

    runs_language_model: bool = True
    """Whether a packed batch goes through the language model, or through `ctc_head` alone."""

    checkpoint_function: Callable[..., Any] | None = None
    """How they do, set by `activation_checkpointing.set_activation_checkpointing`; None: as transformers asks."""

    def __init__(self, config: PreTrainedConfig) -> None:
        register_packed_attention()
        register_weight_names(type(self))
        config._attn_implementation = PACKED_ATTENTION
        text = cast(PreTrainedConfig, config.text_config)
        # Not the stock __init__, which would build the stock parts first.
        PreTrainedModel.__init__(self, config)
        self.model = self.backbone(config)
        self.lm_head = LabelHead(text.hidden_size, text.vocab_size, bias=False)
        self.ctc_head = None
        self.post_init()

    def set_fixed_weights(self) -> None:
        """Give weights that are never trained their values, where a config alone makes them random."""

    def attach_ctc_head(self, head: CtcHead) -> None:
        """Read the audio embeddings as tokens besides; `save_pretrained` leaves the head out."""
        self.ctc_head = head
        self._keys_to_ignore_on_save = {f"ctc_head.{name}" for name in head.state_dict()}

    @override
    def forward(self, *args: Any, cu_q: Tensor | None = None, **kwargs: Any) -> Any:
        """Stock forward, or with `cu_q` the loss of a packed batch: see `forward_packed`."""
        if cu_q is None:
            return super().forward(*args, **kwargs)
        return self.forward_packed(*args, cu_q=cu_q, **kwargs)

    def forward_packed(
        self,
        *,
        predict_from: Tensor,
        target: Tensor,
        weight: Tensor,
        source_id: Tensor | None = None,
        objective: LabelObjective | None = None,
        temperature: float = 1.0,
        **batch: Any,
    ) -> PackedOutput:
        """Loss of a packed batch.

        Args:
            predict_from, target: (M,) place in the row that predicts, and token that it should predict.
            weight: (M,) float32 factor of each label.
            source_id: (M,) not looked at here.
            objective: what to sum instead of weight x nll; it sees the nll at `temperature`.
            temperature: divisor of the logits.
            batch: what `PackedBackbone.forward_packed` takes, and `transcript`, `transcript_length` and `others`
                of `CtcHead` where the model has one.
        """
        if not self.runs_language_model:
            return self._read(**batch)
        out = self.model(**batch)
        hidden = out.last_hidden_state[0][predict_from]
        if temperature != 1.0:
            hidden = hidden / temperature  # the head has no bias, so this divides its logits
        loss = label_nll(hidden, self.lm_head, target, weight, objective)
        reads = self.ctc_head is not None and self.training
        ctc_sum = self._ctc_sum(out.audio, **batch) if reads else None
        return PackedOutput(loss.nll_sum, weight.float().sum(), loss.nll, loss.correct, ctc_sum)

    def _read(self, mel: Tensor, clip_frames: Tensor, **batch: Any) -> PackedOutput:
        """Loss of the transcripts alone, and in evaluation what is read instead."""
        audio = self.model.hear(mel, clip_frames, clip_index_of(batch))
        norms = audio.detach().float().norm(dim=1) * (len(clip_frames) > 0)
        output = PackedOutput(ctc_sum=self._ctc_sum(audio, clip_frames, **batch))
        output.audio_norms = torch.stack((norms.sum(), (norms > 0).sum().float()))
        if not self.training and self.ctc_head is not None:
            output.read = self.ctc_head.read(audio, self._lengths(clip_frames), self.get_input_embeddings())
        return output

    def _ctc_sum(
        self,
        audio: Tensor,
        clip_frames: Tensor,
        transcript: Tensor,
        transcript_length: Tensor,
        others: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        assert self.ctc_head is not None
        embed = self.get_input_embeddings()
        return cast(
            Tensor, self.ctc_head(audio, self._lengths(clip_frames), transcript, transcript_length, embed, others)
        )

    @override
    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        """Stock, then off again in the parts that were not asked for: see `activation_checkpointing`."""
        if self.checkpoint_function is not None:
            kwargs["gradient_checkpointing_func"] = self.checkpoint_function
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        for part in {"audio_tower", "language_model"} - set(self.checkpointed_parts):
            for module in getattr(self.model, part).modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.gradient_checkpointing = False

    @override
    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save as the stock class would: weights under the published names, `architectures` with the stock name."""
        # With this attribute transformers writes the names that it happened to read.
        self.__dict__.pop("_weight_conversions", None)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        self.config.architectures = [self.family.model_class]
        if is_main_process:
            self.config.save_pretrained(save_directory)
            self._say_whether_tied(Path(save_directory) / "config.json")

    def _say_whether_tied(self, file: Path) -> None:
        """Write `tie_word_embeddings` at both levels, also where it is this version's default, which is left out.

        transformers 5.10 took true for the default above, and served models wrote `<|audio_bos|>` alone.
        """
        values = json.loads(file.read_text())
        tied = self.lm_head.weight is self.get_input_embeddings().weight
        values["tie_word_embeddings"] = values["text_config"]["tie_word_embeddings"] = tied
        file.write_text(json.dumps(values, indent=2) + "\n")

    def _lengths(self, clip_frames: Tensor) -> list[int]:
        """Audio tokens of each clip."""
        return [self.family.num_audio_tokens(frames) for frames in clip_frames.tolist()]


def register_weight_names(model: type[PackedAudioLM]) -> None:
    """Tell transformers that a class reads and writes the published names; calling it again changes nothing.

    The mapping is spelled out for the whole model, since
    transformers' own is split over two classes and differs from release to release.
    """
    names: list[WeightConverter | WeightRenaming] = [
        WeightRenaming(source_patterns=old, target_patterns=new) for old, new in model.family.published_names.items()
    ]
    register_checkpoint_conversion_mapping(model.__name__, names, overwrite=True)
    register_checkpoint_conversion_mapping(model.backbone.__name__, [], overwrite=True)


def unwrap(model: nn.Module) -> PackedAudioLM:
    """The model inside DDP, DeepSpeed, PEFT and torch.compile wrappers.

    Raises:
        TypeError: there is none.
    """
    found = [m for m in model.modules() if isinstance(m, PackedAudioLM)]
    if len(found) != 1:
        raise TypeError(f"expected one PackedAudioLM inside {type(model).__name__}, found {len(found)}")
    return found[0]
