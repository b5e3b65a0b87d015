"""The Python of MLNode, by a tree of /proc, by systemd units and by runner.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gonka_poc.mlnode_python import NamedPython, named_pythons, other_units, same_python

TEXT = 'class VLLMRunner:\n    VLLM_PYTHON_PATH = "/default/python"\n'
SERVER = "vllm.entrypoints.openai.api_server"


class Machine:
    """An MLNode, a /proc and two folders of units under one folder."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.units = folder / "proc", (folder / "etc", folder / "lib")
        for place in (self.proc, *self.units):
            place.mkdir()
        self.mlnode = folder / "ml node"
        self.runner = self.mlnode / "packages/api/src/api/inference/vllm/runner.py"
        self.runner.parent.mkdir(parents=True)
        self.runner.write_text(TEXT)
        self.service = f"[Service]\nWorkingDirectory={self.mlnode}\n"

    def process(self, pid: int, cmdline: str, cwd: Path, root: str = "/", **environment: str) -> Path:
        folder = self.proc / str(pid)
        folder.mkdir()
        (folder / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in cmdline.split()))
        (folder / "environ").write_bytes(b"".join(f"{n}={v}\0".encode() for n, v in environment.items()))
        (folder / "cwd").symlink_to(cwd)
        (folder / "root").symlink_to(root)
        return folder

    def unit(self, name: str, text: str, place: int = 0) -> None:
        path = self.units[place] / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def named(self, **environment: str) -> list[str]:
        found = named_pythons(self.runner, TEXT, environment, str(self.proc), tuple(map(str, self.units)))
        return [named.python for named in found]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_environment_goes_before_all_and_the_default_comes_last(machine: Machine) -> None:
    assert machine.named() == ["/default/python"]
    machine.unit("mlnode.service", f"{machine.service}Environment=VLLM_PYTHON_PATH=/unit/python\n")
    assert machine.named() == ["/unit/python"]
    machine.process(7, "/usr/bin/python -m uvicorn api.app:app", machine.mlnode, VLLM_PYTHON_PATH="/process/python")
    assert machine.named() == ["/process/python"]
    assert machine.named(VLLM_PYTHON_PATH="/mine/python") == ["/mine/python"]
    assert named_pythons(None, "", {}, str(machine.proc), ()) == []
    found = named_pythons(machine.runner, TEXT, {}, str(machine.proc), ())
    assert found == [NamedPython("/process/python", "VLLM_PYTHON_PATH of process 7 (python)")]


@pytest.mark.parametrize("where", ["", "packages/api", "packages/api/src", "packages/api/src/api/inference/vllm"])
def test_a_server_that_mlnode_started_says_it_too(machine: Machine, where: str) -> None:
    machine.process(8, f"venv/bin/python -m {SERVER} --model m", machine.mlnode / where)
    assert machine.named() == [str(machine.mlnode / where / "venv/bin/python")]


def test_a_server_by_a_name_on_its_own_path(machine: Machine) -> None:
    python = machine.mlnode / "bin" / "python9"
    python.parent.mkdir()
    python.write_text("")
    python.chmod(0o755)
    machine.process(8, f"python9 -m {SERVER}", machine.mlnode, PATH=str(python.parent))
    assert machine.named() == [str(python)]


def test_a_process_that_imports_from_mlnode_counts(machine: Machine) -> None:
    sources = f"/elsewhere:{machine.mlnode}/packages/api/src"
    machine.process(9, "uvicorn api.app:app", Path("/"), PYTHONPATH=sources, VLLM_PYTHON_PATH="/process/python")
    assert machine.named() == ["/process/python"]


def test_processes_of_others_do_not_count(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pid, place in enumerate((tmp_path, Path("/"), Path.home(), machine.mlnode / "packages/other"), 10):
        machine.process(pid, f"/other/python -m {SERVER}", place, VLLM_PYTHON_PATH="/other/python")
    (tmp_path / "container").mkdir()
    inside = str(tmp_path / "container")
    machine.process(20, "uvicorn", machine.mlnode, root=inside, VLLM_PYTHON_PATH="/inside/python")
    unreadable = machine.process(21, "uvicorn", machine.mlnode, VLLM_PYTHON_PATH="/unreadable/python")
    (unreadable / "environ").unlink()
    machine.process(22, "", machine.mlnode, VLLM_PYTHON_PATH="/kernel/python")
    assert machine.named() == ["/default/python"]
    his = machine.process(23, "uvicorn", machine.mlnode, VLLM_PYTHON_PATH="/his/python")
    assert machine.named() == ["/his/python"]
    if os.geteuid() == 0:
        os.chown(his, 65534, 65534)  # he would lead root to a Python of his choice
        assert machine.named() == ["/default/python"]


def test_two_that_contradict_are_both_named(machine: Machine) -> None:
    for pid, python in ((31, "/a/python"), (32, "/b/python"), (33, "/a/python")):
        machine.process(pid, "uvicorn", machine.mlnode, VLLM_PYTHON_PATH=python)
    assert machine.named() == ["/a/python", "/b/python"]


FILE = "# of MLNode\n; or not\nexport=1\nVLLM_PYTHON_PATH='/a file/python'\n"
UNITS = {
    "a line": ("Environment=A=1 VLLM_PYTHON_PATH=/unit/python", "/unit/python"),
    "in quotes": ('Environment="VLLM_PYTHON_PATH=/a unit/python" "B=2"', "/a unit/python"),
    "the last counts": ("Environment=VLLM_PYTHON_PATH=/old\nEnvironment=VLLM_PYTHON_PATH=/new", "/new"),
    "over two lines": ("Environment=A=1 \\\n  VLLM_PYTHON_PATH=/unit/python", "/unit/python"),
    "taken back": ("Environment=VLLM_PYTHON_PATH=/old\nEnvironment=", "/default/python"),
    "a file": (
        "WorkingDirectory={mlnode}\nEnvironment=VLLM_PYTHON_PATH=/old\nEnvironmentFile=-{file}",
        "/a file/python",
    ),
    "a file of a unit of others": ("EnvironmentFile={file}", "/default/python"),
    "a file that is taken back": (
        "WorkingDirectory={mlnode}\nEnvironmentFile={file}\nEnvironmentFile=",
        "/default/python",
    ),
    "in a comment": ("#Environment=VLLM_PYTHON_PATH=/unit/python", "/default/python"),
}


@pytest.mark.parametrize(("text", "python"), UNITS.values(), ids=UNITS)
def test_units(machine: Machine, tmp_path: Path, text: str, python: str) -> None:
    (tmp_path / "env").write_text(FILE)
    own = "[Service]\n" if text.startswith("EnvironmentFile={file}") else machine.service
    machine.unit("mlnode.service", own + text.format(mlnode=machine.mlnode, file=tmp_path / "env"))
    assert machine.named() == [python]


def test_drop_ins_and_folders_of_units(machine: Machine) -> None:
    machine.unit("mlnode.service", f"{machine.service}Environment=VLLM_PYTHON_PATH=/lib/python\n", place=1)
    assert machine.named() == ["/lib/python"]
    machine.unit("mlnode.service", f"[Service]\nWorkingDirectory={machine.mlnode}\n")
    assert machine.named() == ["/default/python"]  # it hides the other
    machine.unit("mlnode.service.d/python.conf", "[Service]\nEnvironment=VLLM_PYTHON_PATH=/drop-in/python\n", place=1)
    assert machine.named() == ["/drop-in/python"]
    machine.unit("another.service", "[Service]\nEnvironment=VLLM_PYTHON_PATH=/another/python\n")
    assert machine.named() == ["/drop-in/python"]  # of the two the one that speaks of this MLNode


def test_the_unit_of_another_mlnode_is_a_hint(machine: Machine) -> None:
    machine.unit("other.service", "[Service]\nWorkingDirectory=/other\nEnvironment=VLLM_PYTHON_PATH=/other/python\n")
    assert machine.named() == ["/default/python"]
    units = tuple(map(str, machine.units))
    hint = NamedPython("/other/python", "the unit other.service")
    assert other_units(machine.runner, units) == [hint]
    assert named_pythons(None, "", {}, str(machine.proc), units) == [hint]
    machine.unit("mlnode.service", f"{machine.service}Environment=VLLM_PYTHON_PATH=/unit/python\n")
    assert (machine.named(), other_units(machine.runner, units)) == (["/unit/python"], [hint])


def test_one_interpreter_by_two_names(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3"):
        (tmp_path / "bin" / name).symlink_to("/bin/sh")
    one, other = str(tmp_path / "bin/python"), str(tmp_path / "bin/python3")
    (tmp_path / "link").symlink_to(tmp_path)
    assert same_python(one, other)
    assert same_python(one, str(tmp_path / "link/bin/python3"))
    (tmp_path / "bin/python3").unlink()
    (tmp_path / "bin/python3").symlink_to("/bin/cat")
    assert not same_python(one, other)
    (tmp_path / "pyvenv.cfg").write_text("")
    assert same_python(one, other)
    assert not same_python(one, "/bin/sh")
