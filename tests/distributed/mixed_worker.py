"""One rank of a ZeRO-3 run whose packs hold audio, text or both:  run_ranks(this module, OUT, STEPS)

Each rank writes what its packs held, step by step, to OUT/kinds.rankN.json.
Without arguments, `python -m tests.distributed.mixed_worker` runs 500 steps on two ranks and prints what met.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

RANKS, STEPS = 2, 500
KINDS = {(): "filler", (0,): "audio", (1,): "text", (0, 1): "mixed"}
"""By the sources of a pack's labels."""


def train(out: Path, steps: int) -> None:
    from accelerate import PartialState

    from tests.runs import build_trainer, fit, recipe

    changes = ("deepspeed.stage=3", f"trainer.max_steps={steps}", "trainer.lr_scheduler_type=constant_with_warmup")
    data = ("data.tokens_per_pack=90", f"data.packs_per_step={RANKS}", "watchdog_s=120", "trainer.ddp_timeout=120")
    config = recipe(out, out / "run", *changes, *data, sources=("speech", "text"))
    trainer = build_trainer(config)
    kinds: list[str] = []
    get = trainer.get_batch_samples

    def seen(*args: Any) -> Any:
        batches, weight = get(*args)
        batches = list(batches)
        kinds.extend(KINDS[tuple(sorted(set(batch["source_id"].tolist())))] for batch in batches)
        return batches, weight

    trainer.get_batch_samples = seen  # type: ignore[method-assign]
    fit(trainer, config)
    assert len(kinds) == trainer.state.global_step == steps
    (out / f"kinds.rank{PartialState().process_index}.json").write_text(json.dumps(kinds))


def met(out: Path) -> dict[str, int]:
    """How often which kinds of packs were in one step, the first rank's first."""
    ranks = [json.loads((out / f"kinds.rank{rank}.json").read_text()) for rank in range(RANKS)]
    return dict(Counter(" + ".join(kinds) for kinds in zip(*ranks, strict=True)).most_common())


def main() -> None:
    from tests.distributed.ranks import run_ranks
    from tests.noise import write_noise

    with tempfile.TemporaryDirectory() as folder:
        write_noise(Path(folder))
        run_ranks("tests.distributed.mixed_worker", folder, str(STEPS), world=RANKS)
        print(json.dumps({"steps": STEPS, "met": met(Path(folder))}))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main()
