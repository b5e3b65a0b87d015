"""What root does with files and programs that a lesser user can write: nothing with root's rights.

These tests need root, and a user who is not: they run in a private mount, as user 65534.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import RUNNER, RUNNERS, host_journal, host_target, patch_runner

from gonka_poc import doctor, safe_files
from gonka_poc.safe_files import UnsafePathError, other_writer

ROOT = Path(__file__).parent.parent
NOBODY = 65534
H200 = "NVIDIA H200, 9.0, 580.95.05"
SHELL_PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin")


def private_mount(folder: Path) -> str:
    """The reason why no private mount can be made; empty if one can."""
    try:
        done = subprocess.run(["unshare", "-m", "true"], capture_output=True, timeout=20, text=True, cwd=folder)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.strip()


@pytest.fixture
def nobodys(tmp_path: Path) -> Path:
    """A folder of user 65534, in one that only root can write."""
    if os.geteuid() != 0:
        pytest.skip("needs root: what root does in the folder of a lesser user cannot be tried without its rights")
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == 0 and folder != Path("/tmp") and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    made = tmp_path / "nobodys"
    made.mkdir()
    os.chown(made, NOBODY, NOBODY)
    return made


@pytest.fixture
def runner(nobodys: Path) -> Path:
    path = nobodys / "runner.py"
    shutil.copy(RUNNERS / "direct_2025.py", path)
    os.chown(path, NOBODY, NOBODY)
    path.chmod(0o640)
    return path


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of root that nobody else can read."""
    path = tmp_path / "victim"
    path.write_text("root:secret")
    path.chmod(0o600)
    return path


RACE = """
import os, sys
folder, victim = sys.argv[1:]
while True:
    for name in os.listdir(folder):
        if name.endswith(".tmp"):
            try:
                os.unlink(os.path.join(folder, name))
                os.symlink(victim, os.path.join(folder, name))
            except OSError:
                pass
"""


@pytest.fixture
def race(nobodys: Path, victim: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The lesser user replaces each temporary file by a link to a file of root."""
    python = SHELL_PYTHON or sys.executable
    with subprocess.Popen(
        [python, "-I", "-S", "-c", RACE, str(nobodys), str(victim)], user=NOBODY, group=NOBODY, extra_groups=[]
    ) as process:
        time.sleep(0.2)
        assert process.poll() is None
        yield process
        assert process.poll() is None, "the race ended early"
        process.kill()


def state_of(path: Path) -> tuple[int, int, int, bytes]:
    status = path.stat()
    return status.st_uid, status.st_gid, status.st_mode, path.read_bytes()


# --- H3: files ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("race")
def test_a_link_in_place_of_the_temporary_file_leads_nowhere(runner: Path, victim: Path) -> None:
    before = state_of(victim)
    for turn in range(100):
        with contextlib.suppress(OSError):  # the link can end the write, but not turn it
            safe_files.write_file(str(runner), b"%d" % turn)
        assert state_of(victim) == before
        if runner.is_symlink():  # what is in his folder is his to exchange, also after the write
            runner.unlink()
            runner.write_bytes(b"")
            os.chown(runner, NOBODY, NOBODY)


def test_root_changes_a_file_there_as_its_owner(runner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    real = os.replace

    def replace(*names: Any, **folders: Any) -> None:
        used.append((os.geteuid(), os.getegid()))
        real(*names, **folders)

    monkeypatch.setattr(os, "replace", replace)
    assert patch_runner.main(["apply", str(runner)]) == 0
    assert patch_runner.main(["revert", str(runner)]) == 0
    assert used == [(NOBODY, NOBODY)] * 2
    assert (os.geteuid(), os.getegid()) == (0, 0)
    assert state_of(runner)[:3] == (NOBODY, NOBODY, 0o100640)
    assert runner.read_bytes() == (RUNNERS / "direct_2025.py").read_bytes()


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_file_of_root_where_others_can_write_is_refused(nobodys: Path, victim: Path, mode: int) -> None:
    folder = nobodys.parent / "open"
    folder.mkdir()
    os.chown(folder, 0, NOBODY)
    folder.chmod(mode)
    for path in (nobodys / "root.py", folder / "root.py"):
        path.write_text("old")
        with pytest.raises(UnsafePathError, match="root does not use it there"):
            safe_files.write_file(str(path), b"new")
        assert path.read_text() == "old"


def test_a_link_of_another_user_does_not_lead_root(nobodys: Path, victim: Path) -> None:
    (nobodys / "runner.py").symlink_to(victim)
    (nobodys / "folder").symlink_to(victim.parent)
    with pytest.raises(UnsafePathError, match="not a plain file"):
        safe_files.write_file(str(nobodys / "runner.py"), b"new")
    with pytest.raises(UnsafePathError, match="a way that others can change"):
        safe_files.write_file(str(nobodys / "folder" / "victim"), b"new")
    assert victim.read_text() == "root:secret"


def test_a_link_that_comes_after_the_look_is_not_followed(runner: Path, victim: Path) -> None:
    real = os.path.realpath(runner)
    runner.unlink()
    runner.symlink_to(victim)
    with pytest.raises(UnsafePathError), safe_files.opened_folder(os.path.dirname(real)) as folder:
        safe_files._look("runner.py", folder, real)
    moved = runner.parent.rename(runner.parent.with_name("moved"))
    runner.parent.symlink_to(moved)
    with pytest.raises(OSError, match="Not a directory"), safe_files.opened_folder(os.path.dirname(real)):
        pass


def test_who_else_can_write(nobodys: Path, tmp_path: Path) -> None:
    assert other_writer("/usr/bin") == ""
    assert other_writer(tmp_path / "not there") == ""
    assert str(nobodys) in other_writer(nobodys / "a" / "b")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    mine, theirs = shared / "mine", shared / "theirs"
    mine.write_text("")
    theirs.symlink_to("/usr/bin/env")
    os.lchown(theirs, NOBODY, NOBODY)
    assert other_writer(mine) == ""
    assert str(theirs) in other_writer(theirs)
    (tmp_path / "over").symlink_to(nobodys)
    assert str(nobodys) in other_writer(tmp_path / "over" / ".." / "nobodys" / "x")
    mine.chmod(0o666)
    assert "everybody" in other_writer(mine)
    os.chown(shared, 0, NOBODY)
    shared.chmod(0o770)
    assert "group" in other_writer(shared)


def test_a_file_that_is_a_mount_is_written_in_place(nobodys: Path, tmp_path: Path) -> None:
    problem = private_mount(tmp_path)
    if problem:
        pytest.skip(f"no private mount can be made here: {problem}")
    source, target = tmp_path / "source.py", tmp_path / "mounted.py"
    source.write_text("old and longer")
    target.write_text("")
    code = f"from gonka_poc.safe_files import write_file; write_file({str(target)!r}, b'new')"
    script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", str(source), str(target), sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert (source.read_text(), target.read_text()) == ("new", "")
    assert [path for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


# --- H4: programs ------------------------------------------------------------------------------------------------


@pytest.fixture
def mlnode(nobodys: Path) -> tuple[Path, Path]:
    """MLNode of the lesser user, whose runner.py names a program of his; and the file that the program leaves."""
    runner, mark = nobodys / "mlnode" / RUNNER, nobodys / "ran"
    runner.parent.mkdir(parents=True)
    program = nobodys / "py.sh"
    program.write_text(f'#!/bin/sh\nid -u >>"{mark}"\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    text = (RUNNERS / "direct_2025.py").read_text()
    line = next(line for line in text.splitlines() if line.strip().startswith("VLLM_PYTHON_PATH"))
    runner.write_text(text.replace(line, f'    VLLM_PYTHON_PATH = "{program}"'))
    for path in nobodys.rglob("*"):
        os.chown(path, NOBODY, NOBODY)
    return nobodys / "mlnode", mark


@pytest.fixture
def smi(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\necho '{H200}'\n")
    (folder / "nvidia-smi").chmod(0o755)
    return folder


@pytest.mark.parametrize("named", [False, True], ids=["runner.py names it", "--python names it"])
@pytest.mark.parametrize("action", [["--dry-run"], ["--status"], ["--yes"], ["--uninstall", "--yes"]], ids=" ".join)
def test_root_does_not_run_a_program_of_another_user(
    mlnode: tuple[Path, Path], smi: Path, action: list[str], named: bool
) -> None:
    folder, mark = mlnode
    words = [*action, "--mlnode-dir", str(folder)]
    if named:
        words += ["--python", str(folder.parent / "py.sh")]
    environment = {"PATH": f"{smi}:{os.environ['PATH']}", "HOME": "/root", "TMPDIR": str(smi)}
    command = ["bash", str(ROOT / "install.sh"), *words]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert not mark.exists()
    assert "root does not run" in done.stderr
    assert safe_files.user_name(NOBODY) in done.stderr
    assert "sudo -u" in done.stderr


def test_the_doctor_does_not_run_it_either(mlnode: tuple[Path, Path]) -> None:
    folder, mark = mlnode
    here = doctor.Surroundings(folder / RUNNER, None, {"MLNODE_VLLM_MODULE": "vllm"})
    for check in (doctor.check_package(here), doctor.check_module(here)):
        assert check.state == "fail"
        assert "is not run by root" in check.found
        assert safe_files.user_name(NOBODY) in check.found
    assert not mark.exists()


def make_venv(folder: Path) -> Path:
    purelib = folder / "lib" / "python3.11" / "site-packages"
    purelib.mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "pyvenv.cfg").write_text("home = /usr/bin\n")
    (folder / "bin" / "python").symlink_to(SHELL_PYTHON or sys.executable)
    (purelib / "pip.py").write_text("")
    return purelib


def leave(folder: Path, purelib: Path, nobodys: Path) -> None: ...


def give_module(folder: Path, purelib: Path, nobodys: Path) -> None:
    os.chown(purelib / "pip.py", NOBODY, NOBODY)


def open_config(folder: Path, purelib: Path, nobodys: Path) -> None:
    (folder / "pyvenv.cfg").chmod(0o666)


def give_pip_settings(folder: Path, purelib: Path, nobodys: Path) -> None:
    (folder / "pip.conf").write_text("")
    os.chown(folder / "pip.conf", NOBODY, NOBODY)


def name_his_folder(folder: Path, purelib: Path, nobodys: Path) -> None:
    (purelib / "his.pth").write_text(f"import sys\n{nobodys}\n")


def link_his_folder(folder: Path, purelib: Path, nobodys: Path) -> None:
    (purelib / "his").symlink_to(nobodys)


def put_his_python(folder: Path, purelib: Path, nobodys: Path) -> None:
    (nobodys / "python").symlink_to(SHELL_PYTHON or sys.executable)
    (folder / "bin" / "python").unlink()
    (folder / "bin" / "python").symlink_to(nobodys / "python")


@pytest.mark.parametrize(
    "change",
    [leave, give_module, open_config, give_pip_settings, name_his_folder, link_his_folder, put_his_python],
    ids=lambda change: change.__name__,
)
def test_a_python_is_root_s_with_all_that_it_loads(nobodys: Path, tmp_path: Path, change: Any) -> None:
    folder = tmp_path / "venv"
    change(folder, make_venv(folder), nobodys)
    target = host_target.Target(str(folder / "bin" / "python"))
    if change is leave:
        assert target.look().version
    else:
        with pytest.raises(host_target.RefusalError, match="root does not run"):
            target.look()


# --- L1 and L9: the journal --------------------------------------------------------------------------------------


def made_up(kind: str, victim: Path) -> dict[str, Any]:
    """What a lesser user would like root to take back."""
    if kind == "file":
        change = {"kind": "file", "path": str(victim), "old_sha256": "", "new_sha256": "", "original_base64": ""}
    else:
        change = {"kind": "packages", "planned": {}, "before": [], "replaced": {}, "prefix": "/"}
        change["kept"] = str(victim.parent)
    return {"format": 1, "made_folders": [], "changes": [{**change, "state": "done"}]}


@pytest.mark.parametrize("where", ["his file", "his folder", "everybody's", "his link"])
@pytest.mark.parametrize("kind", ["file", "packages"])
def test_a_journal_of_another_user_is_not_believed(
    nobodys: Path, tmp_path: Path, victim: Path, where: str, kind: str
) -> None:
    folder = nobodys if where == "his folder" else tmp_path / "state"
    folder.mkdir(exist_ok=True)
    path = folder / "journal.json"
    if where == "his link":
        path.symlink_to(nobodys / "journal.json")
        os.lchown(path, NOBODY, NOBODY)
    path.write_text(json.dumps(made_up(kind, victim)))
    path.chmod(0o646 if where == "everybody's" else 0o644)
    if where.startswith("his"):
        os.chown(path, NOBODY, NOBODY)
    with pytest.raises(host_journal.InstallError, match="is not believed"):
        host_journal.Journal(folder)
    assert victim.read_text() == "root:secret"


@pytest.mark.parametrize("kind", ["file", "packages"])
def test_a_journal_of_root_names_nothing_else(tmp_path: Path, victim: Path, kind: str) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "journal.json").write_text(json.dumps(made_up(kind, victim)))
    (folder / "journal.json").chmod(0o600)
    with pytest.raises(host_journal.InstallError, match="cannot be read"):
        host_journal.Journal(folder)


def test_the_journal_is_closed_to_others_under_any_umask(tmp_path: Path, runner: Path) -> None:
    old_umask = os.umask(0)
    try:
        journal = host_journal.Journal(tmp_path / "var" / "gonka-poc")
        old = runner.read_bytes()
        host_journal.change_file(journal, runner, old, old + b"# more\n")
    finally:
        os.umask(old_umask)
    modes = {path: path.stat().st_mode & 0o777 for path in (journal.folder.parent, journal.folder, journal.path)}
    assert list(modes.values()) == [0o755, 0o700, 0o600]
    host_journal.undo_file(host_journal.Journal(journal.folder).changes[0], force=False)
    assert runner.read_bytes() == old


# --- L8: the environment of pip ----------------------------------------------------------------------------------


def test_pip_gets_settings_of_the_index_and_no_others(monkeypatch: pytest.MonkeyPatch, nobodys: Path) -> None:
    names = ["REQUIREMENT", "CONSTRAINT", "DRY_RUN", "LOG", "CONFIG_FILE", "GLOBAL_OPTION", "PYTHON", "TARGET"]
    foreign = [f"PIP_{name}" for name in names] + ["LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "PYTHONPATH"]
    foreign += ["PYTHONSTARTUP", "GIT_SSH_COMMAND", "CC", "XDG_CONFIG_HOME", "BASH_ENV"]
    kept = ["PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "HTTPS_PROXY", "no_proxy", "LC_ALL", "TMPDIR"]
    for name in foreign + kept:
        monkeypatch.setenv(name, "set by the caller")
    monkeypatch.setenv("HOME", str(nobodys))  # `sudo -E`, and with it his pip.conf
    environment = host_target.child_environment()
    assert not set(foreign) & set(environment)
    assert [environment[name] for name in kept] == ["set by the caller"] * len(kept)
    assert environment["HOME"] == "/root"
    assert environment["PATH"] == os.environ["PATH"]
