"""Ranks whose packs hold different kinds of examples run the same collectives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.mixed_worker import met
from tests.distributed.ranks import run_ranks
from tests.noise import write_noise


@pytest.mark.slow
def test_text_beside_audio_and_both_under_zero_3_never_hang(tmp_path: Path) -> None:
    """Each kind of pack meets each other; the watchdog would end a run that waits for two minutes."""
    write_noise(tmp_path)
    run_ranks("tests.distributed.mixed_worker", tmp_path, "60", timeout_s=600)
    found = met(tmp_path)
    assert sum(found.values()) == 60
    assert {"audio + text", "mixed + audio", "mixed + text"} <= found.keys()
