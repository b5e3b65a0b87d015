"""kill -9 over an installation, an update, a switch of the profile and an uninstallation, at random moments."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import time
from pathlib import Path

import pytest
from host_tree import HostTree, build_wheel, wait_until
from hosts import tree

STATE = "its python/var/gonka-poc"
SECONDS_OF_A_KILLED_RUN = 300


class Acts:
    """Runs on a host, in a circle; `killed` of one goes on from the state that the one before leaves."""

    NAMES = ("install", "update", "switch", "uninstall")

    def __init__(self, host: HostTree) -> None:
        self.host = host
        command_line = str(host.python.parent / "gonka-poc")
        self.commands = {
            "install": host.command("--yes"),
            "update": [command_line, "update", "--yes"],
            "switch": [command_line, "update", "--yes", "--profile", "graphs", "--replay"],
            "uninstall": [command_line, "uninstall", "--yes"],
        }
        # the command may be gone with the package; the checkout is not
        self.again = {
            "install": ["--yes"],
            "update": ["--update", "--yes"],
            "switch": ["--update", "--yes", "--profile", "graphs", "--replay"],
            "uninstall": ["--uninstall", "--yes"],
        }

    def prepare(self, name: str) -> None:
        """Give an update something to do: a file of the package was edited."""
        if name == "update":
            (package,) = self.host.folder.rglob("site-packages/gonka_poc/answers.py")
            text = package.read_text()
            package.unlink()  # editors write another file; the copy that a journal keeps may be the same one
            package.write_text(f"{text}# edited\n")

    def start(self, name: str) -> subprocess.Popen[bytes]:
        nowhere = subprocess.DEVNULL
        environment = self.host.environment if name == "install" else self.host.without_checkout
        return subprocess.Popen(
            self.commands[name], env=environment, stdin=nowhere, stdout=nowhere, stderr=nowhere, cwd="/"
        )

    def seen(self) -> dict[str, tuple[int, str]]:
        """The host without the journal, whose copies have names of their own, without byte code, which has times in it,
        and without pip's notes of the wheel."""
        found = tree(self.host.folder)
        parts, notes = (STATE, "__pycache__"), ("direct_url.json", "RECORD")
        return {
            path: entry
            for path, entry in found.items()
            if not any(part in path for part in parts) and not path.endswith(notes)
        }


@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_kills_at_random_moments_leave_no_trace(tmp_path: Path) -> None:
    """After each kill the same act, done again, leaves the host as an act without a kill does; byte for byte."""
    choose = random.Random(int(os.environ.get("POC_TEST_SEED", "14")))
    host = HostTree(tmp_path, "direct_2025.py", build_wheel(tmp_path))
    acts, before = Acts(host), tree(host.folder)
    seconds, wanted = {}, {}
    for name in Acts.NAMES:
        acts.prepare(name)
        begin = time.monotonic()
        with acts.start(name) as process:
            assert process.wait(SECONDS_OF_A_KILLED_RUN) == 0, name
        seconds[name], wanted[name] = time.monotonic() - begin, acts.seen()
    assert tree(host.folder) == before
    kills = int(os.environ.get("POC_TEST_KILLS", "8"))
    for number in range(kills):
        name = Acts.NAMES[number % len(Acts.NAMES)]
        acts.prepare(name)
        with acts.start(name) as process:
            time.sleep(choose.uniform(0, seconds[name]))
            process.kill()
        # a pip that outlived the run may still hold the lock
        wait_until(lambda again=acts.again[name]: host.run(*again).returncode == 0)
        assert acts.seen() == wanted[name], f"{name}, kill {number + 1}"
        if name == "uninstall":
            assert tree(host.folder) == before, f"{name}, kill {number + 1}"
        print(f"kill {number + 1} of {kills}: {name}, mended", flush=True)
    host.answers("--uninstall", "--yes")
    assert tree(host.folder) == before
