"""The model of costs against published figures, against torch's own counter, and against what autograd saves."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2AudioConfig

from qwen2audio_train.config.schema import AdapterConfig, AdapterKind
from qwen2audio_train.families.qwen2_audio import num_encoder_frames
from qwen2audio_train.model.adapters import apply_adapter
from qwen2audio_train.model.flops import (
    encoder_flops,
    forward_flops,
    head_dim,
    packed_load,
    peak_flops,
    token_flops,
    training_flops,
)
from qwen2audio_train.model.qwen2_audio import PackedQwen2Audio
from qwen2audio_train.planning import cost
from qwen2audio_train.planning.cost import sample_load, throughput, traffic_bytes
from qwen2audio_train.planning.layers import PRECISIONS, LowRank, decoder_layer, encoder_layer
from qwen2audio_train.planning.memory import Sharding, Trained, activation_bytes, step_memory
from tests.model.rows import pack, random_row, tiny_config

PARAMETERS_7B = {
    "audio_tower": 636_968_960,
    "multi_modal_projector": 5_246_976,
    "language_model": 6_476_664_832,
    "embed_tokens": 639_107_072,
    "lm_head": 639_107_072,
}


@pytest.fixture(scope="module")
def seven_b() -> Qwen2AudioConfig:
    text = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 156032,
    }
    return Qwen2AudioConfig(audio_config={}, text_config=text)


def test_forward_costs_of_the_published_architecture(seven_b: Qwen2AudioConfig) -> None:
    window = forward_flops(seven_b, packed_load([3000], [1], 1))
    with_projector = window["audio_tower"] + window["multi_modal_projector"]
    assert with_projector == pytest.approx(2.28e12, rel=2e-3)
    assert with_projector / 5 == pytest.approx(456e9, rel=2e-3)
    assert encoder_flops(seven_b.audio_config, 500) / 5 == pytest.approx(66e9, rel=1e-2)
    assert token_flops(seven_b.text_config) == pytest.approx(13e9, rel=5e-3)
    assert forward_flops(seven_b, packed_load([], [1], 1))["lm_head"] == pytest.approx(1.28e9, rel=2e-3)


def test_training_cost_and_speed_on_ten_second_clips(
    seven_b: Qwen2AudioConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cost.PEAK_BF16_FLOPS, "measured H200", 790e12)
    load = sample_load(10.0, label_tokens=40, prompt_tokens=30)
    full = sum(training_flops(seven_b, load).values())
    lora = sum(training_flops(seven_b, load, trained=(), adapted=["language_model"]).values())
    assert full / 10 == pytest.approx(1.47e12, rel=5e-3)
    assert lora / 10 == pytest.approx(0.93e12, rel=2e-2)
    speed = throughput(load, full, gpu="measured H200", utilisation=0.5, gpu_hour_price=4.0)
    assert speed.audio_hours_per_hour == pytest.approx(269, rel=5e-3)
    assert speed.tokens_per_s == pytest.approx(8600, rel=5e-3)
    assert speed.price_per_audio_hour == pytest.approx(4.0 / 269, rel=5e-3)
    eight = throughput(load, full, gpu="measured H200", utilisation=0.5, gpus=8, gpu_hour_price=4.0)
    assert eight.audio_hours_per_hour == pytest.approx(8 * speed.audio_hours_per_hour)
    assert eight.price_per_audio_hour == pytest.approx(speed.price_per_audio_hour)


def test_peaks_are_known_by_the_names_of_the_devices() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989.4e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H100 PCIe") is None  # 756e12, by its own data sheet


def test_passes_of_frozen_adapted_and_checkpointed_parts() -> None:
    config, load = tiny_config(), packed_load([100], [40], 5)
    forward = forward_flops(config, load)

    def passes(**options: Any) -> list[float]:
        return [n / forward[part] for part, n in training_flops(config, load, **options).items()]

    assert passes() == [3, 3, 3, 3]
    assert passes(trained=["multi_modal_projector"]) == [1, 3, 2, 2]
    assert passes(trained=["language_model"], checkpointed=["audio_tower", "language_model"]) == [1, 1, 4, 2]
    assert passes(trained=[], adapted=["audio_tower"]) == [2, 2, 2, 2]
    assert passes(trained=["embed_tokens"]) == [1, 1, 2, 2]
    assert passes(trained=["lm_head"]) == [1, 1, 1, 3]


def test_traffic(seven_b: Qwen2AudioConfig) -> None:
    parameters = sum(PARAMETERS_7B.values())
    assert traffic_bytes(parameters, 3, 1) == pytest.approx(50e9, rel=1e-2)
    assert traffic_bytes(parameters, 1, 4) == pytest.approx(34e9, rel=2e-2)
    assert traffic_bytes(parameters, 2, 4) == 5 * 2 * parameters


def test_activations_per_token_of_the_published_architecture(seven_b: Qwen2AudioConfig) -> None:
    text = seven_b.text_config
    assert text.num_hidden_layers * decoder_layer(text).kept("bfloat16") == pytest.approx(5.7e6, rel=5e-2)
    assert text.num_hidden_layers * 2 * text.hidden_size == pytest.approx(0.26e6, rel=1e-2)


def test_memory_of_lora_on_one_h200(seven_b: Qwen2AudioConfig) -> None:
    """16 to 20 thousand packed tokens fit without checkpointing."""
    load = sample_load(10.0, label_tokens=40, prompt_tokens=30)

    def total(copies: int) -> float:
        frames = [load.clip_frames[0]] * copies
        packed = packed_load(frames, [load.tokens] * copies, load.labels * copies)
        adapter = LowRank(16, value=2, copies=False)  # in bfloat16 and without dropout
        trained = Trained(adapted=["language_model"], adapter=adapter, adapter_parameters=40_000_000)
        return step_memory(seven_b, packed, PARAMETERS_7B, trained).total

    assert total(16_000 // load.tokens) < cost.MEMORY_BYTES["H200"] < total(24_000 // load.tokens)


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 16), (1, 4 + 12 / 8), (2, 2 + 14 / 8), (3, 16 / 8)])
def test_states_shrink_with_the_stage(seven_b: Qwen2AudioConfig, stage: int, gigabytes: float) -> None:
    everything = Trained(list(PARAMETERS_7B))
    memory = step_memory(seven_b, packed_load([], [1], 0), PARAMETERS_7B, everything, Sharding(stage, ranks=8))
    states = memory.weights + memory.gradients + memory.optimizer
    assert states == pytest.approx(gigabytes * sum(PARAMETERS_7B.values()), rel=1e-9)


def test_operations_are_those_that_torch_counts() -> None:
    """Exact for the linear layers and convolutions; attention is held against its pairs."""
    config = tiny_config(text__num_key_value_heads=4)
    model = PackedQwen2Audio(config)
    rows = [random_row(torch.Generator().manual_seed(i), f) for i, f in enumerate([(101,), (), (7, 32)])]
    batch = pack(rows)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch)
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in counts.items() if "attention" in op)
    load = packed_load(batch["clip_frames"].tolist(), batch["cu_q"].diff().tolist(), len(batch["target"]))
    ours = sum(forward_flops(config, load).values())
    d, layers = config.audio_config.d_model, config.audio_config.encoder_layers
    encoder_pairs = 4 * d * layers * sum(num_encoder_frames(f) ** 2 for f in load.clip_frames)
    decoder_pairs = forward_flops(config, load)["language_model"] - load.tokens * token_flops(config.text_config)
    # torch counts the convolutions over the gaps between clips too, and a causal kernel as if it were dense
    columns = batch["mel"].size(1) - sum(load.clip_frames)
    gaps = 2 * 3 * d * (config.audio_config.num_mel_bins * columns)
    steps = batch["mel"].size(1) // 2 - sum(num_encoder_frames(f) for f in load.clip_frames)
    gaps += 2 * 3 * d * d * steps
    extra = sum(counts.values()) - attention - (ours - encoder_pairs - decoder_pairs + gaps)
    # older releases of transformers compute the rotary angles as a matrix product
    assert extra in (0, load.tokens * head_dim(config.text_config))


class Saved:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def saved_bytes(model: PackedQwen2Audio, batch: dict[str, torch.Tensor], autocast: bool = False) -> int:
    """Bytes of the storages that autograd saves in forward, weights and inputs left out, their casts included."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    known |= {b.untyped_storage().data_ptr() for b in model.buffers()} | {
        t.untyped_storage().data_ptr() for t in batch.values()
    }
    saved: weakref.WeakSet[Saved] = weakref.WeakSet()

    def note(tensor: torch.Tensor) -> Saved:
        saved.add(one := Saved(tensor))
        return one

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda one: one.tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        out = model(**batch)
    storages = [one.tensor.untyped_storage() for one in saved]  # without what was freed on the way
    kept = {storage.data_ptr(): storage for storage in storages if storage.data_ptr() not in known}
    size = sum(len(storage) for storage in kept.values())
    assert out.nll_sum is not None
    return size


@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("checkpointed", [(), ("audio_tower", "language_model")])
def test_activations_are_those_that_autograd_saves(checkpointed: tuple[str, ...], precision: str) -> None:
    """Per layer, as the difference of two depths, so that what lies outside of the layers drops out."""
    rng = torch.Generator().manual_seed(0)
    # one clip in one segment: on CPU every further one makes attention keep its output twice
    batch = pack([random_row(rng, (1200,))])
    frames = sum(num_encoder_frames(f) for f in batch["clip_frames"].tolist())
    sizes = {}
    for audio_layers, text_layers in ((1, 1), (3, 1), (1, 3)):
        changes = {"audio__encoder_layers": audio_layers, "text__num_hidden_layers": text_layers}
        config = tiny_config(**changes, audio__d_model=64, text__hidden_size=128, text__intermediate_size=256)
        model = PackedQwen2Audio(config).to(torch.bfloat16 if precision == "bfloat16" else torch.float32).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        sizes[audio_layers, text_layers] = saved_bytes(model, batch, precision == "autocast")
        if precision == "autocast" and not checkpointed:
            matrices = [p for part in (model.model.audio_tower, model.model.language_model) for p in matrices_of(part)]
            sizes[audio_layers, text_layers] -= 2 * sum(matrix.numel() for matrix in matrices)
    encoder = (sizes[3, 1] - sizes[1, 1]) / 2 / frames
    decoder = (sizes[1, 3] - sizes[1, 1]) / 2 / batch["input_ids"].numel()
    if checkpointed:
        stream = PRECISIONS[precision].stream
        assert encoder == pytest.approx(stream * 64, rel=0.02)
        assert decoder == pytest.approx(stream * 128, rel=0.02)
    else:
        assert encoder == pytest.approx(encoder_layer(config.audio_config, precision).kept(precision), rel=0.05)
        assert decoder == pytest.approx(decoder_layer(config.text_config).kept(precision), rel=0.05)


def matrices_of(part: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Weights of the linear layers."""
    return [module.weight for module in part.modules() if isinstance(module, torch.nn.Linear)]


def test_a_frozen_tower_keeps_nothing() -> None:
    config, load = tiny_config(), packed_load([1000], [300], 5)
    trained = activation_bytes(config, load, Trained(["audio_tower", "language_model"]))
    frozen = activation_bytes(config, load, Trained(["language_model"]))
    assert trained - frozen > 500 * 2 * encoder_layer(config.audio_config, "bfloat16").kept("bfloat16")


LOW_RANK_CASES = [
    # precision, autocast, adapter in float32, dropout; what follows from it
    ("float32", False, True, 0.0, LowRank(4, 4, copies=False)),
    ("float32", False, True, 0.1, LowRank(4, 4, copies=True, dropout=True)),
    ("bfloat16", False, True, 0.0, LowRank(4, 4, copies=True)),
    ("bfloat16", False, False, 0.0, LowRank(4, 2, copies=False)),
    ("bfloat16", True, True, 0.1, LowRank(4, 2, copies=True, dropout=True)),
    ("autocast", True, True, 0.0, LowRank(4, 2, copies=True)),
    ("float32", False, True, 0.0, LowRank(4, 4, copies=False, dora=True)),
    ("float32", False, True, 0.1, LowRank(4, 4, copies=True, dropout=True, dora=True)),
    ("autocast", True, True, 0.1, LowRank(4, 2, copies=True, dropout=True, dora=True)),
]


@pytest.mark.parametrize(("precision", "autocast", "float32_adapter", "dropout", "adapter"), LOW_RANK_CASES)
@pytest.mark.parametrize("everywhere", [True, False])
def test_an_adapter_and_frozen_layers_keep_what_autograd_saves(
    precision: str,
    autocast: bool,
    float32_adapter: bool,
    dropout: float,
    adapter: LowRank,
    everywhere: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the language model with an adapter, or frozen above one in the tower; dropout as on a GPU, with a mask."""

    def dropped(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return torch.native_dropout(x, p, training)[0] if training and p else x

    monkeypatch.setattr(torch.nn.functional, "dropout", dropped)
    batch = pack([random_row(torch.Generator().manual_seed(0), (1200,))])
    frames = sum(num_encoder_frames(f) for f in batch["clip_frames"].tolist())
    modules = ["audio_tower", "language_model"] if everywhere else ["audio_tower"]
    options = AdapterConfig(kind=AdapterKind.lora, r=4, dropout=dropout, modules=modules, use_dora=adapter.dora)
    sizes = {}
    for audio_layers, text_layers in ((1, 1), (3, 1), (1, 3)):
        changes = {"audio__encoder_layers": audio_layers, "text__num_hidden_layers": text_layers}
        config = tiny_config(**changes, audio__d_model=64, text__hidden_size=128, text__intermediate_size=256)
        stock = PackedQwen2Audio(config).to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
        model: Any = apply_adapter(stock, options, autocast_adapter_dtype=float32_adapter)
        sizes[audio_layers, text_layers] = saved_bytes(model.train(), batch, autocast)
        dora = adapter.dora and dropout > 0  # which multiplies with the weights once more
        if autocast:  # weights that autocast has cast are no activations
            layers = [stock.model.audio_tower.layers, stock.model.language_model.layers]
            for name, matrix in ((n, p) for part in layers for n, p in part.named_parameters() if p.ndim == 2):
                if matrix.dtype is torch.float32:
                    sizes[audio_layers, text_layers] -= 2 * matrix.numel() * (1 + ("base_layer" in name and dora))
    encoder = (sizes[3, 1] - sizes[1, 1]) / 2 / frames
    decoder = (sizes[1, 3] - sizes[1, 1]) / 2 / batch["input_ids"].numel()
    on_encoder = encoder_layer(config.audio_config, precision).kept(precision, trained=False, adapter=adapter)
    on_decoder = decoder_layer(config.text_config).kept(
        precision, trained=False, adapter=adapter if everywhere else None
    )
    assert encoder == pytest.approx(on_encoder, rel=0.02)
    assert decoder == pytest.approx(on_decoder, rel=0.02)


@pytest.mark.parametrize(("dropout", "gib"), [(True, 116.0), (False, 98.9)])
def test_lora_without_checkpoints_keeps_what_was_traced(seven_b: Qwen2AudioConfig, dropout: bool, gib: float) -> None:
    """The published shape, 16 320 tokens, under autocast: storages counted in a forward of it without data."""
    load = packed_load([1000] * 51, [320] * 51, 51 * 40)
    adapter = LowRank(16, value=2, copies=True, dropout=dropout)
    found = activation_bytes(seven_b, load, Trained(adapted=["language_model"], adapter=adapter))
    assert found / 2**30 == pytest.approx(gib, rel=0.01)


def test_unknown_gpu_and_impossible_share_are_refused() -> None:
    load = packed_load([100], [40], 5)
    with pytest.raises(ValueError, match="gpu V100 is unknown"):
        throughput(load, 1e12, gpu="V100", utilisation=0.4)
    with pytest.raises(ValueError, match="utilisation is 40"):
        throughput(load, 1e12, gpu="H100", utilisation=40)
