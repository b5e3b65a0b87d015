"""The installer killed at every change that it makes to the disk: the next run puts the host in order."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hosts import (
    RUNNERS,
    host_gpus,
    host_install,
    host_journal,
    host_look,
    host_options,
    host_steps,
    host_target,
    patch_runner,
    tree,
)

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
KILLED = 9


class FakeTarget:
    """A Python whose packages are folders in its site-packages: `tail-1.0` lists tail.py."""

    def __init__(self, prefix: Path) -> None:
        self.prefix, self.python, self.managed = str(prefix), str(prefix / "bin" / "python"), False
        self.purelib, self.scripts = str(prefix / "lib" / "site-packages"), str(prefix / "bin")

    def look(self) -> FakeTarget:
        return self

    def own(self) -> dict[str, Any]:
        found = {}
        for info in Path(self.purelib).glob("*.dist-info"):
            name, version = info.name.removesuffix(".dist-info").split("-")
            is_whole = (info / "RECORD").is_file()
            files = [f"{self.purelib}/{name}/__init__.py", f"{info}/RECORD"] if is_whole else None
            record = (info / "RECORD").read_text() if is_whole else ""
            found[name] = host_target.Distribution(version, str(info), record, [], files, True)
        return found

    def put(self, name: str, version: str) -> None:
        self.remove(name)
        package, info = Path(self.purelib, name), Path(self.purelib, f"{name}-{version}.dist-info")
        for folder in (package, info):
            folder.mkdir(parents=True)
        (package / "__init__.py").write_text(f"version = {version}\n")
        (info / "RECORD").write_text(f"{name}/__init__.py,,\n{info.name}/RECORD,,\n")

    def remove(self, name: str) -> None:
        for folder in (Path(self.purelib, name), *Path(self.purelib).glob(f"{name}-*.dist-info")):
            shutil.rmtree(folder, ignore_errors=True)


class Killer:
    """Ends the process that it is armed in, without any clean-up, at the change of the disk with this number."""

    def __init__(self, number: int) -> None:
        self.left, self.armed = number, True
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if self.armed and (event in CHANGES or writes):
            self.left -= 1
            if self.left == 0:
                os._exit(KILLED)


def ends_killed(act: Callable[[Killer], None], number: int) -> bool:
    """True if a child that does `act` was killed at that change; False if it came to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act(Killer(number))
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, KILLED)
    return status == KILLED


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`tail` 1.0 is installed, which `head` replaces by 2.0; and a runner.py."""
    prefix = tmp_path / "python"
    target = FakeTarget(prefix)
    target.put("tail", "1.0")
    (prefix / "bin").mkdir()
    runner = tmp_path / "mlnode" / "runner.py"
    runner.parent.mkdir()
    shutil.copy(RUNNERS / "direct_2025.py", runner)
    made = host_target.Host(host_options.Options(yes=True), target, host_target.state_folder(target), runner)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no power fails here
    monkeypatch.setattr(host_journal, "plan_packages", lambda *_: {"head": "1.0", "tail": "2.0"})
    monkeypatch.setattr(host_install, "stray_patches", lambda *_, **__: {})
    monkeypatch.setattr(host_install, "remove_stray_patches", lambda *_: None)
    return made


def pip_of(host: Any, killer: Killer | None = None, head: str = "1.0") -> Callable[..., str]:
    """A pip that goes on to its end when the run is killed, as the real one does."""

    def pip(*words: str) -> str:
        if killer:
            killer.armed = False
        if words[0] == "install":
            host.target.put("head", head)
            host.target.put("tail", "2.0")
        else:
            assert all(host.target.own()[name].files for name in words[2:]), "pip takes none without its RECORD"
            for name in words[2:]:
                host.target.remove(name)
        if killer:
            killer.armed = True
        return ""

    return pip


def install(host: Any) -> None:
    journal = host_journal.Journal(host.state)
    host_install.finish_earlier_run(host, journal)
    if not journal.changes:
        journal.before = host_look.look_at(host)
    done = [change["kind"] for change in journal.changes]
    if "packages" not in done:
        host_journal.install_packages(host, journal, ["head"])
    if "file" not in done:
        old = host.runner.read_bytes()
        host_journal.change_file(journal, host.runner, old, patch_runner.make_patched(old, patch_runner.Variant()))


ACTS = {"install": [install], "uninstall": [install, host_install.uninstall]}


@pytest.mark.parametrize("killed", ACTS)
@pytest.mark.parametrize("next_act", ["uninstall", "install and uninstall"])
def test_a_kill_at_each_change_of_the_disk(
    host: Any, tmp_path: Path, killed: str, next_act: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(tmp_path)
    number = 0
    is_killed = True
    while is_killed:
        number += 1
        if killed == "uninstall":
            host.pip = pip_of(host)
            install(host)

        def act(killer: Killer) -> None:
            host.pip = pip_of(host, killer)
            ACTS[killed][-1](host)

        is_killed = ends_killed(act, number)
        host.pip = pip_of(host)
        if next_act != "uninstall":
            install(host)
            assert host.target.own()["tail"].version == "2.0"
        assert host_install.uninstall(host) == 0
        assert tree(tmp_path) == before, f"{killed} killed at change {number}"
        assert "Not as before" not in capsys.readouterr().out
    assert number > 15


def test_what_was_kept_goes_after_its_record(host: Any, tmp_path: Path) -> None:
    """Killed while the copies are deleted: the change is already forgotten, and what is left of them goes later."""
    host.pip = pip_of(host)
    journal = host_journal.Journal(host.state)
    host_journal.install_packages(host, journal, ["head"])
    old = host.runner.read_bytes()
    host_journal.change_file(journal, host.runner, old, old + b"# patched\n")
    (change, _) = journal.changes
    kept = Path(change["kept"])
    digest = hashlib.sha256((kept / "lib/site-packages/tail/__init__.py").read_bytes())

    def act(killer: Killer) -> None:
        real = shutil.rmtree
        killer.armed = False

        def rmtree(path: Path, **options: Any) -> None:
            if path == kept:
                os._exit(KILLED)
            real(path, **options)

        shutil.rmtree = rmtree
        host_install.undo(host, journal, change, force=False)

    assert ends_killed(act, 0)
    again = host_journal.Journal(host.state)
    assert [left["kind"] for left in again.changes] == ["file"]
    assert hashlib.sha256(Path(host.target.purelib, "tail/__init__.py").read_bytes()).digest() == digest.digest()
    again.sweep()
    assert not kept.exists()


class ReleaseStep(host_steps.PackageStep):
    """Installs `head` as one change, in the release that the host's options name, and has a wheel of it."""

    def check(self) -> str:
        self.todo = "install"
        return ""

    def act(self, journal: Any) -> None:
        host_journal.install_packages(self.host, journal, ["head"])
        version = self.host.options.vllm_version
        self.wheel = f"gonka_poc_vllm-{version}-py3-none-any.whl", version.encode()

    def verify(self) -> None:
        pass


class LastStep(ReleaseStep):
    title = "the last one"

    def act(self, journal: Any) -> None:
        if self.host.options.force:
            raise host_target.InstallError("no room")


def release(host: Any, version: str, fails: bool = False, killer: Killer | None = None) -> None:
    host.options = host_options.Options(yes=True, vllm_version=version, force=fails)
    host.pip = pip_of(host, killer, version)
    host_install.install(host)


@pytest.fixture
def releases(host: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(host_install, "STEPS", (ReleaseStep, LastStep))
    monkeypatch.setattr(host_install, "choose_vllm", lambda *_: None)
    monkeypatch.setattr(host_install, "refuse_unwritable", lambda *_: None)
    monkeypatch.setattr(host_install, "link_journals", lambda *_: None)
    monkeypatch.setattr(host_install.signal, "signal", lambda *_: None)
    monkeypatch.setattr(
        host_journal, "plan_packages", lambda host, _: {"head": host.options.vllm_version, "tail": "2.0"}
    )
    host.gpus = host_gpus.Gpus("", "", host_gpus.UNIVERSAL)
    return host


def test_a_roll_back_leaves_the_kept_installer(
    releases: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(tmp_path)
    with pytest.raises(host_target.InstallError, match="no room"):
        release(releases, "1.0", fails=True)
    assert tree(tmp_path) == before
    release(releases, "1.0")
    kept = releases.state / "installer"
    assert [path.name for path in (kept / "wheel").iterdir()] == ["gonka_poc_vllm-1.0-py3-none-any.whl"]
    (kept / "install.sh").write_text("of the last release")
    before = tree(kept)
    with pytest.raises(host_target.InstallError, match="no room"):
        release(releases, "2.0", fails=True)
    assert "The host is as it was before this run." in capsys.readouterr().err
    assert tree(kept) == before
    release(releases, "2.0")
    assert [path.name for path in (kept / "wheel").iterdir()] == ["gonka_poc_vllm-2.0-py3-none-any.whl"]
    assert (kept / "install.sh").read_text() != "of the last release"


@pytest.mark.nightly
def test_a_killed_update_leaves_one_installer_or_the_other(releases: Any, tmp_path: Path) -> None:
    release(releases, "1.0")
    kept, copy = releases.state / "installer", tmp_path.with_name("copy")
    (kept / "install.sh").write_text("of the last release")
    shutil.copytree(tmp_path, copy)
    old, found, number, is_killed = tree(kept), [], 0, True
    while is_killed:
        number += 1
        shutil.rmtree(tmp_path)
        shutil.copytree(copy, tmp_path)
        is_killed = ends_killed(lambda killer: release(releases, "2.0", killer=killer), number)
        host_journal.Journal(releases.state).sweep()
        if tree(kept) not in found:
            found.append(tree(kept))
    assert (found[0], len(found)) == (old, 2)
    assert any("-2.0-" in name for name in found[1])


def test_a_run_that_failed_says_what_it_leaves(host: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for left in (False, True):
        host.pip, before = pip_of(host), host_look.look_at(host)
        journal = host_journal.Journal(host.state)
        host_journal.install_packages(host, journal, ["head"])
        if left:
            Path(host.target.purelib, "head.py").write_text("")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host_install.signal, "signal", lambda *_: None)
            host_install.roll_back(host, journal, 0, before, host_target.InstallError("no room"))
        told = capsys.readouterr().err
        assert ("The host is as it was before this run." in told) == (not left)
        assert ("Not as before it:\n    " + host.target.purelib + "/head.py came since\n" in told) == left
        assert "then run the same command again" in told
