"""ms-swift and LLaMA-Factory on the clips of `workload.py`, each in an environment of its own.

    python -m venv benchmarks/external/ms-swift      && benchmarks/external/ms-swift/bin/pip install ms-swift
    python -m venv benchmarks/external/llama-factory && benchmarks/external/llama-factory/bin/pip install llamafactory
    python benchmarks/external/others.py --sets lognormal

Untested: written from the tools' documentation (ms-swift 3, LLaMA-Factory 0.9) and not run yet. A tool whose
environment is missing is skipped with a line that says so.

Both wrap the prompt in their chat template and read the clips from WAV files, so a step has a few more tokens than in
`train_step.py` and its loss is another one; clips, targets, batch, optimiser, weights and precision are the same. All
parameters are trained. A step's time is the difference between a run of several steps and one of a single step, so
that loading is not in it.

The last line is JSON: seconds a step of every tool on every length set, null where it was skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import soundfile
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from workload import (  # noqa: E402
    CLIPS,
    LEARNING_RATE,
    LENGTH_SETS,
    MAX_GRAD_NORM,
    SHAPES,
    Workload,
    stock_model,
)

from qwen2audio_train.data.prompts.render import Text  # noqa: E402
from qwen2audio_train.families.qwen2_audio import QWEN2_AUDIO  # noqa: E402
from qwen2audio_train.layout import SAMPLING_RATE  # noqa: E402

ROUNDS = 3
TRAINING = {
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": MAX_GRAD_NORM,
    "optim": "adamw_torch_fused",
    "gradient_checkpointing": "false",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}
"""Arguments of transformers' Trainer, which both tools pass on."""


def ms_swift(folder: Path, options: argparse.Namespace, training: dict[str, Any]) -> list[str]:
    """`swift sft` on a JSON lines file."""
    arguments = training | {
        "model": folder / "model",
        "model_type": "qwen2_audio",
        "dataset": folder / "data.jsonl",
        "train_type": "full",
        "freeze_vit": "false",  # the audio tower is meant as well
        "freeze_aligner": "false",
        "torch_dtype": options.dtype,
        "attn_impl": "sdpa",
        "dataset_shuffle": "false",
        "train_dataloader_shuffle": "false",
        "split_dataset_ratio": 0,
        "check_model": "false",
        "output_dir": folder / "swift",
    }
    return ["swift", "sft", *(str(word) for name, value in arguments.items() for word in (f"--{name}", value))]


def llama_factory(folder: Path, options: argparse.Namespace, training: dict[str, Any]) -> list[str]:
    """`llamafactory-cli train` with all of its arguments on the command line."""
    arguments = training | {
        "model_name_or_path": folder / "model",
        "stage": "sft",
        "do_train": "true",
        "finetuning_type": "full",
        "freeze_vision_tower": "false",  # the audio tower is meant as well
        "freeze_multi_modal_projector": "false",
        "dataset_dir": folder,
        "dataset": "clips",
        "template": "qwen2_audio",
        "cutoff_len": 8192,
        "flash_attn": "sdpa",
        "disable_gradient_checkpointing": "true",
        "disable_shuffling": "true",
        "bf16": str(options.dtype == "bfloat16").lower(),
        "pure_bf16": str(options.dtype == "bfloat16").lower(),
        "output_dir": folder / "factory",
        "overwrite_output_dir": "true",
    }
    return ["llamafactory-cli", "train", *(str(word) for k, v in arguments.items() for word in (f"--{k}", v))]


TOOLS: dict[str, Callable[[Path, argparse.Namespace, dict[str, Any]], list[str]]] = {
    "ms-swift": ms_swift,
    "llama-factory": llama_factory,
}


def export(length_set: str, options: argparse.Namespace, folder: Path) -> None:
    """Model, processor, clips and both kinds of lists, repeated as often as the longest run needs."""
    workload = Workload(options, length_set, str(folder))
    stock_model(workload).save_pretrained(folder / "model")
    workload.processor.save_pretrained(folder / "model")
    rows = []
    for number, example in enumerate(workload.examples):
        path = folder / f"{number}.wav"
        soundfile.write(path, example.waveform, SAMPLING_RATE, subtype="FLOAT")
        texts = [piece for piece in example.rendered.trunk if isinstance(piece, Text)]
        prompt = "".join(t.text for t in texts if not t.is_label and t.text not in QWEN2_AUDIO.clip)
        target = "".join(t.text for t in texts if t.is_label).removesuffix(QWEN2_AUDIO.text_end)
        messages = [{"role": "user", "content": f"<audio>{prompt}"}, {"role": "assistant", "content": target}]
        rows.append({"messages": messages, "audios": [str(path)]})
    rows *= 1 + ROUNDS
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data.json").write_text(json.dumps(rows))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "audios": "audios"}
    clips = {"file_name": "data.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"clips": clips}))


def seconds_per_step(tool: str, length_set: str, folder: Path, options: argparse.Namespace) -> float | None:
    """Seconds of a step after the first, or None where the tool is not installed."""
    environment = HERE / tool
    if not environment.is_dir():
        print(f"{tool}: skipped, {environment.relative_to(HERE.parents[1])} is not there (see others.py)")
        return None
    took = []
    for steps in (1, 1 + ROUNDS):
        training = TRAINING | {"per_device_train_batch_size": CLIPS[length_set], "max_steps": steps}
        command = TOOLS[tool](folder, options, training)
        command[0] = str(environment / "bin" / command[0])
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}
        variables = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"} | hidden
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
        found = re.findall(r"train_runtime\W+([\d.]+)", done.stdout + done.stderr)
        if done.returncode or not found:
            sys.exit(f"{tool} failed with {done.returncode}:\n{done.stderr[-3000:]}")
        took.append(float(found[-1]))
    return (took[1] - took[0]) / ROUNDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the lognormal set alone")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--sets", nargs="+", choices=list(LENGTH_SETS), default=list(LENGTH_SETS))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    logging.disable_progress_bar()
    options.micro_batches = 1
    found: dict[str, dict[str, Any]] = {tool: {} for tool in TOOLS}
    for length_set in ["lognormal"] if options.quick else options.sets:
        with tempfile.TemporaryDirectory() as folder:
            export(length_set, options, Path(folder))
            for tool in TOOLS:
                found[tool][length_set] = seconds_per_step(tool, length_set, Path(folder), options)
    print(json.dumps({"seconds_per_step": found}))


if __name__ == "__main__":
    main()
