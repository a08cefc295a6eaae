"""The one table of what may be combined: ZeRO stage x adapter x offload x compile x optimizer.

The schema refuses what no row allows and names the nearest choice that is allowed; `docs/combinations.md` prints it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ADAMW = frozenset({"adamw_torch", "adamw_torch_fused"})
ADAMW_8BIT = frozenset({"adamw_bnb_8bit", "paged_adamw_8bit"})
OTHERS = frozenset({"sgd", "adafactor"})


@dataclass(frozen=True)
class Combination:
    """One row: every choice of a column goes with every choice of the others."""

    zero: frozenset[str]
    adapter: frozenset[str]
    offload: frozenset[str]
    compile: frozenset[str]
    optimizer: frozenset[str]
    note: str


def _row(zero: str, adapter: str, offload: str, compile: str, optimizer: frozenset[str], note: str) -> Combination:
    sets = [frozenset(column.split()) for column in (zero, adapter, offload, compile)]
    return Combination(sets[0], sets[1], sets[2], sets[3], optimizer, note)


COMBINATIONS = (
    _row("none 0 1 2 3", "none lora", "none", "false", ADAMW | OTHERS, "tested on CPU with two ranks"),
    _row(
        "none 0 1 2",
        "none lora",
        "none",
        "true",
        ADAMW | OTHERS,
        "ZeRO-3 gathers inside compiled blocks: not allowed",
    ),
    _row("none 0 1 2", "none lora qlora", "none", "false", ADAMW_8BIT, "needs bitsandbytes and a GPU; untested"),
    _row("none 0 1 2", "qlora", "none", "false", ADAMW, "needs bitsandbytes and a GPU; untested"),
    _row(
        "1 2 3",
        "none lora",
        "optimizer",
        "false",
        frozenset({"adamw_torch"}),
        "DeepSpeed's CPU Adam; untested",
    ),
    _row("3", "none lora", "parameters both", "false", frozenset({"adamw_torch"}), "untested"),
)

KEYS = {
    "zero": "deepspeed.stage",
    "adapter": "adapter.kind",
    "offload": "deepspeed.offload_optimizer / deepspeed.offload_parameters",
    "compile": "model.compile",
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
    head = ["ZeRO", "adapter", "offload", "compile", "optimizer", "note"]
    rows = [head, ["---"] * len(head)]
    for row in COMBINATIONS:
        sets = [getattr(row, name) for name in KEYS]
        rows.append([" ".join(sorted(choices)) for choices in sets] + [row.note])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
