"""A sample of the faults, drawn by a seed: `python -m tests.chaos` draws more of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.faults import KINDS, draw
from tests.chaos.fuzz import Audit, fuzz
from tests.chaos.hosts import CANNOT
from tests.distributed.ranks import ROOT
from tests.noise import write_noise


def test_every_kind_is_drawn_and_one_rank_alone_is_never_made_to_stand_still() -> None:
    kinds = [next(fault) for fault in [draw(0, "two", 2)] for _ in range(sum(KINDS.values()))]
    assert {fault.kind for fault in kinds} == set(KINDS)
    assert {fault.rank for fault in kinds} == {0, 1}
    alone = [next(fault) for fault in [draw(0, "one", 1)] for _ in range(sum(KINDS.values()))]
    assert {fault.kind for fault in alone} == set(KINDS) - {"sigstop_one"}


@pytest.mark.slow
def test_disturbed_runs_end_as_undisturbed_ones() -> None:
    """One rank, and two under ZeRO-2: the seed is one whose first four faults of each are all of another kind."""
    command = [sys.executable, "-m", "tests.chaos", "--minutes", "4", "--faults", "8", "--seed", "2088"]
    command += ["--jobs", "one", "zero2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["lost"], found["repeated"], found["hung"], found["weights_equal"]) == (0, 0, 0, True)
    assert sum(found["faults"].values()) >= 4
    assert len(found["faults"]) >= 3


@pytest.mark.slow
def test_a_line_that_is_cut_between_two_hosts_is_noticed_and_costs_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.hosts"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode == CANNOT:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights_equal"]
    assert 0 < found["noticed_s"] < found["limit_s"]


def test_damaged_inputs_are_refused_in_words(tmp_path: Path) -> None:
    found = fuzz(write_noise(tmp_path), 400, 1, Audit())
    assert (found["unclear"], found["forbidden"], found["bounded"]) == ([], [], True)
    assert min(found["refused"].values()) > 50


def test_the_audit_sees_what_it_looks_for(tmp_path: Path) -> None:
    audit = Audit()
    (tmp_path / "in").mkdir()
    with audit.watching(tmp_path / "in"):
        (tmp_path / "in" / "a").write_text("")
        assert audit.seen == []
        (tmp_path / "b").write_text("")
        os.rename(tmp_path / "in" / "a", tmp_path / "c")
    (tmp_path / "d").write_text("")
    assert [event.split()[0] for event in audit.seen] == ["open", "os.rename"]
