"""The part of the installer that stays, for `gonka-poc update` and `uninstall`; journals are found from each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hosts import (
    ROOT,
    RUNNERS,
    host_install,
    host_journal,
    host_kept,
    host_options,
    host_places,
    host_steps,
    host_target,
    host_wheels,
    make_wheel,
    patch_runner,
)

from gonka_poc import safe_files
from gonka_poc.cli import installer
from gonka_poc.errors import ToolError
from gonka_poc.safe_files import tree_writer


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    made = host_journal.Journal(tmp_path / "var" / "gonka-poc")
    made.begin({"kind": "file", "path": str(tmp_path / "runner.py")})
    return made


# --- the scripts


def test_the_kept_scripts_run_without_the_checkout(journal: Any, tmp_path: Path) -> None:
    host_kept.keep_installer(journal)
    kept = journal.folder / host_kept.KEPT_INSTALLER
    assert not any(path.is_symlink() for path in kept.rglob("*"))
    before = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}
    host_kept.keep_installer(journal)  # a second time writes nothing
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*")} == before
    words = ["bash", str(kept / "install.sh"), "--uninstall", "--python", sys.executable, "--dry-run"]
    done = subprocess.run(words, cwd="/", capture_output=True, text=True, timeout=120)
    assert (done.returncode, "there is nothing to take back" in done.stdout) == (0, True), done.stderr
    assert not [path for path in kept.rglob("*") if path.name == "__pycache__"]


def test_every_script_that_an_installation_needs_is_kept() -> None:
    """A module that is added to the installer is not forgotten here."""
    kept = {path for pattern in host_kept.SCRIPTS for path in ROOT.glob(pattern)}
    own = {"bundle.sh", "cpu_venv.sh", "make_docs.py"}  # for those who have a checkout
    assert {path for path in (ROOT / "scripts").iterdir() if path.suffix in (".py", ".sh")} - kept == {
        ROOT / "scripts" / name for name in own
    }
    assert set((ROOT / "patches").glob("*.*")) <= kept


def test_the_wheel_that_was_installed_is_kept_beside_them(journal: Any, tmp_path: Path, monkeypatch: Any) -> None:
    host_kept.keep_installer(journal)
    for version in ("0.2.0", "0.3.0"):
        make_wheel(tmp_path, "gonka_poc_vllm", version, {"gonka_poc/__init__.py": version, "gonka_poc/a/b.py": ""})
        name = f"gonka_poc_vllm-{version}-py3-none-any.whl"
        host_kept.keep_installer(journal, version, (name, (tmp_path / name).read_bytes()))
        host_kept.keep_installer(journal, version)
    kept = journal.folder / host_kept.KEPT_INSTALLER
    assert [path.name for path in (kept / "wheel").iterdir()] == ["gonka_poc_vllm-0.3.0-py3-none-any.whl"]
    for module in (host_kept, host_steps):
        monkeypatch.setattr(module, "ROOT", kept)
    monkeypatch.delenv("GONKA_POC_WHEEL", raising=False)
    options = host_options.Options()
    assert host_steps.wanted_version(options) == "0.3.0"
    assert set(host_steps.wanted_files(options)) == {"__init__.py", "a/b.py"}
    (tmp_path / "package" / "gonka_poc" / "a").mkdir(parents=True)
    (tmp_path / "package" / "gonka_poc" / "__init__.py").write_text("0.3.0")
    (tmp_path / "package" / "gonka_poc" / "a" / "b.py").write_text("")
    assert host_steps.package_files(tmp_path / "package") == host_steps.wanted_files(options)
    monkeypatch.undo()
    host_kept.keep_installer(journal, "0.4.0")  # killed before that one's wheel was kept: no update goes back to 0.3.0
    assert not (kept / "wheel").exists()
    monkeypatch.setattr(host_steps, "ROOT", kept)
    monkeypatch.setattr(host_kept, "ROOT", kept)
    step = host_steps.PackageStep(host_target.Host(options, host_target.Target(sys.executable), kept, None), None)
    with pytest.raises(host_target.RefusalError, match="gonka-poc update CHECKOUT"):
        step.check()


def test_they_go_with_the_last_change(tmp_path: Path) -> None:
    journal = host_journal.Journal(tmp_path / "var" / "gonka-poc")
    journal.open()
    for _ in range(2):  # they are there before the first change is
        host_kept.keep_installer(journal)
        assert {path.name for path in journal.folder.iterdir()} == {"installer", "journal.json"}
        (journal.folder / "installer" / "install.sh").write_text("of an earlier release")
    journal.begin({"kind": "file", "path": str(tmp_path / "runner.py")})
    (journal.folder / ".installer.new").mkdir()  # by a run that was killed
    journal.sweep()
    (journal.folder / "installer").rename(journal.folder / ".installer.old")  # by another, later
    (journal.folder / ".installer.new").mkdir()
    journal.sweep()
    assert (journal.folder / "installer" / "install.sh").is_file()
    assert {path.name for path in journal.folder.iterdir()} == {"installer", "journal.json"}
    journal.forget(journal.changes[0])
    assert list(tmp_path.iterdir()) == []


# --- the commands


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that take the place of gonka-poc, whose Python has its prefix at tmp_path."""
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: commands.append(words))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    for name in ("other_writer", "tree_writer"):
        monkeypatch.setattr(installer, name, lambda _: "")
    return commands


def keep(folder: Path) -> str:
    script = installer.state_folder(str(folder)) / installer.KEPT
    script.parent.mkdir(parents=True)
    script.write_text("")
    return str(script)


def test_commands_start_the_kept_scripts(started: list[list[str]], tmp_path: Path) -> None:
    script, python = keep(tmp_path), ["--python", sys.executable]
    checkout, bundle, wheel = tmp_path / "checkout", tmp_path / "wheels", tmp_path / "gonka_poc_vllm-9-py3-none-any.whl"
    for path in (checkout / "install.sh", bundle / "SHA256SUMS", wheel):
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    run = CliRunner(env={"GONKA_POC_WHEEL": None})
    for command, words, expected in (
        (installer.uninstall_command, [], [script, "--uninstall", *python]),
        (
            installer.uninstall_command,
            ["--yes", "--dry-run", "--force"],
            [script, "--uninstall", *python, "--yes", "--dry-run", "--force"],
        ),
        (installer.update_command, ["--yes"], [script, "--update", *python, "--yes"]),
        (installer.update_command, ["--profile", "graphs"], [script, "--update", "--profile", "graphs", *python]),
        (installer.update_command, [str(checkout)], [str(checkout / "install.sh"), "--update", *python]),
        (installer.update_command, [str(bundle)], [script, "--update", "--wheels", str(bundle), *python]),
        (installer.update_command, [str(wheel)], [script, "--update", *python]),
    ):
        done = run.invoke(command, words, catch_exceptions=False)
        assert (done.exit_code, started.pop()) == (0, ["bash", *expected])
    wrong = run.invoke(installer.update_command, [str(tmp_path / "nothing")])
    assert (wrong.exit_code, "is no checkout" in wrong.output, started) == (2, True, [])


def test_where_nothing_is_kept_the_way_is_named(started: list[list[str]], tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(ToolError, match="pip uninstall gonka-poc-vllm"):
        installer.kept_script()
    script = keep(tmp_path)
    folder = Path(script).parent
    folder.rename(folder.with_name(".installer.old"))  # killed before the new one took its place
    assert (str(installer.kept_script()), folder.is_dir()) == (script, True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ToolError, match="with sudo"):
        installer.kept_script()
    monkeypatch.undo()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(installer, "other_writer", lambda _: "alice owns it")
    with pytest.raises(ToolError, match="is not run by root: alice owns it"):
        installer.trusted(Path(script))


@pytest.mark.parametrize("source", ["checkout", "wheels", "gonka_poc_vllm-9-py3-none-any.whl"])
def test_root_installs_nothing_that_others_can_write(
    source: str, started: list[list[str]], tmp_path: Path, monkeypatch: Any
) -> None:
    keep(tmp_path)
    path = tmp_path / source
    inner = {"checkout": path / "install.sh", "wheels": path / "SHA256SUMS"}.get(source, path)
    deep = inner if inner == path else path / "scripts" / "host_install.py"
    for file in (inner, deep):
        file.parent.mkdir(exist_ok=True)
        file.write_text("")
    monkeypatch.setattr(installer, "tree_writer", tree_writer)
    monkeypatch.setattr(safe_files, "other_writer", lambda name: safe_files.describe_writer(name, os.stat(name)))
    run = CliRunner(env={"GONKA_POC_WHEEL": None})
    if os.geteuid() != 0:
        pytest.skip("only root is refused anything")
    for mode, is_refused in ((0o666, True), (0o644, False)):
        deep.chmod(mode)
        done = run.invoke(installer.update_command, [str(path)])
        assert (isinstance(done.exception, ToolError), started == []) == (is_refused, is_refused)
        assert not is_refused or f"can write to {deep}" in str(done.exception)


@pytest.mark.parametrize("prefix", ["/usr", "/usr/local", "/opt/venv"])
def test_the_command_looks_where_the_installer_writes(prefix: str) -> None:
    target = host_target.Target("python", prefix=prefix)
    assert installer.state_folder(prefix) == host_target.state_folder(target)
    assert f"{host_kept.KEPT_INSTALLER}/install.sh" == installer.KEPT
    assert host_wheels.SUMS == installer.SUMS


# --- settings, and journals that lead to each other


class Place:
    """A Python by name only, its journal, and a runner.py that its installation patched."""

    def __init__(self, folder: Path, name: str, runner: Path) -> None:
        self.target = host_target.Target(str(folder / name / "bin" / "python"), prefix=str(folder / name))
        self.host = host_target.Host(host_options.Options(), self.target, host_target.state_folder(self.target), runner)
        self.journal = host_journal.Journal(self.host.state)

    def install(self, **options: Any) -> None:
        self.host.options = host_options.Options(**options)
        self.journal.settings = host_install.settings_of(self.host)
        self.journal.begin({"kind": "packages", "planned": {}, "replaced": {}, "kept": None}, "done")
        if host_places.state_of(self.host.runner) is None:
            old = self.host.runner.read_bytes()
            note = host_places.note_of(self.host.state)
            new = patch_runner.make_patched(old, patch_runner.Variant(), note)
            host_journal.change_file(self.journal, self.host.runner, old, new)
        host_places.link_journals(self.host, self.journal)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Place, Place]:
    runner = tmp_path / "ml node ünit" / "runner.py"
    runner.parent.mkdir()
    shutil.copy(RUNNERS / "direct_2025.py", runner)
    made = Place(tmp_path / "ä b", "first", runner), Place(tmp_path / "ä b", "second", runner)
    by_python = {place.target.python: place.target for place in made}
    monkeypatch.setattr(host_target.Target, "look", lambda self: by_python[self.python])
    monkeypatch.setattr(host_places.shutil, "which", lambda name: name if name in by_python else None)
    return made


def test_a_journal_is_found_by_runner_py(places: tuple[Place, Place], monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = places
    assert host_places.state_of(first.host.runner) is None
    first.install()
    patched = first.host.runner.read_bytes()
    assert b"(journal: /" in patched
    assert patched.isascii() == (RUNNERS / "direct_2025.py").read_bytes().isascii()
    assert host_places.state_of(first.host.runner) == first.host.state
    assert host_places.find_recorded(host_options.Options(), first.host.runner) is first.target
    copied = first.host.runner.with_name("copy.py")  # which that journal does not name
    shutil.copy(first.host.runner, copied)
    monkeypatch.setattr(host_places, "find_python", lambda *_: "MLNode's own")
    assert host_places.find_recorded(host_options.Options(), copied) == "MLNode's own"
    original, _ = patch_runner.remove_patch(patched)
    assert original == (RUNNERS / "direct_2025.py").read_bytes()
    assert patch_runner.main(["apply", str(first.host.runner), "--profile", "graphs"]) == 0  # by hand: the note stays
    assert host_places.state_of(first.host.runner) == first.host.state


def test_each_journal_leads_to_the_others(places: tuple[Place, Place], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = places
    first.install()
    second.install()  # finds the file patched
    for one, other in ((first, second), (second, first)):
        assert [journal.folder for journal in host_places.others(one.host)] == [other.host.state]
        host_places.print_other_installations(one.host)
        told = capsys.readouterr().out
        assert f"into {other.target.python}" in told
        assert str(other.host.state) in told
    assert f"patched {first.host.runner}" in told
    while first.journal.changes:
        first.journal.forget(first.journal.changes[-1])
    assert host_places.others(second.host) == []  # a journal that is gone is no error
    capsys.readouterr()


def test_markers_of_an_earlier_release_get_the_note(places: tuple[Place, Place]) -> None:
    first, _ = places
    first.host.runner.write_bytes(
        patch_runner.make_patched(first.host.runner.read_bytes(), patch_runner.Variant("graphs", False))
    )
    assert host_places.state_of(first.host.runner) is None
    choice = host_steps.Choice("0.25.1", "0.25.1", None, "")
    step = host_steps.RunnerStep(first.host, choice)
    assert step.check()
    step.act(first.journal)
    assert host_places.state_of(first.host.runner) == first.host.state
    patched = first.host.runner.read_bytes()
    assert (step.check(), step.todo, first.host.runner.read_bytes()) == (step.check(), "", patched)


def test_a_journal_at_work_is_not_written(places: tuple[Place, Place], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = places
    first.install()
    with host_target.locked(first.host):
        at_work = host_journal.Journal(first.host.state)
        second.install()
        assert "another run is at work" in capsys.readouterr().err
        at_work.begin({"kind": "packages", "planned": {}, "replaced": {}, "kept": None})
    assert len(host_journal.Journal(first.host.state).changes) == len(at_work.changes) == 3
    host_places.link_journals(second.host, second.journal)  # another time
    again = host_journal.Journal(first.host.state)
    assert (again.peers, len(again.changes)) == ([str(second.host.state)], 3)
    assert second.journal.peers == [str(first.host.state)]


def test_changes_since_the_journal_was_read_stay(places: tuple[Place, Place], monkeypatch: Any) -> None:
    first, second = places
    first.install()
    stale = host_journal.Journal(first.host.state)
    first.journal.begin({"kind": "packages", "planned": {}, "replaced": {}, "kept": None})
    monkeypatch.setattr(host_places, "others", lambda _: [stale])
    second.install()
    assert len(host_journal.Journal(first.host.state).changes) == 3


def test_the_journal_of_another_that_cannot_be_read(
    places: tuple[Place, Place], monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = places
    first.install()

    def refuse(path: str) -> bytes:
        if path == str(first.journal.path):
            raise PermissionError(13, "Permission denied", path)
        return Path(path).read_bytes()

    monkeypatch.setattr(host_journal, "read_file", refuse)
    assert host_places.others(second.host) == []
    assert "warning: not looked at:" in capsys.readouterr().err


def test_what_was_forced_is_forced_again(places: tuple[Place, Place], monkeypatch: Any) -> None:
    """A Python that the operating system manages: an update needs no --force again, taking back none at all."""
    first, _ = places
    first.install(force=True, keep_vllm=True)
    update = first.host.options = host_options.parse_options(["--update"])
    host_install.take_settings(first.host, host_journal.Journal(first.host.state))
    assert (update.force, update.keep_vllm) == (True, True)
    update = first.host.options = host_options.parse_options(["--update", "--vllm-version", "0.25.1"])
    host_install.take_settings(first.host, host_journal.Journal(first.host.state))
    assert not update.keep_vllm
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(host_target.Target, "run", lambda self, *words, **_: asked.append(words))
    first.target.managed = True
    flag = "--break-system-packages"
    for words, force in ((["--uninstall"], False), ([], False), (["--force"], True)):
        first.host.options = host_options.parse_options(words)
        first.host.pip("uninstall", "--yes", "a")
        first.host.pip("install", "a")
        assert [flag in words for words in asked[-2:]] == [True, force]


def test_an_update_takes_the_settings_of_the_last_installation(places: tuple[Place, Place]) -> None:
    first, second = places
    first.install(profile="graphs", gpus="universal")
    update = host_options.parse_options(["--update", "--yes"])
    first.host.options = update
    host_install.take_settings(first.host, host_journal.Journal(first.host.state))
    assert (update.profile, update.gpus) == ("graphs", "universal")
    update = first.host.options = host_options.parse_options(["--update", "--profile", "standard"])
    host_install.take_settings(first.host, host_journal.Journal(first.host.state))
    assert (update.profile, update.gpus) == ("standard", "universal")
    found = host_places.find_runner_of(update, host_journal.Journal(first.host.state))
    assert found == first.host.runner
    first.journal.settings = {}  # as earlier releases left it
    first.journal.save()
    for variant, profile, replay in (
        (patch_runner.Variant(), "standard", False),
        (patch_runner.Variant("graphs", False, True), "graphs", True),
        (patch_runner.Variant("hardened", False), "hardened", False),
        (patch_runner.Variant("hardened", False, True), "hardened", True),
    ):
        original, _ = patch_runner.remove_patch(first.host.runner.read_bytes())
        first.host.runner.write_bytes(patch_runner.make_patched(original, variant))
        update = first.host.options = host_options.parse_options(["--update"])
        host_install.take_settings(first.host, host_journal.Journal(first.host.state))
        assert (update.profile, update.replay) == (profile, replay)
    first.host.runner.write_bytes(original)  # a new one of MLNode: nothing says any more what was chosen
    for words in (["--update", "--profile", "hardened"], ["--update"]):
        first.host.options = host_options.parse_options(words)
        if "--profile" in words:
            host_install.take_settings(first.host, host_journal.Journal(first.host.state))
            continue
        with pytest.raises(host_target.RefusalError, match="name it: --profile"):
            host_install.take_settings(first.host, host_journal.Journal(first.host.state))
    with pytest.raises(host_target.RefusalError, match="no installation to update"):
        host_install.take_settings(second.host, second.journal)
