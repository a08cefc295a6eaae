"""Checkpointed layers: the same gradients, the choice of parts, and what the selective policy keeps and repeats."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from qwen2audio_train.config.schema import AdapterConfig, AdapterKind, CheckpointingPolicy
from qwen2audio_train.families.qwen2_audio import num_encoder_frames
from qwen2audio_train.model.activation_checkpointing import _policy, set_activation_checkpointing
from qwen2audio_train.model.adapters import apply_adapter
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from qwen2audio_train.planning.layers import decoder_product_bytes, encoder_product_bytes
from tests.model.rows import pack, random_row, tiny_config

PARTS = ("audio_tower", "language_model")
FULL, SELECTIVE = CheckpointingPolicy.full, CheckpointingPolicy.selective


@pytest.fixture
def model() -> PackedQwen2Audio:
    torch.manual_seed(0)
    return PackedQwen2Audio(tiny_config())


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return pack([random_row(torch.Generator().manual_seed(i), f) for i, f in enumerate([(40,), (), (7, 9)])])


@pytest.mark.parametrize(("policy", "use_reentrant"), [(FULL, False), (FULL, True), (SELECTIVE, False)])
@pytest.mark.parametrize("parts", [PARTS, ("language_model",), ("audio_tower",), ()])
def test_checkpointing_changes_no_gradient(
    model: PackedQwen2Audio,
    batch: dict[str, torch.Tensor],
    parts: tuple[str, ...],
    policy: CheckpointingPolicy,
    use_reentrant: bool,
) -> None:
    grads = []
    for chosen in ((), parts):
        set_activation_checkpointing(model, chosen, policy, use_reentrant=use_reentrant)
        model.zero_grad()
        model.train()(**batch).nll_sum.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


@pytest.mark.parametrize("policy", [FULL, SELECTIVE])
def test_the_choice_of_checkpointed_parts_outlives_switching_off_and_on(
    model: PackedQwen2Audio, policy: CheckpointingPolicy
) -> None:
    set_activation_checkpointing(model, ["language_model"], policy)
    model.gradient_checkpointing_disable()
    model.gradient_checkpointing_enable()
    on = {n: m for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)}
    on = {n: m for n, m in on.items() if m.gradient_checkpointing}
    assert on.keys() == {"model.language_model.layers.0", "model.language_model.layers.1"}
    for layer in on.values():
        assert ("context_fn" in layer._gradient_checkpointing_func.keywords) is (policy is SELECTIVE)


def test_the_selective_policy_repeats_no_product(model: PackedQwen2Audio, batch: dict[str, torch.Tensor]) -> None:
    flops = []
    for parts, policy in (((), FULL), (PARTS, SELECTIVE), (PARTS, FULL)):
        set_activation_checkpointing(model, parts, policy)
        with FlopCounterMode(display=False) as counter:
            model.train()(**batch).nll_sum.backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] < flops[2]


def test_the_selective_policy_keeps_what_the_forecast_counts() -> None:
    """Per layer, as the difference of two depths."""
    batch = pack([random_row(torch.Generator().manual_seed(0), (1200,))])
    sizes = {}
    for depths in ((1, 1), (3, 1), (1, 3)):
        changes = {"audio__encoder_layers": depths[0], "text__num_hidden_layers": depths[1]}
        config = tiny_config(**changes, audio__d_model=64, text__hidden_size=128, text__intermediate_size=256)
        model = PackedQwen2Audio(config).train()
        set_activation_checkpointing(model, PARTS, SELECTIVE)
        before = living_storages()
        out = model(**batch)
        sizes[depths] = sum(size for place, size in living_storages().items() if place not in before)
        assert out.nll_sum is not None
    frames = sum(num_encoder_frames(f) for f in batch["clip_frames"].tolist())
    encoder = (sizes[3, 1] - sizes[1, 1]) / 2 / frames
    decoder = (sizes[1, 3] - sizes[1, 1]) / 2 / batch["input_ids"].numel()
    # the layer's input is the last product's sum with what came before, so it lies there besides
    assert encoder == pytest.approx(4 * 64 + encoder_product_bytes(config.audio_config, "float32"), rel=0.05)
    assert decoder == pytest.approx(4 * 128 + decoder_product_bytes(config.text_config, "float32"), rel=0.05)


def living_storages() -> dict[int, int]:
    """Bytes of every tensor's storage, by its address."""
    gc.collect()
    storages = [o.untyped_storage() for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def test_wrong_choices_are_refused(model: PackedQwen2Audio) -> None:
    with pytest.raises(ValueError, match="lm_head is not one of"):
        set_activation_checkpointing(model, ["lm_head"])
    with pytest.raises(ValueError, match="use_reentrant=False"):
        set_activation_checkpointing(model, PARTS, SELECTIVE, use_reentrant=True)


def test_the_second_half_of_an_adapter_is_repeated_and_all_else_is_not() -> None:
    x = torch.empty(7, 512)
    for terms, columns, kept in ((512, 512, True), (512, 16, True), (512, 2048, True), (16, 512, False)):
        policy = _policy(None, torch.ops.aten.mm.default, x[:, :1].expand(7, terms), torch.empty(terms, columns))
        assert policy is (CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE)
    assert _policy(None, torch.ops.aten.mul.Tensor, x, x) is CheckpointPolicy.PREFER_RECOMPUTE


def test_adapters_have_the_same_gradients_under_the_selective_policy(
    model: PackedQwen2Audio, batch: dict[str, torch.Tensor]
) -> None:
    adapted = apply_adapter(model, AdapterConfig(kind=AdapterKind.lora, r=2, modules=list(PARTS)))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    grads = []
    for parts in ((), PARTS):
        set_activation_checkpointing(adapted, parts, SELECTIVE)
        adapted.zero_grad()
        adapted.train()(**batch).nll_sum.backward()
        grads.append({n: p.grad for n, p in adapted.named_parameters() if p.grad is not None})
    assert len(grads[0]) > 40
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name
