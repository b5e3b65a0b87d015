"""PoCWorkerExtension: what it answers, and that it never raises."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gonka_poc.data import DistanceSpec, VectorSpec
from gonka_poc.errors import RequestError
from gonka_poc.worker import MAX_MESSAGE, PoCWorkerExtension

SPEC = {"block_hash": "b", "public_key": "k", "seq_len": 4, "k_dim": 3, "poc_stronger_rng": False}


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


class Runner:
    def __init__(self, failure=None):
        self.failure, self.asked = failure, []

    def compute(self, spec, nonces, next_nonces=()):
        self.asked.append((spec, nonces))
        if self.failure is not None:
            raise self.failure
        return {"nonces": nonces}

    describe = release = lambda self: self.compute(None, [])


class Worker(PoCWorkerExtension):
    def __init__(self, runner):
        self.poc_runner = runner


def test_an_answer_is_that_of_the_runner():
    worker = Worker(Runner())
    assert worker.poc_compute(SPEC, [1, 2]) == {"nonces": [1, 2]}
    distances = {"block_hash": "b", "public_key": "k", "seq_len": 4, "randomization": "permutation"}
    assert worker.poc_compute(distances, [3]) == {"nonces": [3]}
    assert worker.poc_runner.asked == [(VectorSpec(**SPEC), [1, 2]), (DistanceSpec(**distances), [3])]


def test_a_method_is_a_function_of_any_worker():
    """A server that was started without the extension is sent it, and calls it on what wraps its worker."""

    class Wrapper:
        worker = SimpleNamespace(poc_runner=Runner())

        def __getattr__(self, name):
            return getattr(self.worker, name)

    assert PoCWorkerExtension.poc_compute(Wrapper(), SPEC, [1, 2]) == {"nonces": [1, 2]}
    assert PoCWorkerExtension.poc_release(SimpleNamespace()) is None


@pytest.mark.parametrize(
    ("failure", "name"),
    [
        (RequestError("too long"), "RequestError"),
        (ZeroDivisionError("oops"), "ComputeError"),
        (OutOfMemoryError("4 GiB"), "WorkerMemoryError"),
    ],
)
@pytest.mark.parametrize("method", ["poc_compute", "poc_describe", "poc_release"])
def test_a_failure_is_an_answer(failure, name, method):
    """vLLM would leave the answers of the other workers unread, and take them for those to its next call."""
    args = (SPEC, [1]) if method == "poc_compute" else ()
    error = getattr(Worker(Runner(failure)), method)(*args)["error"]
    assert error["type"] == name
    assert str(failure) in error["message"]


def test_arguments_that_are_none_of_ours_are_an_answer():
    assert Worker(Runner()).poc_compute({"what": 1}, [1])["error"]["type"] == "ComputeError"


def test_a_message_is_bounded():
    message = Worker(Runner(ValueError("x" * 10**6))).poc_compute(SPEC, [1])["error"]["message"]
    assert len(message) == MAX_MESSAGE


def test_every_attribute_is_ours():
    """vLLM refuses an extension that shares a name with its worker."""
    assert all(name.startswith(("poc_", "__")) for name in vars(PoCWorkerExtension))


# --- before the weights are loaded ------------------------------------------------------------------------------

START_CHILD = """
import multiprocessing, sys

def load():
    import gonka_poc.worker
    print("loaded")

if __name__ == "__main__":
    if "{method}" == "spawn":  # what is forked would find the module loaded
        load()
    child = multiprocessing.get_context("{method}").Process(target=load)
    child.start()
    child.join()
    sys.exit(child.exitcode)
"""
SERVER = ["--model", "m", "--middleware", "gonka_poc.middleware.PoCMiddleware"]


def load_in_child(tmp_path: Path, method: str, args: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Import gonka_poc.worker in an API process with these arguments and in a child of it, as vLLM starts workers."""
    script = tmp_path / "server.py"
    script.write_text(START_CHILD.format(method=method))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **environment}
    command = [sys.executable, str(script), *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("POC_OUTBOX_PATH", "/proc/nope/o.sqlite3", "set POC_OUTBOX_PATH to a file on a local disk"),
        ("POC_MAX_STEP_MS", "soon", "POC_MAX_STEP_MS='soon'"),
    ],
)
def test_a_worker_refuses_settings_that_its_server_cannot_use(tmp_path, method, name, value, text):
    done = load_in_child(tmp_path, method, SERVER, **{name: value})
    assert (done.returncode, done.stdout) == (1, "loaded\n" if method == "spawn" else "")
    assert text in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("args", [[], [*SERVER, "--headless"]], ids=["no middleware", "headless"])
def test_a_worker_without_a_server_here_has_no_settings(tmp_path, args):
    done = load_in_child(tmp_path, "spawn", args, POC_OUTBOX_PATH="/proc/nope/o.sqlite3")
    assert (done.returncode, done.stdout) == (0, "loaded\nloaded\n")


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("model: m\nmiddleware: gonka_poc.middleware.PoCMiddleware\n", True),
        ("middleware: [a.B, 'gonka_poc.middleware.PoCMiddleware']\n", True),
        ("middleware:\n  - gonka_poc.middleware.PoCMiddleware\n", True),
        ("# middleware: gonka_poc.middleware.PoCMiddleware\nmodel: m\n", False),
        (None, False),  # vLLM says that there is no such file
    ],
)
@pytest.mark.parametrize("equals", [False, True], ids=["two words", "one word"])
def test_a_middleware_in_a_config_file_counts(tmp_path, text, refused, equals):
    path = tmp_path / "vllm.yaml"
    if text is not None:
        path.write_text(text)
    args = [f"--config={path}"] if equals else ["--config", str(path)]
    done = load_in_child(tmp_path, "spawn", args, POC_OUTBOX_PATH="/proc/nope/o.sqlite3")
    assert done.returncode == int(refused)
    assert ("set POC_OUTBOX_PATH to a file on a local disk" in done.stderr) is refused


def test_a_worker_with_settings_that_can_be_used(tmp_path):
    done = load_in_child(tmp_path, "spawn", SERVER, POC_OUTBOX_PATH=str(tmp_path / "a" / "o.sqlite3"))
    assert (done.returncode, done.stdout) == (0, "loaded\nloaded\n")
    assert (tmp_path / "a" / "o.sqlite3").exists()
