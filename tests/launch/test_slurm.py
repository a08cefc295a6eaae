"""The Slurm templates, with Slurm's commands replaced by scripts that say how they were called."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "launch/slurm/train.sbatch"


def run_template(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    for name, script in {
        "srun": 'printf "%s\\n" "threads=$OMP_NUM_THREADS" "$@"',
        "scontrol": 'case $1 in show) echo node-a; echo node-b;; *) echo "scontrol $*";; esac',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "42"}
    kept = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "PYTHON")}
    command = ["bash", str(TEMPLATE), *arguments]
    env = kept | slurm | environment | {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_each_machine_gets_one_torchrun_that_meets_on_the_first(tmp_path: Path) -> None:
    done = run_template(tmp_path, "sft", "name=x", "seed=1", SLURM_GPUS_ON_NODE="8", SLURM_CPUS_PER_TASK="64")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "threads=8", "--kill-on-bad-exit=1", ".venv/bin/python", "-m", "torch.distributed.run", "--nnodes=2",
        "--nproc-per-node=8", "--max-restarts=3", "--shutdown-timeout=280",
        "--rdzv-backend=c10d", "--rdzv-id=42", "--rdzv-endpoint=node-a:29500", "launch/sft.py",
        "name=x", "seed=1",
    ]  # fmt: skip


@pytest.mark.parametrize(("cpus", "threads"), [("64", "8"), ("4", "1")])
def test_threads_are_shared_among_the_processes(tmp_path: Path, cpus: str, threads: str) -> None:
    done = run_template(tmp_path, "dpo", NPROC_PER_NODE="8", SLURM_CPUS_PER_TASK=cpus)
    assert done.stdout.splitlines()[0] == f"threads={threads}"


def test_a_stage_must_be_named(tmp_path: Path) -> None:
    done = run_template(tmp_path)
    assert done.returncode != 0
    assert "usage: sbatch" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_whose_time_is_over_saves_and_is_requeued(number: signal.Signals, tmp_path: Path) -> None:
    """One that is cancelled saves too, and stays cancelled."""
    waits = 'trap "echo saved; exit 1" TERM; echo running; while :; do sleep 0.05; done'
    for name, script in {"srun": waits, "scontrol": 'echo "scontrol $*"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "42"}
    env = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(["bash", str(TEMPLATE), "sft"], env=env, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "running\n"
        job.send_signal(number)
        output, _ = job.communicate(timeout=60)
    assert job.returncode == 75
    assert output.splitlines() == ["saved", *(["scontrol requeue 42"] if number == signal.SIGUSR1 else [])]


def test_a_chain_starts_each_stage_from_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text(f"""#!/bin/bash
echo "$@" >> {tmp_path}/calls
echo "$((40 + $(wc -l < {tmp_path}/calls)));cluster"
""")
    (tmp_path / "sbatch").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(TEMPLATE.parent / "chain.sh"), "big", "--account=me", "--", "data=none"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "sft: job 42, run folder runs/big/sft"
    first, second, third = (tmp_path / "calls").read_text().splitlines()
    folder = TEMPLATE.parent
    assert first == (
        f"--parsable --job-name=big-pretrain --account=me {folder}/pretrain.sbatch name=big-pretrain "
        "run_dir=runs/big/pretrain data=none"
    )
    assert "--dependency=afterok:41 --kill-on-invalid-dep=yes" in second
    assert third.endswith("dpo.sbatch name=big-dpo run_dir=runs/big/dpo init_from=runs/big/sft data=none")


def test_the_stages_of_the_templates_exist() -> None:
    stages = {path.stem for path in TEMPLATE.parent.glob("*.sbatch")} - {"train"}
    assert stages == {"encoder", "pretrain", "sft", "dpo", "grpo"}
    assert all((ROOT / "launch" / f"{stage}.py").is_file() for stage in stages)
    for path in TEMPLATE.parent.iterdir():
        subprocess.run(["bash", "-n", str(path)], check=True)
