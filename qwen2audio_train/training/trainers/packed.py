"""Overrides of `transformers.Trainer` that all trainers share: loader, normaliser of the loss, sealed checkpoints.

`PackedTrainer` goes before `transformers.Trainer` (or a subclass of it) in the bases. It overrides Trainer where its
assumptions do not hold for packed batches: the loader is not re-sharded, the normaliser of the loss is the sum over the
whole optimiser step, and a checkpoint is the folder of `checkpoint.py`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging
from typing_extensions import override

from qwen2audio_train.config.schema import OptimizerConfig
from qwen2audio_train.data.loading.base import BatchLoader
from qwen2audio_train.data.loading.indexed import PackLoader
from qwen2audio_train.data.quarantine import TooManyBadExamples
from qwen2audio_train.errors import UserError
from qwen2audio_train.model.ctc import HEAD, HEAD_FILE
from qwen2audio_train.model.packed import unwrap
from qwen2audio_train.training.checkpoints import folder as folders
from qwen2audio_train.training.checkpoints import optimizer_state, writing
from qwen2audio_train.training.checkpoints.restore import whole_state
from qwen2audio_train.training.trainers.freeze_schedule import freeze_by_step
from qwen2audio_train.training.trainers.guard import GuardedTrainer
from qwen2audio_train.training.trainers.optimizers import build_optimizer
from qwen2audio_train.training.trainers.resumed import CONFIG_FILE, ResumedTrainer
from qwen2audio_train.training.trainers.speed import Flops, Meter, StepCounts, counts_of, flops_of

logger = logging.get_logger(__name__)


HELD_OUT_COUNTS = frozenset({"eval_examples", "eval_too_long", "eval_quarantined"})
"""What every evaluation says of its examples; see `PackedTrainer.held_out_counts`."""


class PlansDiffer(UserError):
    """Ranks have planned different examples for the same step."""


@dataclass
class RunFiles:
    """What a checkpoint holds besides tensors, and how its weights' tokenizer and feature extractor are saved."""

    config_yaml: str
    lineage: dict[str, Any]
    save_processor: Callable[[Path], None]


class PackedTrainer(GuardedTrainer, ResumedTrainer):
    """Mixin; see the module's docstring.

    Args:
        peak_flops: operations per second that a device can do, for the MFU in log lines; None leaves it out.
    """

    reference_forwards: int = 0
    """Forwards of a reference model beside each forward of the policy."""

    def __init__(
        self,
        *args: Any,
        loader: BatchLoader[Any],
        files: RunFiles,
        eval_batches: Callable[[], PackLoader] | None = None,
        rates: OptimizerConfig | None = None,
        peak_flops: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.rates = rates or OptimizerConfig()
        self.loader = loader
        self.files = files
        self.eval_batches = eval_batches
        self.meter = Meter()
        self.peak_flops = peak_flops
        self.flops: Flops | None = None
        self.data_ended = False
        # Trainer refuses an evaluation interval without a data set; ours come from `eval_batches`.
        kwargs.setdefault("eval_dataset", [] if eval_batches is not None else None)
        super().__init__(*args, max_skipped_steps=self.rates.max_skipped_steps, **kwargs)
        if peak_flops:
            self.flops = flops_of(self.model, self.reference_forwards)
        # The loss is divided in compute_loss, once; this keeps every supported Trainer from dividing it again.
        self.model_accepts_loss_kwargs = True

    @override
    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of `trainer.optim` over groups with a learning rate per module."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.args, self.model, self.rates)
        return self.optimizer

    @override
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of `trainer.lr_scheduler_type`, with parts that wait or stop."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        freeze_by_step(scheduler, self.rates)
        return scheduler

    def held_out_figures(self) -> set[str]:
        """Patterns of the figures that every evaluation logs; none where there is nothing to evaluate."""
        return {"eval_loss", *HELD_OUT_COUNTS} if self.eval_batches is not None else set()

    # Batches ----------------------------------------------------------------------------------------------------------

    @override
    def get_train_dataloader(self) -> Any:
        """The packs of this rank, as they are: `accelerator.prepare` would deal them out a second time."""
        return self.loader

    @override
    def _prepare_input(self, data: Any) -> Any:
        """Move tensors to the device, without waiting for what it has yet to do, and no more.

        Trainer would cast all floats under DeepSpeed, and labels would count by weights that are rounded to bfloat16,
        while their sum is that of the weights as they were. The model casts the mel itself.
        """
        if isinstance(data, Tensor):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    @override
    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """All micro-batches of one step on this rank, and the sum of the step's weights over all ranks.

        Raises:
            TooManyBadExamples: there is nothing to learn in the very first step.
        """
        batches = self._read(epoch_iterator, num_batches)
        counts = self._note(batches, device)
        if batches and counts.weight == 0 and self.state.global_step == 0:
            listed = Path(str(self.args.output_dir)) / "bad_examples.rank*.jsonl"
            raise TooManyBadExamples(f"no example of the first step could be used; {listed} says why")
        return batches, torch.tensor(counts.weight, device=device)

    def _read(self, epoch_iterator: Iterator[Any], num_batches: int) -> list[Any]:
        """The loader's batches of a step; none when the data have ended."""
        started = time.perf_counter()
        batches = list(islice(epoch_iterator, num_batches))
        self.meter.waited_s += time.perf_counter() - started
        if not batches:
            self._end_with_the_data()
        return batches

    def _note(self, batches: list[dict[str, Tensor]], device: Any) -> StepCounts:
        """Count a step, for its loss and for the next log line."""
        self.step = self._count(batches, device) if batches else StepCounts()
        self.meter.add(self.step)
        return self.step

    def _end_with_the_data(self) -> None:
        """Every source has been read as often as it may be: end as after `max_steps`."""
        self.data_ended = True
        self.control.should_training_stop = self.control.should_log = True
        here = [line for line in self.state.log_history if line["step"] == self.state.global_step]
        evaluated = any("eval_loss" in line or "eval_reward" in line for line in here)
        self.control.should_evaluate = self.args.eval_strategy == "steps" and not evaluated

    def _count(self, batches: list[Any], device: Any) -> StepCounts:
        rows = [counts_of(batch, self.flops) for batch in batches]
        own = float(self.loader.plan)
        total = torch.tensor([*torch.tensor(rows, dtype=torch.float64).sum(0), own], dtype=torch.float64)
        *counts, plans = self.sum_over_ranks(total, device).tolist()
        if plans != own * self.args.world_size:
            raise PlansDiffer(
                f"step {self.state.global_step + 1}: rank {self.args.process_index} has planned other examples than "
                "other ranks; manifests, recipe and indexes (data.cache_dir) have to be the same on all machines"
            )
        return StepCounts(*counts)

    def other_tokens(self, count: int) -> Tensor | None:
        """Tokens that stand for the whole vocabulary when this step reads audio embeddings, on every rank alike."""
        head = unwrap(self.model).ctc_head
        return None if head is None else head.draw(count, self.args.seed * 2**32 + self.state.global_step)

    @override
    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Trainer's estimate assumes dense rows; the cost model counts what a packed step really does."""
        return 0

    def report(self, metrics: dict[str, float], batches: PackLoader | None, prefix: str) -> dict[str, float]:
        """End an evaluation: its figures with the counts of what they are of, logged and shown to the callbacks."""
        metrics |= {} if batches is None else self.held_out_counts(batches, prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_counts(self, batches: PackLoader, prefix: str) -> dict[str, float]:
        """How many held-out examples the figures are of, when all their batches were run.

        `examples` are those that count, `too_long` those among them beyond the budget of training, and `quarantined`
        those that could not be used.
        """
        seen = batches.seen()
        unusable = int(self.sum_over_ranks(torch.tensor([float(seen.unusable)], dtype=torch.float64)))
        quarantined = seen.bad_lines + unusable
        if quarantined and self.args.should_save:
            listed = Path(str(self.args.output_dir)) / "bad_eval_examples.rank*.jsonl"
            logger.warning_once(f"{quarantined} held-out examples could not be used and are in no figure; see {listed}")
        counts = {"examples": seen.planned - unusable, "too_long": seen.too_long, "quarantined": quarantined}
        return {f"{prefix}_{name}": float(count) for name, count in counts.items()}

    # Log --------------------------------------------------------------------------------------------------------------

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add throughput and the loader's own figures to a training log line."""
        if "loss" in logs:
            logs = {name: value for name, value in self.guard.correct(logs).items() if math.isfinite(value)}
            logs |= self.meter.figures(
                steps_left=self.state.max_steps - self.state.global_step,
                peak_flops=(self.peak_flops or 0.0) * self.args.world_size,
            )
            logs |= {f"data/{name}": value for name, value in self.loader.telemetry.take().items()}
            self.meter = Meter()
        super().log(logs, start_time)
        self.state.log_history[-1].pop("epoch", None)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    @override
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint aside and seal it; the oldest is dropped when a finite step has followed.

        Raises:
            Diverged: the weights are no numbers.
            CheckpointError: it could not be written, for example because the disk is full; the earlier ones are left.
        """
        run_dir = Path(str(self.args.output_dir))
        target = run_dir / f"checkpoint-{self.state.global_step}"
        if not self.may_save():
            return
        self.watchdog.alive()
        self._look_for_room(target)
        try:
            self._write_checkpoint(target.with_suffix(writing.PARTIAL))
            if self.args.should_save:
                writing.seal(target.with_suffix(writing.PARTIAL), target)
        except (OSError, SafetensorError) as error:
            raise writing.write_failure(target, error) from error
        self.guard.unproven = target
        self._wait()

    def _look_for_room(self, target: Path) -> None:
        """Delete what interrupted saves left. Raises CheckpointError, on all ranks, where the disk is too full."""
        short = None
        if self.args.should_save:
            writing.drop_partials(target.parent)
            own = None if self.is_deepspeed_enabled else self.optimizer
            least = writing.least_size(self.model, own, trained_only=is_peft_model(self.model))
            short = writing.shortage(target.parent, least)
        if float(self.sum_over_ranks(torch.tensor([float(short is not None)], dtype=torch.float64))) > 0:
            raise writing.write_failure(target, short or "rank 0 says why")

    def _write_checkpoint(self, partial: Path) -> None:
        if self.args.should_save:
            partial.mkdir(parents=True)
        self._wait()
        self._save_weights(partial)
        self._save_training_state(partial)
        data_state = self.loader.state_dict(self.state.global_step)  # on every rank: streams put theirs together
        if self.args.should_save:
            self._save_run_files(partial, data_state)
        self._wait()

    def save_final_checkpoint(self) -> None:
        """A checkpoint of the last step, unless the save interval has just written one."""
        if not (Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}" / folders.MANIFEST).is_file():
            self._save_checkpoint(self.model, None)
        self.rotate()

    def _save_weights(self, partial: Path) -> None:
        state = self._weights()
        if self.args.should_save:
            folder = partial / (folders.ADAPTER_FOLDER if is_peft_model(self.model) else folders.MODEL_FOLDER)
            own = state or self.model.state_dict()
            # save_pretrained drops from what it is given the names that are not to be saved: it gets a copy
            written = None if state is None else dict(state)
            (self.model if is_peft_model(self.model) else unwrap(self.model)).save_pretrained(
                folder, state_dict=written
            )
            self.files.save_processor(folder)
            if unwrap(self.model).ctc_head is not None:
                save_file({name: own[name].contiguous() for name in own if name.startswith(HEAD)}, partial / HEAD_FILE)

    def _weights(self) -> dict[str, Tensor] | None:
        """Copies that the saving rank writes; None: the weights as they are.

        An engine's are views of a flat buffer, or cut up.
        """
        if not self.is_deepspeed_enabled:
            return None
        adapter = is_peft_model(self.model)
        saved = self.model if adapter else unwrap(self.model)
        return whole_state(saved, self.args.should_save, trained_only=adapter)

    def _save_training_state(self, partial: Path) -> None:
        (partial / "rng").mkdir(exist_ok=True)
        self._save_rng_state(str(partial / "rng"))
        (partial / optimizer_state.FOLDER).mkdir(exist_ok=True)
        sharded = self.is_deepspeed_enabled and self.model_wrapped.zero_optimization_stage() > 0
        if self.args.should_save or sharded:
            folder, rank = partial / optimizer_state.FOLDER, self.args.process_index
            optimizer_state.save_optimizer(self.model, self._whose_state(), folder, rank)
        if self.args.should_save:
            writing.save_state(self.lr_scheduler.state_dict(), partial / "scheduler.pt")

    def _save_run_files(self, partial: Path, data_state: dict[str, Any]) -> None:
        self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
        (partial / "data_state.json").write_text(json.dumps(data_state, indent=1))
        (partial / CONFIG_FILE).write_text(self.files.config_yaml)
        (partial / "lineage.json").write_text(json.dumps(self.files.lineage, indent=1))
