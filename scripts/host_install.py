"""Installs gonka_poc on a GPU host, and takes it back.

Whatever changes the host is written into a journal before it happens, so that a failing step, a killed run and
--uninstall all take it back in the same way, newest change first.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from host_common import PACKAGE, InstallError, InterruptionError, RefusalError, complain, say, sha256
from host_gpus import find_gpus
from host_journal import Journal, edited_files, forget_edits, undo_file, undo_packages
from host_kept import keep_installer
from host_look import differences, look_at
from host_options import HELP, Options, parse_options
from host_places import find_recorded, find_runner_of, link_journals, print_other_installations
from host_runners import marks_of, remove_stray_patches, stray_patches
from host_steps import (
    STEPS,
    DoctorStep,
    PackageStep,
    RunnerStep,
    Step,
    VllmStep,
    choose_vllm,
    live_command,
    own_command,
)
from host_target import Host, existing, find_python, find_runner, lock_folders, locked, state_folder
from host_wheels import check_wheels
from safe_files import read_file

DONE, FAILED, NOT_INSTALLED = 0, 1, 3


def install(host: Host) -> int:
    journal = Journal(host.state)
    if not host.options.dry_run:
        finish_earlier_run(host, journal)
    choice = choose_vllm(host.target, host.options, host.gpus.generation)
    if host.options.wheels:
        say(f"Packages come from {host.options.wheels} alone: {check_wheels(host.options.wheels)}")
    steps = [cls(host, choice) for cls in STEPS]
    say(f"Plan for {host.target.python} and {host.runner}:")
    for number, step in enumerate(steps, 1):
        say(f"[{number}/{len(steps)}] {step.title}: {step.check()}")
        if step.todo:
            say(f"    to do: {step.todo}")
    busy = any(step.todo for step in steps)
    if host.options.dry_run:
        if busy:
            try:
                refuse_unwritable(host, steps)
            except RefusalError as error:
                say(f"The installation itself would be refused: {error}")
        say("Dry run: nothing was changed." if busy else "Dry run: there is nothing to do.")
        return DONE
    if busy:
        refuse_unwritable(host, steps)
        confirm(host, "Go on?")
    begun, before = len(journal.changes), look_at(host)
    if not journal.changes:
        journal.before = before
    try:
        if busy:
            journal.settings = journal.settings or settings_of(host)
            journal.open()
        if busy and not begun:  # for a first run that is killed; later ones have the last release's until they end
            keep_installer(journal)
        for number, step in enumerate(steps, 1):
            if step.todo or isinstance(step, DoctorStep):
                say(f"[{number}/{len(steps)}] {step.title}: {step.todo}".rstrip())
            if step.todo:
                step.act(journal)
            step.verify()
        if busy or journal.changes:
            own = host.target.own()
            wheel = next((step.wheel for step in steps if isinstance(step, PackageStep)), None)
            keep_installer(journal, own[PACKAGE].version if PACKAGE in own else "", wheel)
    except BaseException as error:
        roll_back(host, journal, begun, before, error)
        raise
    if busy:
        journal.settings = settings_of(host)
        journal.save()
    link_journals(host, journal)
    if not busy:
        say("Everything was in place; there was nothing to do.")
        return DONE
    say(f"Done. Restart MLNode for it to take effect. The journal is in {host.state}.")
    say(f"To take everything back, also without this checkout: {own_command(host.target)} uninstall")
    say(f"Then ask the running server (its own port, MLNode's first is 5001): {live_command(host.target)}")
    return DONE


# Of the options, those that an update takes from the last installation.
KEPT_OPTIONS = ("profile", "replay", "gpus", "keep_vllm", "force")


def settings_of(host: Host) -> dict[str, Any]:
    """The Python, the runner.py and the options of this installation, for the next update."""
    settings = {name: getattr(host.options, name) for name in KEPT_OPTIONS}
    return {"python": host.target.python, "runner": str(host.runner), **settings}


def take_settings(host: Host, journal: Journal) -> None:
    """For --update: the settings of the last installation, where the command line does not say otherwise."""
    if not journal.changes:
        problem = f"nothing is recorded in {journal.folder}: there is no installation to update"
        raise RefusalError(f"{problem}\ninstall it: bash install.sh, from a checkout")
    settings = journal.settings or settings_in(host.runner)
    for name in KEPT_OPTIONS:
        overruling = {name, f"no_{name}"} | ({"vllm_version"} if name == "keep_vllm" else set())
        if not overruling & host.options.given and name in settings:
            setattr(host.options, name, settings[name])
    if "profile" not in settings and "profile" not in host.options.given:
        problem = "the profile of the last installation is not known: an earlier release did not record it"
        raise RefusalError(f"{problem}, and {host.runner or 'runner.py'} has no patch\nname it: --profile NAME")


def settings_in(runner: Path | None) -> dict[str, Any]:
    """The options by the markers in runner.py, for the journals of earlier releases, which have none."""
    found = re.search(r"v\d+ (standard|graphs|hardened)\S*?(-replay)?(,|$)", marks_of(runner) if runner else "")
    return {"profile": found[1], "replay": bool(found[2])} if found else {}


def find_host(options: Options, script: str) -> Host:
    """The Python, the state folder and MLNode's file; only an installation insists on the last, and looks for GPUs."""
    if options.action == "install":
        gpus = find_gpus(script, options.force, options.gpus)
        runner = find_runner(options.mlnode_dir)
        target = find_python(options.python, runner)
        return Host(options, target, state_folder(target), runner, gpus)
    runner = None
    with contextlib.suppress(RefusalError):
        runner = find_runner(options.mlnode_dir)
    target = find_recorded(options, runner)
    host = Host(options, target, state_folder(target), runner)
    if options.action == "update":
        journal = Journal(host.state)
        take_settings(host, journal)
        host.runner = find_runner_of(options, journal)
        host.gpus = find_gpus(script, options.force, options.gpus)
    return host


def refuse_unwritable(host: Host, steps: Sequence[Step]) -> None:
    """Root is asked for only where something is to be written that we may not write."""
    folders = []
    for step in steps:
        if step.todo and isinstance(step, (VllmStep, PackageStep)):
            folders += [existing(host.target.purelib), existing(host.target.scripts)]
        elif step.todo and isinstance(step, RunnerStep):
            folders.append(str(host.runner.parent))
    folders.append(existing(host.state))
    closed = [folder for folder in dict.fromkeys(folders) if not os.access(folder, os.W_OK)]
    if closed:
        way = "make it writable" if os.geteuid() == 0 else "run the same command with sudo"
        raise RefusalError(f"cannot write to {', '.join(closed)} (read-only, or another owner's)\n{way}")


def confirm(host: Host, question: str) -> None:
    if host.options.yes:
        return
    if not sys.stdin.isatty():
        raise RefusalError("there is no terminal to ask on; add --yes to go on without being asked")
    with contextlib.suppress(EOFError):
        if input(f"{question} [y/N] ").strip().lower() in ("y", "yes"):
            return
    raise RefusalError("stopped; nothing was changed")


def finish_earlier_run(host: Host, journal: Journal) -> None:
    """Take back the one step that a killed run left half done, and what else it left."""
    journal.sweep()
    unfinished = [change for change in reversed(journal.changes) if change["state"] != "done"]
    if unfinished:
        say("An earlier run was cut short; its unfinished step is taken back first:")
        confirm(host, "Go on?")
        for change in unfinished:
            forget_edits(journal, change)
            undo(host, journal, change, force=False)
        host.target.look()


def undo(host: Host, journal: Journal, change: dict[str, Any], force: bool) -> None:
    if change["kind"] == "file":
        undo_file(change, force)
        say(f"    as before: {change['path']}")
    else:
        stay = undo_packages(host, journal, change, force)
        say(f"    as before: {', '.join(sorted(set(change['planned']) - set(stay)))}")
        if stay:
            say(f"    other packages need these now, they stay: {', '.join(stay)}")
    journal.forget(change)


def roll_back(host: Host, journal: Journal, begun: int, before: Mapping[str, Any], error: BaseException) -> None:
    """Take back what this run did, the changes from index `begun` on, and say how to go on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if isinstance(error, InstallError):
        complain(f"error: {error}")
        error.printed = True
    if journal.changes[begun:]:
        say("Taking back what this run did:")
    try:
        for change in reversed(journal.changes[begun:]):
            forget_edits(journal, change)
            undo(host, journal, change, force=True)
        journal.sweep()
        left = differences(before, host)
    except (InstallError, OSError) as problem:
        complain(f"error: not everything could be taken back: {problem}")
        complain(f"what is left is in {journal.path}; put that right, then: bash install.sh --uninstall")
        return
    as_before = "The host is as it was before this run."
    if left:
        as_before = "\n    ".join(["What this run did is taken back. Not as before it:", *left])
    complain(f"{as_before}\nPut right what the error says, then run the same command again.")


def uninstall(host: Host) -> int:
    journal = Journal(host.state)
    if not host.options.dry_run:
        journal.sweep()
    strays = stray_patches(host, journal, after_uninstall=True)
    if not journal.changes and not strays:
        say(f"Nothing is recorded in {host.state}: there is nothing to take back.")
        return DONE
    if journal.changes:
        say(f"To take back, recorded in {host.state}:")
    for change in reversed(journal.changes):
        say(f"    {describe(change)}")
    for path, marks in strays.items():
        say(f"To take out, a patch ({marks}) that is recorded nowhere and has no package: {path}")
    if host.options.dry_run:
        say("Dry run: nothing was changed.")
        return DONE
    confirm(host, "Take it back?")
    lock_folders(host, {str(path.parent) for path in strays})
    before = state_before(journal)
    for change in list(reversed(journal.changes)):
        try:
            undo(host, journal, change, force=host.options.force)
        except InstallError as error:
            raise InstallError(f"{error}\nwhat is not taken back yet stays recorded in {journal.path}") from error
    remove_stray_patches(host, journal, strays)
    left = differences(before, host) if before else []
    if left:
        say("\n    ".join(["All that was recorded is taken back. Not as before the installation:", *left]))
    elif before:
        say("Everything is as it was before the installation.")
    else:
        say("All that was recorded is taken back. Nobody looked at the host before that installation.")
    say("Restart MLNode.")
    return DONE


def state_before(journal: Journal) -> dict[str, Any]:
    """The look at the host before the first change; empty where nobody looked, as earlier releases did not."""
    files = {change["path"]: change["old_sha256"] for change in reversed(journal.changes) if change["kind"] == "file"}
    return {**journal.before, "files": {**journal.before["files"], **files}} if journal.before else {}


def describe(change: Mapping[str, Any]) -> str:
    if change["kind"] == "file":
        return f"patched: {change['path']}"
    new = [f"{name} {version}" for name, version in change["planned"].items() if name not in change["replaced"]]
    old = [f"{name} {change['planned'].get(name, 'put aside')} (was {was})" for name, was in change["replaced"].items()]
    return f"installed: {', '.join(new + old)}"


def status(host: Host) -> int:
    """0: installed and as we left it; 3: not installed; 1: something was changed since."""
    journal = Journal(host.state)
    strays = stray_patches(host, journal)
    print_other_installations(host)
    for path, marks in strays.items():
        say(f"Patched ({marks}), and no Python that it starts has the package: {path} [take it out: --uninstall]")
    if not journal.changes:
        say(f"Not installed: nothing is recorded in {host.state}.")
        return FAILED if strays else NOT_INSTALLED
    say(f"Installed into {host.target.python}; recorded in {host.state}:")
    problems = 0
    own = host.target.own()
    last_of = {name: change for change in journal.changes for name in change.get("planned", [change.get("path")])}
    for change in journal.changes:
        trouble = []
        if change["state"] != "done":
            trouble.append("cut short: run the installation again, or --uninstall")
        elif change["kind"] == "file" and last_of[change["path"]] is change:
            path = Path(change["path"])
            if not path.exists() or sha256(read_file(str(path))) != change["new_sha256"]:
                trouble.append("changed since")
        elif change["kind"] == "packages":
            for name, record in change["records"].items():
                if last_of[name] is change and (name not in own or sha256(own[name].record.encode()) != record):
                    trouble.append(f"{name} was changed since")
                elif last_of[name] is change and name == PACKAGE:
                    trouble += [f"{path} was edited since" for path in edited_files(own[name])]
        problems += len(trouble)
        say(f"    {describe(change)}" + "".join(f" [{text}]" for text in trouble))
    return FAILED if problems or strays else DONE


def stop(number: int, _frame: object) -> None:
    raise InterruptionError(signal.Signals(number).name)


def main(script: str, *words: str) -> int:
    os.umask(0o022)  # MLNode may run as somebody else, who has to read what root installs
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    try:
        options = parse_options(words)
        if options.action == "help":
            print(HELP, end="")
            return DONE
        host = find_host(options, script)
        if options.action == "status":
            return status(host)
        act = uninstall if options.action == "uninstall" else install
        if options.dry_run:
            return act(host)
        with locked(host):
            host.target.look()
            return act(host)
    except InstallError as error:
        if not error.printed:
            complain(f"error: {error}")
        return error.exit_code
    except OSError as error:
        complain(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}")
        return FAILED
    except (KeyboardInterrupt, InterruptionError) as error:
        complain(f"stopped by {error or 'SIGINT'}")
        return FAILED


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main(*sys.argv[1:]))
