"""The optimizer of a recipe, and AdamW for weights that are stored in bfloat16 without a float32 copy.

A bfloat16 has 8 significant bits: an update below 1/512 of its weight is rounded away, and at fine-tuning's rates
nearly all of them are. Two remedies keep them: rounding at random, so that the mean is right, or a second bfloat16 per
weight that holds what rounding lost (Kahan). A weight, its gradient and its state take 8 or 10 bytes, against the 16 of
mixed precision.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from qwen2audio_train.config.combinations import ADAMW_BF16, ADAMW_OFFLOADED
from qwen2audio_train.config.schema import OptimizerConfig
from qwen2audio_train.errors import UserError
from qwen2audio_train.model.freeze import parameter_groups

CHUNK = 2**22
"""Values that are held in float32 at once: 16 MiB for each of the five tensors that an update makes, where a
whole embedding of Qwen2-Audio would take 2.4 GiB for each."""


def build_optimizer(arguments: TrainingArguments, model: nn.Module, rates: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of `trainer.optim` over groups with a learning rate per module.

    Raises:
        UserError: DeepSpeed's optimizer for the host cannot be compiled here.
    """
    kind: Any
    if arguments.optim in ADAMW_BF16:
        kind, options = AdamWBF16, bf16_options(arguments)
    elif arguments.optim in ADAMW_OFFLOADED:
        kind, options = offloaded_adamw(), adamw_options(arguments)
    else:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)  # type: ignore[arg-type]
    groups = parameter_groups(
        model,
        learning_rate=arguments.learning_rate,
        learning_rates=rates.learning_rates,
        weight_decay=arguments.weight_decay,
        encoder_layer_decay=rates.encoder_layer_decay,
        loraplus_lr_ratio=rates.loraplus_lr_ratio,
    )
    optimizer: torch.optim.Optimizer = kind(groups, **options)
    return optimizer


def adamw_options(arguments: TrainingArguments) -> dict[str, Any]:
    """What every AdamW takes from Trainer's arguments."""
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    return {"lr": arguments.learning_rate, "betas": betas, "eps": arguments.adam_epsilon}


def bf16_options(arguments: TrainingArguments) -> dict[str, Any]:
    """What `AdamWBF16` takes from Trainer's arguments."""
    return {**adamw_options(arguments), "kahan": str(arguments.optim).endswith("kahan"), "seed": arguments.seed}


def offloaded_adamw() -> Any:
    """DeepSpeed's AdamW for states on the host, compiled when it is first asked for."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        CPUAdamBuilder().load()
    except Exception as error:  # whatever a compiler, or the lack of one, comes to
        raise UserError(
            f"trainer.optim=deepspeed_cpu_adam: it is compiled at its first use, which failed ({error}); install a C++ "
            "compiler and ninja, or take trainer.optim=adamw_torch"
        ) from error
    return DeepSpeedCPUAdam


class AdamWBF16(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) whose state has the type of its weights.

    What is stored in bfloat16 is computed in float32. Both moments are rounded at random: the second one's decay is
    below bfloat16's resolution too. The random bits follow from (seed, step) alone, so that ranks which hold the same
    weights round them alike, and a resumed run goes on as an uninterrupted one.

    Args:
        kahan: keep what rounding takes from a weight in a third state, rather than round weights at random.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        kahan: bool,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        self.kahan = kahan
        self.seed = seed
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            group["step"] += 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                device = parameter.device
                if device not in generators:
                    generators[device] = torch.Generator(device).manual_seed(self.seed * 2**32 + group["step"])
                self._update(parameter, group, generators[device])
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], generator: torch.Generator) -> None:
        state = self.state[parameter]
        names = ("exp_avg", "exp_avg_sq", *(["lost"] if self.kahan else []))
        if not state:
            for name in names:
                state[name] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        assert parameter.grad is not None
        # By name: a state that was read back need not have them in this order.
        tensors = [parameter.data, parameter.grad.contiguous(), *(state[name] for name in names)]
        for pieces in zip(*(tensor.view(-1).split(CHUNK) for tensor in tensors), strict=True):
            _adamw(*pieces, group=group, generator=generator)


def _adamw(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lost: Tensor | None = None,
    *,
    group: dict[str, Any],
    generator: torch.Generator,
) -> None:
    """One update in place of (n,) values."""
    (beta1, beta2), step, lr = group["betas"], group["step"], group["lr"]
    grad = grad.float()
    mean = exp_avg.float().lerp(grad, 1 - beta1)
    square = exp_avg_sq.float().mul(beta2).addcmul_(grad, grad, value=1 - beta2)
    exact = weight.float() if lost is None else weight.float() + lost.float()
    scale = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    exact = exact.mul(1 - lr * group["weight_decay"]).addcdiv_(mean, scale, value=-lr / (1 - beta1**step))
    store(exp_avg, mean, generator)
    store(exp_avg_sq, square, generator)
    if lost is None:
        store(weight, exact, generator)
    else:
        weight.copy_(exact)
        lost.copy_(exact - weight.float())


def store(target: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """Write float32 values into `target`; a bfloat16 one takes either neighbour, the nearer the likelier."""
    if target.dtype is torch.bfloat16:
        low_bits = torch.randint(2**16, value.shape, dtype=torch.int32, generator=generator, device=value.device)
        rounded = low_bits.add_(value.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
        # What is not finite stays so: the sum above could turn a NaN into a number.
        value = torch.where(value.isfinite(), rounded, value)
    target.copy_(value)
