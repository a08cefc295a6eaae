"""What a stored measurement says besides its figures: the machine and the versions."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "numpy")


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, and GPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Of the packages that compute."""
    return {package: version(package) for package in PACKAGES}


def save(name: str, figures: dict[str, Any]) -> Path:
    """Write `figures` to `results/<name>.json` with the machine and the versions of what computed."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    stored = {"machine": machine(), "versions": versions(), **figures}
    path.write_text(json.dumps(stored, indent=1) + "\n")
    return path
