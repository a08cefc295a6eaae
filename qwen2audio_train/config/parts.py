"""The parts of a model by name, and what can be done with which: freeze it, recompute its activations, adapt it."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class FreezeConfig:
    """Which parts of the model keep their weights.

    Attributes:
        audio_tower: the encoder.
        multi_modal_projector: the layer between encoder and language model.
        language_model: the decoder layers.
        embed_tokens: the token embeddings.
        lm_head: the output layer.
    """

    audio_tower: bool = False
    multi_modal_projector: bool = False
    language_model: bool = False
    embed_tokens: bool = False
    lm_head: bool = False


PARTS = tuple(part.name for part in fields(FreezeConfig))
LAYERED = ("audio_tower", "language_model")
"""Parts made of layers, whose activations can be recomputed."""

ADAPTED = ("language_model", "multi_modal_projector", "audio_tower")
"""Parts whose linear layers can get an adapter."""
