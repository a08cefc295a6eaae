"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.noise import write_noise


@pytest.fixture(scope="session")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the manifests that `runs.recipe` reads."""
    return write_noise(tmp_path_factory.mktemp("noise"))
