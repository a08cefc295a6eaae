"""The state of the data: where the next slot is, bound to everything that decides what it holds.

A state is exact: with the same inputs the next batch is the one that would have followed. When an input has changed
it is refused, saying what differs; or, asked for by name, the run goes on with a weaker promise: what was drawn from
every unchanged source stays drawn, so that each source's pass is completed without loss or repetition.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen2audio_train.config.data import OnChangedData
from qwen2audio_train.data.order.mixture import MixedSource, Mixture
from qwen2audio_train.data.order.planner import CARRIED, Cursor, Planner
from qwen2audio_train.errors import UserError

STATE_VERSION = 1

FIXED = ("seed", "order")
"""Without these the examples already drawn are unknown: a change of them is always refused."""


class DataStateError(UserError):
    """A saved state of the data does not fit what the recipe now says."""


def save_state(planner: Planner, packs_per_step: int, step: int, cursor: Cursor) -> dict[str, Any]:
    """A small JSON object: some 300 bytes, 150 for every source, and after a change of data the rest of its window."""
    inputs = inputs_of(planner, packs_per_step)
    state: dict[str, Any] = {"version": STATE_VERSION, "step": step, **dataclasses.asdict(cursor)}
    if any(planner.mixture.first_draw):
        state["draws"] = dict(zip(planner.names, planner.mixture.first_draw, strict=True))
    if cursor.window == CARRIED:
        state["carried"] = planner.carried.tolist()
    return state | {"plan_hash": plan_hash(inputs), "inputs": inputs}


def restore(
    planner: Planner, packs_per_step: int, state: Mapping[str, Any], on_changed: OnChangedData
) -> tuple[Planner, Cursor]:
    """The planner and the cursor that go on after a saved state.

    Raises:
        DataStateError: the state is of another version, or an input has changed and `on_changed` does not allow it.
    """
    changed = changed_inputs(state, inputs_of(planner, packs_per_step))
    cursor = Cursor(state["epoch"], state["window"], state["slot"])
    if not changed:
        draws = tuple(state.get("draws", {}).get(name, 0) for name in planner.names)
        return _started(planner, draws, state.get("carried", [])), cursor
    fixed = [line for line in changed if line.startswith(FIXED)]
    if on_changed is OnChangedData.go_on and not fixed:
        return _go_on(planner, state, cursor)
    weaker = "" if fixed else ", or set data.on_changed_data=go_on to complete every source's pass in another order"
    raise other_data(fixed or changed, weaker)


def changed_inputs(state: Mapping[str, object], inputs: Mapping[str, object]) -> list[str]:
    """What differs between the inputs of a saved state and those of now, one line each.

    Raises:
        DataStateError: the state is of another version.
    """
    if state.get("version") != STATE_VERSION:
        raise DataStateError(f"a data state of version {state.get('version')}; this is version {STATE_VERSION}")
    return differences(state["inputs"], json.loads(json.dumps(inputs)))


def other_data(changed: Sequence[str], advice: str = "") -> DataStateError:
    """What to say of changed inputs; `advice` is a further way out."""
    listed = "".join(f"\n  {line}" for line in changed)
    return DataStateError(
        f"the data are not those that the state was saved with, so it cannot be resumed exactly:{listed}\n"
        f"Put them back as they were{advice}, or start a new run from the checkpoint's weights."
    )


def inputs_of(planner: Planner, packs_per_step: int) -> dict[str, Any]:
    """Everything that decides which examples a step holds."""
    return {**planner.inputs(), "packs_per_step": packs_per_step}


def plan_hash(inputs: Mapping[str, object]) -> str:
    return hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=16).hexdigest()


def differences(then: object, now: object, path: str = "") -> list[str]:
    """What differs between two nested dicts, one line per leaf."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [*then, *(key for key in now if key not in then)]
        pairs = [(then.get(key), now.get(key), f"{path}.{key}".lstrip(".")) for key in keys]
        return [line for pair in pairs for line in differences(*pair)]
    return [] if then == now else [f"{path}: {then!r} when saved, {now!r} now"]


def _started(planner: Planner, draws: tuple[int, ...], carried: object) -> Planner:
    rows = np.array(carried, dtype=np.int64).reshape(-1, 3)
    return dataclasses.replace(planner, mixture=dataclasses.replace(planner.mixture, first_draw=draws), carried=rows)


def _go_on(planner: Planner, state: Mapping[str, Any], cursor: Cursor) -> tuple[Planner, Cursor]:
    """A plan that begins with what is left of the old plan's window and goes on where every source stood.

    If the old window cannot be planned again, as its sources have changed, the whole of it is drawn once more.
    """
    old, then, now = state["inputs"], state["inputs"]["sources"], planner.inputs()["sources"]
    same_order = {n for n, s in then.items() if n in now and all(s[k] == now[n][k] for k in ("content", "examples"))}
    same_packs = all(n in same_order and s["index"] == now[n]["index"] for n, s in then.items())
    mixture = Mixture(
        tuple(MixedSource(n, s["examples"], s["probability"], s["epochs"]) for n, s in then.items()),
        old["seed"],
        first_draw=tuple(state.get("draws", {}).get(name, 0) for name in then),
    )
    whole_windows = cursor.window + 1 if same_packs else max(cursor.window, 0)
    position = min(whole_windows * old["window_examples"], mixture.epoch_size(cursor.epoch))
    drawn = dict(zip(then, mixture.draws_at(cursor.epoch, position).tolist(), strict=True))
    draws = tuple(drawn[name] if name in same_order else 0 for name in planner.names)
    carried = _rest_of_window(planner, state, cursor, mixture) if same_packs else []
    return _started(planner, draws, carried), Cursor(0, CARRIED if carried else 0, 0)


def _rest_of_window(planner: Planner, state: Mapping[str, Any], cursor: Cursor, mixture: Mixture) -> list[list[int]]:
    """Examples of the started window that no step has had yet, as rows of the new planner."""
    old = state["inputs"]
    number = {name: i for i, name in enumerate(planner.names)}
    order = [number[source.name] for source in mixture.sources]
    sources = tuple(
        dataclasses.replace(planner.mixture.sources[i], probability=source.probability, max_passes=source.max_passes)
        for i, source in zip(order, mixture.sources, strict=True)
    )
    then = Planner(
        dataclasses.replace(mixture, sources=sources, order=planner.mixture.order),
        tuple(planner.indexes[i] for i in order),
        tokens_per_pack=old["tokens_per_pack"],
        window_examples=old["window_examples"],
        samples_per_pack=old["samples_per_pack"],
        max_tokens=old["max_tokens_per_example"],
        carried=np.array(state.get("carried", []), dtype=np.int64).reshape(-1, 3),
    )
    if cursor.window >= then.num_windows(cursor.epoch):
        return []
    packs, _ = then.window(cursor.epoch, cursor.window)
    return [[order[s], p, e] for pack in packs[cursor.slot :] for s, p, e in pack.rows.tolist()]
