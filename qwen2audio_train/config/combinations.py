"""The one table of what may be combined: ZeRO stage x adapter x offload x compile x weights x bf16 x optimizer.

The schema refuses what no row allows and names the nearest choice that is allowed; `docs/combinations.md` prints it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ADAMW = frozenset({"adamw_torch", "adamw_torch_fused"})
ADAMW_8BIT = frozenset({"adamw_bnb_8bit", "paged_adamw_8bit"})
ADAMW_BF16 = frozenset({"adamw_bf16_kahan", "adamw_bf16_stochastic"})
"""Ours, for weights that are stored in bfloat16 and have no float32 copy: see `training/trainers/optimizers.py`."""
ADAMW_OFFLOADED = frozenset({"deepspeed_cpu_adam"})
"""DeepSpeed's AdamW for states on the host: several times as fast there as torch's, compiled at its first use."""
OWN_OPTIMIZERS = ADAMW_BF16 | ADAMW_OFFLOADED
"""Names that Trainer does not know."""
OTHERS = frozenset({"sgd", "adafactor"})
ANY = ADAMW | OTHERS


@dataclass(frozen=True)
class Combination:
    """One row: every choice of a column goes with every choice of the others."""

    zero: frozenset[str]
    adapter: frozenset[str]
    offload: frozenset[str]
    compile: frozenset[str]
    weights: frozenset[str]
    bf16: frozenset[str]
    optimizer: frozenset[str]
    note: str


def _row(columns: str, optimizer: frozenset[str], note: str) -> Combination:
    """A row from its columns but for the last two, divided by `|`."""
    zero, adapter, offload, compiled, weights, bf16 = (frozenset(column.split()) for column in columns.split("|"))
    return Combination(zero, adapter, offload, compiled, weights, bf16, optimizer, note)


GPU = "needs bitsandbytes and a GPU; untested"
OFFLOAD = ADAMW_OFFLOADED | {"adamw_torch"}

COMBINATIONS = (
    _row("none 1 2 3 | none lora | none | false | float32 | false true", ANY, "tested on CPU with two ranks"),
    _row("none 1 2 | none lora | none | true | float32 | false true", ANY, "ZeRO-3 gathers inside compiled blocks"),
    _row(
        "0 | none lora | none | false true | float32 | false",
        ANY,
        "in bfloat16 DeepSpeed makes an empty step first, and AdamW corrects its bias for one too many",
    ),
    _row(
        "1 2 3 | none lora | none | false | bfloat16 | true", ANY, "DeepSpeed keeps float32 copies of trained weights"
    ),
    _row("1 2 | none lora | none | true | bfloat16 | true", ANY, "the same, compiled; untested"),
    _row("none | lora | none | false true | bfloat16 | false true", ANY, "the adapter is trained in float32"),
    _row(
        "none | none | none | false true | bfloat16 | false true",
        ADAMW_BF16,
        "no float32 copy, nothing rounded away; any other optimizer would stall",
    ),
    _row(
        "none | none | none | false | float32 | false true",
        ADAMW_8BIT,
        "needs bitsandbytes; its step was tried on a CPU",
    ),
    _row("none | lora qlora | none | false | float32 bfloat16 | false true", ADAMW_8BIT, GPU),
    _row("0 1 2 | none lora qlora | none | false | float32 | false", ADAMW_8BIT, GPU),
    _row("1 2 | none lora qlora | none | false | float32 bfloat16 | true", ADAMW_8BIT, GPU),
    _row("none | qlora | none | false | float32 bfloat16 | false true", ADAMW, GPU),
    _row("0 1 2 | qlora | none | false | float32 | false", ADAMW, GPU),
    _row("1 2 | qlora | none | false | float32 bfloat16 | true", ADAMW, GPU),
    _row("1 2 3 | none | optimizer | false | float32 | false", OFFLOAD, "tested on CPU with two ranks"),
    _row("3 | none | parameters both | false | float32 | false", OFFLOAD, "tested on CPU with two ranks"),
    _row("1 2 3 | lora | optimizer | false | float32 | false", OFFLOAD, "of these, some were tried"),
    _row("3 | lora | parameters both | false | float32 | false", OFFLOAD, "of these, some were tried"),
    _row("1 2 3 | none lora | optimizer | false | float32 bfloat16 | true", OFFLOAD, "of these, some were tried"),
    _row("3 | none lora | parameters both | false | float32 bfloat16 | true", OFFLOAD, "of these, some were tried"),
)

KEYS = {
    "zero": "deepspeed.stage",
    "adapter": "adapter.kind",
    "offload": "deepspeed.offload_optimizer / deepspeed.offload_parameters",
    "compile": "model.compile",
    "weights": "model.dtype",
    "bf16": "trainer.bf16",
    "optimizer": "trainer.optim",
}


def allowed(choice: Mapping[str, str]) -> bool:
    """Whether a row of the table holds `choice`, one value per column."""
    return any(all(choice[name] in getattr(row, name) for name in KEYS) for row in COMBINATIONS)


def refusal(choice: Mapping[str, str]) -> str | None:
    """Why `choice` is not allowed, with the nearest that is: every single change that mends it, or else the row that
    needs the fewest. None when it is allowed."""
    if allowed(choice):
        return None
    single = {name: [v for v in _values(COMBINATIONS, name) if allowed({**choice, name: v})] for name in KEYS}
    remedy = "; or ".join(_one_of(name, values) for name, values in single.items() if values)
    if not remedy:
        rows = [[name for name in KEYS if choice[name] not in getattr(row, name)] for row in COMBINATIONS]
        changed, row = min(zip(rows, COMBINATIONS, strict=True), key=lambda pair: len(pair[0]))
        remedy = " and ".join(_one_of(name, _values([row], name)) for name in changed)
    found = ", ".join(f"{KEYS[name]}={choice[name]}" for name in KEYS)
    return f"this combination is not supported: {found}. The nearest that is: {remedy}"


def _values(rows: Iterable[Combination], column: str) -> list[str]:
    return sorted(set().union(*(getattr(row, column) for row in rows)))


def _one_of(column: str, values: list[str]) -> str:
    return f"{KEYS[column]}={values[0]}" if len(values) == 1 else f"{KEYS[column]} one of {', '.join(values)}"


def table() -> str:
    """The table in Markdown, as the documentation shows it."""
    head = ["ZeRO", "adapter", "offload", "compile", "weights", "bf16", "optimizer", "note"]
    rows = [head, ["---"] * len(head)]
    for row in COMBINATIONS:
        sets = [getattr(row, name) for name in KEYS]
        rows.append([" ".join(sorted(choices)) for choices in sets] + [row.note])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
