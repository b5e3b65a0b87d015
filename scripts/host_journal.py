"""A journal of the changes to a host, written before each happens, and the way back.

A change is either packages that pip installed, or one file.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from host_common import KEPT_INSTALLER, PACKAGE, InstallError, say, sha256
from host_target import Distribution, Host
from host_trust import refuse_foreign_journal
from patch_runner import PatchError, is_cut_short, remove_patch
from safe_files import clear_temporary, read_file, write_file

JOURNAL_FORMAT = 1
GONE = ".gonka-poc-"  # what folders are called before they are there, and after


class Journal:
    """The changes to this host, oldest first, in `folder`/journal.json; the folder goes with the last change.

    A run can be killed at any moment, so the order is: what is to be deleted is first named nowhere, then deleted, and
    folders come and go under a name of their own (`GONE`). What a kill leaves is swept away by the next run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "journal.json"
        self.changes: list[dict[str, Any]] = []
        self.made_folders: list[str] = []
        self.before: dict[str, Any] = {}  # host_look.look_at, before the first change
        self.settings: dict[str, Any] = {}  # of the last installation, for --update
        self.peers: list[str] = []  # folders of other journals of this host
        refuse_foreign_journal(str(self.path))
        if self._is_there():
            try:
                content = json.loads(read_file(str(self.path)))
                if content["format"] != JOURNAL_FORMAT:
                    raise ValueError(f"format {content['format']}")
                self.changes, self.made_folders = content["changes"], content["made_folders"]
                self.before, self.settings = content.get("before", {}), content.get("settings", {})
                self.peers = content.get("peers", [])
                self._check_places()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InstallError(f"{self.path} cannot be read: {error!r}; move it away, or restore it") from error

    def _is_there(self) -> bool:
        try:
            return stat.S_ISREG(os.lstat(self.path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except PermissionError as error:
            problem = f"{self.path} cannot be read: it is another user's"
            raise InstallError(f"{problem}\nrun the same command with sudo") from error

    def _check_places(self) -> None:
        """Raise ValueError where the journal names places that a change of ours cannot have had."""
        for change in self.changes:
            kept, path = change.get("kept"), change.get("path")
            if kept is not None and Path(os.path.normpath(kept)).parent != self.folder:
                raise ValueError(f"{kept} is not in {self.folder}")
            if path is not None and (not os.path.isabs(path) or not path.endswith(".py")):
                raise ValueError(f"{path} is not a file that is patched")
        if any(not self.folder.is_relative_to(made) for made in self.made_folders):
            raise ValueError("it names folders that are not above its own")

    def open(self) -> None:
        """Write it, with its folder where there is none."""
        if self.folder.is_dir():
            self.save()
        else:
            self._make_folder()

    def begin(self, change: dict[str, Any], state: str = "begun") -> dict[str, Any]:
        """Record a change before it is made."""
        self.changes.append({**change, "state": state})
        self.open()
        return self.changes[-1]

    def set_state(self, change: dict[str, Any], state: str) -> None:
        change["state"] = state
        self.save()

    def forget(self, change: dict[str, Any]) -> None:
        """The change is taken back, or never came to be. What was kept for it goes after the record of it."""
        self.changes.remove(change)
        self.save()
        self.sweep()

    def save(self, folder: Path | None = None) -> None:
        content = {"format": JOURNAL_FORMAT, "made_folders": self.made_folders, "before": self.before}
        content |= {"settings": self.settings, "peers": self.peers, "changes": self.changes}
        text = json.dumps(content, indent=1)
        write_file(str((folder or self.folder) / self.path.name), f"{text}\n".encode("ascii"))

    def sweep(self) -> None:
        """Remove what no change names any more, also what runs left that were killed; without a change all of it."""
        named = {change.get("kept") for change in self.changes}
        for place in self.folder.parents[:2]:  # where folders of ours are made and removed
            for left in place.glob(f"{GONE}*"):
                shutil.rmtree(left)
        if not self.folder.is_dir():
            return
        installer, old = (self.folder / name for name in (KEPT_INSTALLER, f".{KEPT_INSTALLER}.old"))
        if old.is_dir() and not installer.exists():
            old.rename(installer)
        patterns = ["kept-*", f".{self.path.name}.*.tmp", f".{KEPT_INSTALLER}.*"]
        patterns += [] if self.changes else [KEPT_INSTALLER]
        for left in (path for pattern in patterns for path in self.folder.glob(pattern)):
            if str(left) not in named:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        if not self.changes:
            self._remove_folder()

    def _make_folder(self) -> None:
        """The folder with the journal in it, and those missing above, all at once."""
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.made_folders = [str(path) for path in reversed(missing)]
        top = missing[-1]
        new = top.with_name(f"{GONE}{secrets.token_hex(6)}")
        for path in reversed(missing):
            (new / path.relative_to(top)).mkdir(mode=0o700 if path == self.folder else 0o755)
        self.save(new / self.folder.relative_to(top))
        os.rename(new, top)
        refuse_foreign_journal(str(self.path))

    def _remove_folder(self) -> None:
        """The folder, and those above it that were made for it and hold nothing else, all at once."""
        going = inner = None
        for made in map(Path, reversed(self.made_folders)):
            others = {entry.name for entry in made.iterdir()} - {inner.name if inner else self.path.name}
            if others:
                break
            going = inner = made
        if going is None:  # somebody else keeps something there
            self.path.unlink(missing_ok=True)
            return
        gone = going.with_name(f"{GONE}{secrets.token_hex(6)}")
        os.rename(going, gone)
        shutil.rmtree(gone)


def install_packages(host: Host, journal: Journal, spec: Sequence[str], others: Sequence[str] = ()) -> None:
    """pip install, in such a way that `undo_packages` can take it back to the byte and without the network.

    `others` are packages that make way: kept like those that pip replaces, and removed before it begins.
    """
    before = host.target.look().own()
    planned = plan_packages(host, spec)
    if not planned:
        return
    replaced = sorted({*(name for name in planned if name in before), *others})
    unlisted = ", ".join(name for name in replaced if before[name].files is None)
    if unlisted:
        problem = f"{unlisted} in {host.target.prefix} did not come from pip, and would have to be replaced"
        raise InstallError(f"{problem}\ninstall into a virtual environment instead: --python VENV/bin/python")
    for name in replaced:
        by = planned.get(name, "ours")
        say(f"    replaces {name} {before[name].version} by {by}; what is replaced is kept")
    if PACKAGE in replaced:
        record_edits(journal, before[PACKAGE])
    kept = str(journal.folder / f"kept-{os.getpid()}-{len(journal.changes)}") if replaced else None
    change = {
        "kind": "packages",
        "planned": planned,
        "before": sorted(before),
        "replaced": {name: before[name].version for name in replaced},
        "kept": kept,
        "prefix": host.target.prefix,
        "edits_before": {name: hash_edits(before[name]) for name in replaced},
    }
    change = journal.begin(change, "keeping")  # until what is replaced is kept in full, there is nothing to undo
    for name in replaced:
        keep_files(before[name], Path(host.target.prefix), Path(str(kept)))
    journal.set_state(change, "begun")
    if others:
        host.pip("uninstall", "--yes", *others)
    host.pip("install", *spec)
    now = host.target.look().own()
    missing = [name for name in planned if name not in now or now[name].version != planned[name]]
    if missing:
        raise InstallError(f"pip installed something else than it said it would: {', '.join(missing)}")
    change["records"] = {name: sha256(now[name].record.encode()) for name in planned}
    journal.set_state(change, "done")


def plan_packages(host: Host, spec: Sequence[str]) -> dict[str, str]:
    """Name and version of what pip would install now. InstallError names a constraint that stands in the way."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        try:
            host.pip("install", "--dry-run", "--report", report.name, *spec)
        except InstallError as error:
            constraints = constraints_in(host, str(error))
            if not constraints:
                raise
            advice = "take the line out of that file, or widen it; pip says what it contradicts"
            raise InstallError(
                f"pip's constraints stand in the way: {'; '.join(constraints)}\n{advice}\n{error}"
            ) from error
        items = json.loads(Path(report.name).read_bytes())["install"]
    return {normal_name(item["metadata"]["name"]): item["metadata"]["version"] for item in items}


def constraints_in(host: Host, answer: str) -> list[str]:
    """The constraints that a failing pip names, each with the line and the file that it comes from."""
    settings = re.findall(r"^\w+\.constraint='(.*)'$", host.pip("config", "list"), flags=re.MULTILINE)
    found = []
    for name in dict.fromkeys(re.findall(r"\(constraint\) ([A-Za-z0-9][\w.-]*)", answer)):
        for path in (path for setting in settings for path in setting.replace("\\n", " ").split()):
            with contextlib.suppress(OSError):
                for number, line in enumerate(Path(path).read_text(errors="replace").splitlines(), 1):
                    word = re.match(r"[A-Za-z0-9][\w.-]*", line.strip())
                    if word and normal_name(word[0]) == normal_name(name):
                        found.append(f"{line.strip()} ({path}, line {number})")
    return found


def normal_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def keep_files(found: Distribution, prefix: Path, kept: Path) -> None:
    """Second names (or copies, across file systems) for the files; pip writes new files and leaves these alone."""
    for name in found.files or []:
        source = Path(os.path.normpath(name))
        # pip removes byte code with its source, also what it did not list
        compiled = source.parent.glob(f"__pycache__/{source.stem}.*.pyc") if source.suffix == ".py" else ()
        for path in (source, *compiled):
            if path.is_file() and path.is_relative_to(prefix):
                link_or_copy(path, kept / path.relative_to(prefix))


def link_or_copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def undo_packages(host: Host, journal: Journal, change: dict[str, Any], force: bool) -> list[str]:
    """Remove what came, put back what was replaced; the names of packages that stay because others need them now."""
    if change["state"] == "keeping":
        return []
    prefix = Path(change["prefix"])
    now = host.target.look().own()
    present = [name for name in change["planned"] if name in now]
    if change["state"] == "done" and not force:
        refuse_later_edits(now, change, present)
    stay = needed_by_others(now, change, present)
    going = [] if change["state"] == "restoring" else [name for name in present if name not in stay]
    folders = {str(Path(f).parent) for name in going for f in now[name].files or []} | set(change.get("folders", []))
    change["folders"] = sorted(folders)  # nothing else names them once pip is done
    if going:
        journal.set_state(change, "undoing")
        host.pip("uninstall", "--yes", *going)
    journal.set_state(change, "restoring")  # pip does not understand what is half there
    if change["kept"]:
        kept = Path(change["kept"])
        for path in sorted(kept.rglob("*")):
            if path.is_symlink() or not path.is_dir():
                link_or_copy(path, prefix / path.relative_to(kept))
    remove_empty(folders, prefix)
    left = host.target.look().own()
    wrong = [name for name in going if name in left and name not in change["replaced"]]
    wrong += [name for name, version in change["replaced"].items() if name not in left or left[name].version != version]
    edits = change.get("edits_before", {})
    wrong += [name for name in edits if name in left and hash_edits(left[name]) != edits[name]]
    if wrong:
        raise InstallError(f"still not as before: {', '.join(dict.fromkeys(wrong))}")
    return stay


def refuse_later_edits(now: Mapping[str, Distribution], change: Mapping[str, Any], present: Sequence[str]) -> None:
    """Stop if a package is no longer the one that we put there. Our own is compared file by file."""
    for name in present:
        if sha256(now[name].record.encode()) != change["records"][name]:
            what = f"{name} {now[name].version} was installed again since, by somebody else; it is left as it is"
            raise InstallError(f"{what}\nto take it away all the same: --uninstall --force")
    known = change.get("edits", {})
    files = edited_files(now[PACKAGE]) if PACKAGE in present else []
    edited = ", ".join(path for path in files if known.get(path) != sha256(Path(path).read_bytes()))
    if edited:
        advice = "save what you need of it, then: --uninstall --force"
        raise InstallError(f"edited since it was installed: {edited}; left as it is\n{advice}")


def record_edits(journal: Journal, found: Distribution) -> None:
    """Note, with the change that installed it, what was edited of a package that an update replaces: the plan named
    it, so that taking back both does not stop there."""
    edits = hash_edits(found)
    for change in reversed(journal.changes):
        if edits and PACKAGE in change.get("planned", {}):
            change["edits"] = edits
            return


def forget_edits(journal: Journal, change: dict[str, Any]) -> None:
    """Take back what `record_edits` noted for `change`, an update that is rolled back: the edits are there again, and
    nobody has agreed to lose them."""
    if PACKAGE in change.get("replaced", {}):
        for earlier in reversed(journal.changes[: journal.changes.index(change)]):
            if PACKAGE in earlier.get("planned", {}):
                earlier.pop("edits", None)
                return


def hash_edits(found: Distribution) -> dict[str, str]:
    """The files that were edited, each with its hash."""
    return {path: sha256(Path(path).read_bytes()) for path in edited_files(found)}


def edited_files(found: Distribution) -> list[str]:
    """Files of a package that no longer have the hash that its RECORD names."""
    edited = []
    for row in csv.reader(found.record.splitlines()):
        name, recorded = (*row, "", "")[:2]
        path = Path(found.folder).parent / name
        if recorded.startswith("sha256=") and path.is_file():
            digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
            if recorded != f"sha256={digest}":
                edited.append(str(path))
    return edited


def needed_by_others(now: Mapping[str, Distribution], change: Mapping[str, Any], present: Sequence[str]) -> list[str]:
    """Packages that came with ours and that something installed later requires; it, too, keeps what it requires."""
    ours = {PACKAGE, "vllm", *change["replaced"]}
    later = set(now) - set(change["before"]) - set(change["planned"])
    stay: set[str] = set()
    wanted = [requirement for name in later for requirement in now[name].requires]
    while wanted:
        requirement = wanted.pop()
        match = re.match(r"[A-Za-z0-9._-]+", requirement)
        name = normal_name(match[0]) if match else ""
        if name in present and name not in ours and name not in stay and "extra ==" not in requirement:
            stay.add(name)
            wanted += now[name].requires
    return sorted(stay)


def remove_empty(folders: set[str], prefix: Path) -> None:
    """Folders that the packages leave behind: byte code without its source, then what is empty, deepest first."""
    every = {parent for name in folders for parent in (Path(name), *Path(name).parents)}
    inside = [path for path in every if path.is_relative_to(prefix) and path != prefix and path.is_dir()]
    for path in sorted(inside, key=lambda path: -len(path.parts)):
        cache = path if path.name == "__pycache__" else path / "__pycache__"
        for compiled in cache.glob("*.pyc"):
            if not (compiled.parent.parent / f"{compiled.name.split('.')[0]}.py").exists():
                compiled.unlink()
        for empty in (cache, path):
            with contextlib.suppress(OSError):
                os.rmdir(empty)


def change_file(journal: Journal, path: Path, old: bytes, new: bytes) -> None:
    change = {"kind": "file", "path": str(path), "old_sha256": sha256(old), "new_sha256": sha256(new)}
    change["original_base64"] = base64.b64encode(old).decode("ascii")
    change["patched_base64"] = base64.b64encode(new).decode("ascii")  # to know a write in place that was cut short
    change = journal.begin(change)
    write_file(str(path), new)
    journal.set_state(change, "done")


def was_cut_short(current: bytes, original: bytes, patched: bytes) -> bool:
    """True if a write in place, of the patch or back, was cut short; journals of earlier releases have no `patched`."""
    return bool(patched) and (is_cut_short(current, original, patched) or is_cut_short(current, patched, original))


def undo_file(change: Mapping[str, Any], force: bool) -> None:
    """Write the original back where the file still is ours, or was left unpatched by somebody else."""
    path = Path(change["path"])
    clear_temporary(str(path))
    original = base64.b64decode(change["original_base64"])
    if sha256(original) != change["old_sha256"]:
        raise InstallError(f"the journal's copy of {path} does not have its own hash; it is not written back")
    if not path.exists():
        say(f"    {path} is gone; nothing to put back")
        return
    current = read_file(str(path))
    patched = base64.b64decode(change.get("patched_base64", ""))
    if sha256(current) == change["new_sha256"] or was_cut_short(current, original, patched):
        write_file(str(path), original)
    elif sha256(current) != change["old_sha256"]:
        try:
            unpatched, marks = remove_patch(current)
        except PatchError as error:
            raise InstallError(f"{path}: the patch in it is damaged: {error}; put it right by hand") from error
        if not marks:
            say(f"    {path} was replaced by a file without the patch; it is left as it is")
        elif force:
            write_file(str(path), unpatched)
        else:
            advice = "to take out the patch and keep the edits: --uninstall --force"
            raise InstallError(f"{path} was edited since it was patched; it is left as it is\n{advice}")
