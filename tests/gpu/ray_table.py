"""Vectors of servers over two Ray nodes of one GPU each, both on this machine, against those of one GPU.

    python3 -m tests.gpu.ray_table --out DIR

Needs Ray beside vLLM, and two GPUs. Writes DIR/parallel.json, DIR/parallel.md and DIR/failures.log, as
tests.gpu.parallel_table does, and exits 1 if a limit is broken or a case failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from gonka_poc.cli.server_process import free_port
from tests.gpu.parallel_table import ENV, PP2, TP2, Case, Gpus, Report, Vectors, compare, make_checkpoints

# two nodes of one machine need two addresses, and Ray takes 127.0.0.1 for the machine's own
ADDRESSES = ("127.0.0.2", "127.0.0.3")
# a process sees the GPU of its node only, as on two machines, where vLLM's all-reduce for one machine cannot work
RAY = ("--distributed-executor-backend", "ray", "--disable-custom-all-reduce")
START_SEC = 60.0


def ray_start(*options: str, address: str, gpus: int, env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """`ray start --block` as a child process; it ends its node when it is terminated."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options, "--disable-usage-stats"]
    command += ["--node-ip-address", address, "--num-gpus", str(gpus), "--num-cpus", "8"]
    # nodes that share a machine would give their workers the same ports
    command += ["--min-worker-port", "0", "--max-worker-port", "0", "--object-store-memory", "1000000000"]
    with log.open("wb") as output:
        return subprocess.Popen(
            command, env={**os.environ, **env}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def await_nodes(address: str, count: int, log: Path) -> None:
    """Return when `count` nodes are alive. Raises TimeoutError."""
    script = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    deadline = time.monotonic() + START_SEC
    found = ""
    while time.monotonic() < deadline:
        asked = subprocess.run(
            [sys.executable, "-c", script, address], capture_output=True, text=True, timeout=START_SEC, check=False
        )
        found = asked.stdout.strip() or asked.stderr.strip()[-300:]
        if found == str(count):
            return
        time.sleep(1)
    raise TimeoutError(f"{found} instead of {count} Ray nodes after {START_SEC:g} s:\n{log.read_text()[-2000:]}")


@contextlib.contextmanager
def ray_nodes(work: Path, gpus_per_node: int = 1) -> Iterator[str]:
    """A Ray cluster of two nodes on this machine, the first with the first GPUs; gives its address."""
    head = f"{ADDRESSES[0]}:{free_port()}"
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for i, address in enumerate(ADDRESSES):
            visible = ",".join(str(i * gpus_per_node + gpu) for gpu in range(gpus_per_node))
            env = {**ENV, "CUDA_VISIBLE_DEVICES": visible, "VLLM_HOST_IP": address}
            join = ["--head", "--port", head.split(":")[1], "--include-dashboard", "false"]
            join = join if i == 0 else ["--address", head]
            log = work / f"ray-node-{i}.log"
            nodes.append(ray_start(*join, address=address, gpus=gpus_per_node, env=env, log=log))
            await_nodes(head, i + 1, log)
        yield head
    finally:
        for node in reversed(nodes):
            node.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


def cases_at(address: str) -> list[Case]:
    env = (f"RAY_ADDRESS={address}", f"VLLM_HOST_IP={ADDRESSES[0]}")
    first = (
        *env,
        "VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0",
    )  # vLLM has two executors over Ray; the other one is the default
    return [
        Case("dense", parallel=(*TP2, *RAY), env=env),
        Case("dense", parallel=(*PP2, *RAY), env=env),
        Case("dense", parallel=(*TP2, *RAY), env=first),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds after which nothing more is started")
    parser.add_argument("--work", type=Path, default=Path("/tmp/gonka-poc-parallel"))
    options = parser.parse_args()
    deadline = time.monotonic() + options.deadline
    for folder in (options.out, options.work):
        folder.mkdir(parents=True, exist_ok=True)
    import ray

    report = Report(options.out)
    report.notes["versions"] = f"Ray {ray.__version__}"
    with ray_nodes(options.work) as address:
        cases = cases_at(address)
        make_checkpoints(cases, options.work)
        compare(report, Vectors(options.work, Gpus(2, slots=1), deadline), cases, workers=2)
    report.write()
    print((options.out / "parallel.md").read_text())
    return 1 if report.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
