"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the library is imported; or what is not there is asked for five times

import pytest
import torch

from tests.noise import write_noise

torch.set_num_threads(1)  # models this small lose more to waiting for a second thread than it computes


@pytest.fixture(scope="session")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the manifests that `runs.recipe` reads."""
    return write_noise(tmp_path_factory.mktemp("noise"))
