"""Steps whose loss or gradient is no number: skipped, counted, their examples named, and too many in a row end the run.

One bad example costs one step. Weights that have gone beyond what numbers can hold make every step after them bad: then
the run ends, with the checkpoints that were proven good by a finite step after them, and without the one that was not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging
from typing_extensions import override

from qwen2audio_train.errors import UserError
from qwen2audio_train.training.checkpoints import folder as folders
from qwen2audio_train.training.checkpoints import writing
from qwen2audio_train.training.trainers.stop import StopSignals
from qwen2audio_train.training.trainers.watchdog import Watchdog

logger = logging.get_logger(__name__)

SKIPPED_FILE = "skipped_steps.jsonl"
SET_ASIDE = ".diverged"


class Diverged(UserError):
    """Training went beyond what numbers can hold."""


class OutOfMemory(UserError):
    """A batch does not fit into the device's memory."""


@dataclass
class StepGuard:
    """What the steps since the last log line, and the running one, have given.

    Args:
        max_in_a_row: bad steps in a row that are skipped; one more is `Diverged`.
    """

    max_in_a_row: int
    in_a_row: int = 0
    steps: int = 0
    skipped: int = 0
    unproven: Path | None = None
    """The newest checkpoint, as long as no finite step has followed it."""
    _finite: Tensor | None = None
    _sum: Tensor | None = None

    def add(self, loss: Tensor) -> Tensor:
        """Note a micro-batch's loss, () on its device, without waiting for it; one that is no number counts as 0."""
        finite = loss.isfinite()
        kept = torch.where(finite, loss, 0.0)
        self._finite = finite if self._finite is None else self._finite & finite
        self._sum = kept if self._sum is None else self._sum + kept
        return kept

    def take(self, grad_norm: Tensor | float | None) -> tuple[Tensor, Tensor]:
        """End the running step: (1,) 1 where its loss or gradient is no number, and () the sum of `add`."""
        assert self._finite is not None
        assert self._sum is not None
        finite, total = self._finite, self._sum
        if grad_norm is not None:
            finite = finite & torch.as_tensor(grad_norm, device=finite.device).isfinite()
        self._finite = self._sum = None
        return (~finite).double()[None], total

    def count(self, bad: bool) -> None:
        """Count a step."""
        self.steps += 1
        self.skipped += bad
        self.in_a_row = self.in_a_row + 1 if bad else 0

    def correct(self, logs: dict[str, float]) -> dict[str, float]:
        """A log line whose mean loss is over the steps that were taken; it says how many were skipped."""
        if self.skipped:
            taken = self.steps - self.skipped
            logs = {**logs, "skipped_steps": self.skipped, "loss": logs["loss"] * self.steps / max(taken, 1)}
            if not taken:
                del logs["loss"]
        self.steps = self.skipped = 0
        return logs


def name_examples(run_dir: Path, step: int, examples: Sequence[str]) -> None:
    """Append the examples of a skipped step to `skipped_steps.jsonl`."""
    with (run_dir / SKIPPED_FILE).open("a") as file:
        file.write(json.dumps({"step": step, "examples": list(examples)}) + "\n")


def set_aside(checkpoint: Path | None) -> None:
    """Rename a checkpoint that no finite step has followed, so that nothing goes on from it."""
    if checkpoint is not None and checkpoint.is_dir():
        target = checkpoint.with_name(checkpoint.name + SET_ASIDE)
        shutil.rmtree(target, ignore_errors=True)
        checkpoint.rename(target)


def diverged(run_dir: Path, step: int, what: str) -> Diverged:
    """What to say when a run ends here."""
    complete = folders.complete_checkpoints(run_dir)
    after = f"go on from {complete[-1].name} (resume=auto does)" if complete else "start again"
    aside = ", ".join(sorted(path.name for path in run_dir.glob(f"*{SET_ASIDE}")))
    kept = f"; no finite step followed {aside}, which nothing goes on from" if aside else ""
    return Diverged(
        f"step {step}: {what}; no checkpoint is made of it{kept}. {after} with a lower trainer.learning_rate"
    )


def all_finite(model: nn.Module) -> Tensor:
    """() bool, whether every trained weight, of a ZeRO-3 model this rank's part of it, is a number."""
    weights = [getattr(p, "ds_tensor", p) for p in model.parameters() if p.requires_grad]
    return torch.stack([weight.detach().isfinite().all() for weight in weights if weight.numel()]).all()


def out_of_memory(step: int, batch: dict[str, Any], error: Exception) -> OutOfMemory:
    """What to say of a batch that did not fit, by its shapes alone: the device is full."""
    tokens = int(batch.get("packed_ids", batch["input_ids"]).numel())
    frames = [int(count) for count in batch["clip_frames"]]
    return OutOfMemory(
        f"step {step}: no memory for a batch of {tokens} tokens and {len(frames)} clips of {sum(frames)} mel frames, "
        f"the longest of {max(frames, default=0)} ({str(error).splitlines()[0]}). Lower data.tokens_per_pack or "
        "data.packs_per_forward, set model.activation_checkpointing=true, or choose a higher deepspeed stage; "
        "`launch/plan.py STAGE mode=find_batch` finds the largest pack that fits"
    )


class GuardedTrainer(Trainer):
    """Mixin before `transformers.Trainer`: bad steps are not taken, weights that are no numbers are not saved.

    A checkpoint drops older ones only when a finite step has followed it (or the run has ended on one). A signal to any
    rank (`stop`) ends training on all of them after the same step, which is saved.
    """

    loader: Any
    model: Any
    model_wrapped: Any
    keep_every_steps: int | None = None
    _tr_loss: Tensor

    def __init__(self, *args: Any, max_skipped_steps: int, **kwargs: Any) -> None:
        self.guard = StepGuard(max_skipped_steps)
        self.stop = StopSignals()
        self.stopped = False
        self.watchdog = Watchdog()
        super().__init__(*args, **kwargs)

    @override
    def _prepare_inputs(self, inputs: Any) -> Any:
        """As Trainer's; called before every forward, in training and evaluation."""
        self.watchdog.alive()
        return super()._prepare_inputs(inputs)

    @override
    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As Trainer's; the guard sees the loss.

        Raises:
            OutOfMemory: saying what was in the batch.
        """
        try:
            return self.guard.add(super().training_step(model, inputs, num_items_in_batch))
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.state.global_step + 1, inputs, error) from error

    @override
    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm, after every micro-batch and before the step: a step that is no number is not taken.

        Raises:
            Diverged: one bad step too many in a row, or one that DeepSpeed has taken already.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        bad, loss = self.guard.take(norm)
        asked = bad.new_full((1,), self.stop.received is not None)
        is_bad, self.stopped = (self.sum_over_ranks(torch.cat((bad, asked))) > 0).tolist()
        if self.stopped:
            self.control.should_training_stop = self.control.should_save = True
        self.guard.count(is_bad)
        if is_bad:
            self._tr_loss -= loss
            self._skip_step(model)
        self.rotate()
        return norm

    @override
    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's; a run that was asked to stop saves before it evaluates too, as it may be killed meanwhile."""
        if self.stopped and self.control.should_evaluate:
            self._save_checkpoint(self.model, None)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _skip_step(self, model: Any) -> None:
        run_dir, step = Path(str(self.args.output_dir)), self.state.global_step + 1
        if self.args.should_save:
            name_examples(run_dir, step, self.loader.examples_of(step))
            logger.warning(f"step {step} is skipped: its loss or gradient is no number ({run_dir / SKIPPED_FILE})")
        taken = self.is_deepspeed_enabled and not self.accelerator.optimizer_step_was_skipped
        if taken or self.guard.in_a_row > self.guard.max_in_a_row:
            if self.args.should_save:
                set_aside(self.guard.unproven)
            self._wait()
            raise diverged(
                run_dir, step, f"its loss or gradient is no number, the {self.guard.in_a_row}. step in a row"
            )
        if not self.is_deepspeed_enabled:
            model.zero_grad(set_to_none=True)  # an optimizer passes by what has no gradient

    def may_save(self) -> bool:
        """Whether the last step was good, so that its weights are worth a checkpoint.

        Raises:
            Diverged: the weights are no numbers.
        """
        if self.guard.in_a_row and not self.control.should_training_stop:
            return False  # whether the weights or one example made it bad is not known yet
        if float(self.sum_over_ranks((~all_finite(self.model)).double()[None])) > 0:
            raise diverged(Path(str(self.args.output_dir)), self.state.global_step, "the weights are no numbers")
        return True

    def rotate(self) -> None:
        """Drop the oldest checkpoints beyond `save_total_limit`, but not the best; nothing after a bad step."""
        if self.guard.unproven is None or self.guard.in_a_row:
            return
        self.guard.unproven = None
        if self.args.should_save:
            best = self.state.best_global_step if self.args.save_strategy == "best" else None
            run_dir, limit = Path(str(self.args.output_dir)), self.args.save_total_limit
            writing.rotate(run_dir, limit, spare=best, every=self.keep_every_steps)

    def sum_over_ranks(self, values: Tensor, device: Any = None) -> Tensor:
        """Sum of a tensor over all ranks."""
        if self.args.world_size == 1:
            return values
        moved = values.to(device or self.args.device)
        dist.all_reduce(moved)
        return moved.cpu()

    def _wait(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()
