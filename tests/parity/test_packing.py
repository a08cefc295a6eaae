"""What packing must not change: samples beside each other, precision, the stock forward, generation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qwen2audio_train.config.parts import FreezeConfig
from qwen2audio_train.model.freeze import set_trainable
from tests.model.rows import Row, pack, pad, random_row
from tests.parity.steps import RELATIVE_TOLERANCE, gradients, pair, worst

FRAMES = ((40,), (), (7, 31), (100,))


def rows(seed: int = 1) -> list[Row]:
    rng = torch.Generator().manual_seed(seed)
    return [random_row(rng, frames, turns=1 + i % 2) for i, frames in enumerate(FRAMES)]


def test_a_row_is_its_samples_alone() -> None:
    _, packed = pair()
    together = packed(**pack(rows()))
    alone = [packed(**pack([row])) for row in rows()]
    assert torch.allclose(together.nll, torch.cat([out.nll for out in alone]), rtol=RELATIVE_TOLERANCE)
    _, joint = gradients(packed, together.nll_sum)
    _, summed = gradients(packed, sum(out.nll_sum for out in alone))
    name, gap = worst(joint, summed)
    assert gap < RELATIVE_TOLERANCE, f"{name}: {gap:.2e}"


def test_order_within_the_row_does_not_matter() -> None:
    _, packed = pair()
    forward, backward = packed(**pack(rows())), packed(**pack(rows()[::-1]))
    assert torch.allclose(forward.nll_sum, backward.nll_sum, rtol=RELATIVE_TOLERANCE)


def test_a_change_in_one_sample_reaches_no_other() -> None:
    _, packed = pair()
    before, changed = rows(), rows()
    changed[0].mels[0].add_(1.0)
    changed[2].ids[0] += 1
    a, b = packed(**pack(before)), packed(**pack(changed))
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor([int((r.labels >= 0).sum()) for r in before]))
    same = a.nll == b.nll
    assert torch.all(same[(owner == 1) | (owner == 3)])
    assert not torch.any(same[(owner == 0) | (owner == 2)])


@pytest.mark.parametrize("frozen", [True, False])
def test_text_alone_gives_the_tower_a_gradient_of_zero(frozen: bool) -> None:
    _, packed = pair()
    set_trainable(packed, FreezeConfig(audio_tower=frozen))
    out = packed(**pack([random_row(torch.Generator().manual_seed(0), ())]))
    out.nll_sum.backward()
    for name, parameter in packed.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            if "audio_tower" in name or "multi_modal_projector" in name:
                assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_a_pack_without_labels_gives_zeros_everywhere() -> None:
    _, packed = pair()
    batch = pack(rows())
    batch |= {key: batch[key][:0] for key in ("predict_from", "target", "source_id", "weight")}
    out = packed(**batch)
    out.nll_sum.backward()
    assert out.nll_sum.item() == out.weight_sum.item() == 0.0
    for name, parameter in packed.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_weights_scale_the_labels() -> None:
    _, packed = pair()
    batch = pack(rows())
    batch["weight"] = torch.linspace(0.0, 2.0, len(batch["target"]))
    out = packed(**batch)
    assert torch.allclose(out.nll_sum, (out.nll * batch["weight"]).sum())
    assert torch.allclose(out.weight_sum, batch["weight"].sum())


def bfloat16_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    out = model(**batch)
    loss = out.loss if hasattr(out, "loss") else out.nll_sum / out.weight_sum
    return {name: grad.float() for name, grad in gradients(model, loss)[1].items()}


def test_bfloat16_is_as_near_to_float32_as_the_stock_model_is() -> None:
    """Both orders of the stock model's padded rows differ from float32 by rounding; ours may not differ by more."""
    stock, packed = pair()
    batch, padded = pack(rows()), [pad(order, torch.Generator().manual_seed(5)) for order in (rows(), rows()[::-1])]
    exact = bfloat16_gradients(stock, padded[0])
    stock, packed = stock.bfloat16(), packed.bfloat16()
    total = torch.cat([g.flatten() for g in exact.values()]).norm()

    def distance(grads: dict[str, Tensor]) -> float:
        return float(torch.cat([(grads[n] - g).flatten() for n, g in exact.items()]).norm() / total)

    theirs = []
    for order in padded:
        order["input_features"] = order["input_features"].bfloat16()
        theirs.append(distance(bfloat16_gradients(stock, order)))
    assert distance(bfloat16_gradients(packed, batch)) < 1.1 * max(theirs)


def test_stock_arguments_give_the_stock_result() -> None:
    stock, packed = pair()
    batch = pad(rows(), torch.Generator().manual_seed(5))
    theirs, ours = stock(**batch), packed(**batch)
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.logits, theirs.logits)


def test_generation_from_packed_clips_equals_stock_generation() -> None:
    stock, packed = pair()
    generator = torch.Generator().manual_seed(2)
    prompts = [random_row(generator, frames, text=3) for frames in ((40,), (9, 31))]
    padded = pad(prompts, generator)
    left = torch.zeros_like(padded["input_ids"])
    mask = torch.zeros_like(left)
    for i, row in enumerate(prompts):
        left[i, -len(row.ids) :], mask[i, -len(row.ids) :] = row.ids, 1
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask}
    features = {key: padded[key] for key in ("input_features", "feature_attention_mask")}
    theirs = stock.eval().generate(input_ids=left, **features, **options)[:, left.size(1) :]

    batch = pack(prompts)
    slots = (left.flatten() == 150).nonzero()[:, 0]
    embeds = packed.eval().model.embed(left, batch["mel"], batch["clip_frames"], slots)
    ours = packed.generate(inputs_embeds=embeds, **options)
    assert torch.equal(ours, theirs)


def test_slots_that_do_not_fit_the_clips_are_refused() -> None:
    _, packed = pair()
    batch = pack(rows())
    with pytest.raises(ValueError, match="audio_slot names"):
        packed(**batch | {"audio_slot": batch["audio_slot"][1:]})
    with pytest.raises(ValueError, match="mel has"):
        packed(**batch | {"mel": batch["mel"][:, 2:]})
