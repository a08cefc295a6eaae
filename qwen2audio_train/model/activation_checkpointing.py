"""Which activations are kept for backward and which are computed again."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from qwen2audio_train.config.schema import CheckpointingPolicy, ConfigError
from qwen2audio_train.model.packed import unwrap

PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})
ATTENTION = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
    }
)
"""Kernels behind the packed attention on CPU and CUDA."""

LOW_RANK = 8
"""A product with so many times more columns than terms is cheaper to repeat than to keep: the second half of a LoRA."""


def set_activation_checkpointing(
    model: nn.Module,
    parts: Collection[str],
    policy: CheckpointingPolicy = CheckpointingPolicy.full,
    *,
    use_reentrant: bool = False,
) -> None:
    """Recompute activations of the layers of `parts` (`audio_tower`, `language_model`) in backward.

    Under the policy `full` a layer keeps its input alone and runs again. Under `selective` it keeps the outputs of
    matrix products and attention too; norms, rotations, activations, gates and low-rank products are computed again.

    The choice outlives `gradient_checkpointing_enable` and `..._disable`, with which TRL switches it off for the
    reference model's pass.

    Raises:
        ConfigError: a part without layers.
        ValueError: the selective policy with reentrant checkpoints, which know no policies.
    """
    known = {"audio_tower", "language_model"}
    if unknown := set(parts) - known:
        raise ConfigError(f"model.activation_checkpointing: {', '.join(sorted(unknown))} is not one of {sorted(known)}")
    options: dict[str, Any] = {"use_reentrant": use_reentrant}
    if policy is CheckpointingPolicy.selective:
        if use_reentrant:
            raise ValueError("the selective policy needs use_reentrant=False")
        options |= {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
    inner = unwrap(model)
    inner.checkpointed_parts = tuple(sorted(parts))
    inner.checkpoint_function = partial(checkpoint, **options)
    inner._set_gradient_checkpointing(bool(parts))
    if use_reentrant:
        # It gives gradients only to what depends on an input that requires one: under an adapter none does.
        inner.enable_input_require_grads()


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what attention gives, and matrix products but those of low rank: there a layer's time goes."""
    name = operator.name()
    if name in PRODUCTS:
        terms, columns = args[-1].shape[-2:]
        kept = LOW_RANK * terms > columns
    else:
        kept = name in ATTENTION
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
