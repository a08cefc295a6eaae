"""Two hosts with a network of their own, which is cut in the middle of a run:  python -m tests.chaos.hosts  (as root)

The hosts are network namespaces joined by a pair of virtual interfaces; each runs torchrun as docs/multinode.md has it,
over one folder. Once the run has a checkpoint, the line between them is taken down, until both have noticed; then it
comes back, and each host starts its torchrun again where that has ended, as a scheduler would. Prints one line of JSON:
how many seconds it took until both had noticed, and whether the weights are those of a run that was not disturbed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NAMES = (f"first{os.getpid()}", f"second{os.getpid()}")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 29511
STEPS, SAVE_STEPS = 16, 2
STALLED_S = 15
"""Until a rank that gets no further prints where it is and ends."""
LIMIT_S = 600
CANNOT = 3
"""Exit status where this user may not make hosts."""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Hosts:
    """Two namespaces and the line between them, for as long as the context lasts.

    Raises:
        CalledProcessError: this user may not make them.
        FileNotFoundError: there is no iproute2.
    """

    def __enter__(self) -> Hosts:
        first, second = NAMES
        for name in NAMES:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", first, "link", "add", "line", "type", "veth", "peer", "name", "line", "netns", second)
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "line")
        self.join()
        return self

    def __exit__(self, *_: Any) -> None:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def cut(self) -> None:
        """Nothing goes through any more; what was open stays open, and silent."""
        ip("-n", NAMES[1], "link", "set", "line", "down")

    def join(self) -> None:
        for name in NAMES:
            ip("-n", name, "link", "set", "line", "up")


def torchrun(number: int, corpus: Path, run_dir: Path) -> subprocess.Popen[bytes]:
    """The job on host `number`; what it says goes on in hostN.log."""
    env = os.environ | {"GLOO_SOCKET_IFNAME": "line", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = ["ip", "netns", "exec", NAMES[number], sys.executable, "-m", "torch.distributed.run"]
    command += ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=job", "--max-restarts=3"]
    command += [f"--rdzv-endpoint={ADDRESSES[0]}:{PORT}", f"--local-addr={ADDRESSES[number]}"]
    command += [f"--rdzv-conf=is_host={number == 0}"]  # torchrun would look for a host name that has this address
    command += ["-m", "tests.chaos.hosts", "rank", str(corpus), str(run_dir)]
    with (run_dir / f"host{number}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)


def job(corpus: Path, run_dir: Path, hosts: Hosts, cut_after: int | None) -> float:
    """Run it to its end on both hosts; returns how many seconds after the cut both ranks had ended."""
    run_dir.mkdir()
    jobs = [torchrun(number, corpus, run_dir) for number in range(2)]
    ends, noticed, cut_at = time.monotonic() + LIMIT_S, 0.0, None
    try:
        while any(process.poll() != 0 for process in jobs):
            if time.monotonic() > ends:
                raise TimeoutError((run_dir / "host0.log").read_text()[-3000:])
            if cut_after is not None and cut_at is None and (run_dir / f"checkpoint-{cut_after}").is_dir():
                ranks = ranks_of(run_dir)
                hosts.cut()
                cut_at = time.monotonic()
            if cut_at is not None and not noticed and not set(ranks) & set(ranks_of(run_dir)):
                noticed = time.monotonic() - cut_at
                hosts.join()
            for number, process in enumerate(jobs):
                if process.poll() not in (None, 0):
                    jobs[number] = torchrun(number, corpus, run_dir)
            time.sleep(0.2)
    finally:
        for process in jobs:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return noticed


def ranks_of(run_dir: Path) -> list[int]:
    """Process ids of the living ranks of a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"rank" in words and str(run_dir).encode() in words and b"torch.distributed.run" not in words:
            found.append(int(path.parent.name))
    return found


def rank(corpus: Path, run_dir: Path) -> None:
    """One rank of the job, from its newest checkpoint on."""
    from tests.runs import build_trainer, fit, recipe

    steps = (f"trainer.max_steps={STEPS}", "trainer.save_strategy=steps", f"trainer.save_steps={SAVE_STEPS}")
    limits = (f"trainer.ddp_timeout={STALLED_S}", f"watchdog_s={STALLED_S}")
    config = recipe(corpus, run_dir, *steps, *limits)
    fit(build_trainer(config), config)


def weights(run_dir: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    files = sorted((run_dir / f"checkpoint-{STEPS}" / "model").glob("*.safetensors"))
    return {name: value for path in files for name, value in load_file(path).items()}


def main() -> dict[str, Any]:
    import torch

    from tests.noise import write_noise

    with tempfile.TemporaryDirectory(prefix="hosts-") as name, Hosts() as hosts:
        folder = Path(name)
        (folder / "corpus").mkdir()
        corpus = write_noise(folder / "corpus")
        job(corpus, folder / "whole", hosts, None)
        noticed = job(corpus, folder / "cut", hosts, SAVE_STEPS * 2)
        whole, cut = weights(folder / "whole"), weights(folder / "cut")
    equal = bool(whole) and whole.keys() == cut.keys() and all(torch.equal(cut[key], whole[key]) for key in whole)
    return {"noticed_s": round(noticed, 1), "limit_s": 2 * STALLED_S, "weights_equal": equal}


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        rank(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        try:
            print(json.dumps(main()))
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            print(f"no hosts can be made here ({error}): it takes root and iproute2")
            sys.exit(CANNOT)
