"""Files that are read and replaced through descriptors, so that nobody else can lead a read or a change elsewhere.

Standard library only, Python 3.10 or newer: the installer and the patcher use it on hosts where nothing is installed
(`patches/safe_files.py` is a link to it). "Others" are all users but root and the one who runs this.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import re
import secrets
import stat
from collections.abc import Iterator

MAX_LINKS = 40  # as Linux has it
PASSED_BY = (errno.EPERM, errno.ENOTSUP, errno.ENODATA, errno.EINVAL, errno.EACCES)  # of extended attributes
PATH_ONLY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class UnsafePathError(OSError):
    """Somebody else could exchange the file, or has put something there that is no plain file."""


def user_name(uid: int) -> str:
    """The name of a user, or the number of one that has no name here."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def other_writer(path: str | os.PathLike[str]) -> str:
    """The others who can exchange `path`, with the place where they can; empty if nobody can.

    All links and folders on the way count, as far as they exist. A folder with the sticky bit protects what is in it.
    """
    text = os.fspath(path)
    left = _parts(text if text.startswith("/") else os.path.join(os.getcwd(), text))
    place, status, num_links = "/", os.lstat("/"), 0
    while not (found := describe_writer(place, status)) and left:
        part = left.pop()
        inner = os.path.dirname(place) if part == ".." else os.path.join(place, part)
        try:
            entry = os.lstat(inner)
        except (FileNotFoundError, NotADirectoryError):
            return ""
        if not stat.S_ISLNK(entry.st_mode):
            place, status = inner, entry
            continue
        if status.st_mode & stat.S_ISVTX and entry.st_uid not in (0, os.geteuid()):
            return f"{user_name(entry.st_uid)} owns {inner}"
        num_links += 1
        if num_links > MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), text)
        target = os.readlink(inner)
        left += _parts(target)
        if target.startswith("/"):
            place, status = "/", os.lstat("/")
    return found


def _parts(path: str) -> list[str]:
    """The names in a path, the last one first."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def describe_writer(place: str, status: os.stat_result) -> str:
    """The others who can write to `place`, which has `status`: "alice owns /srv/alice"; empty if nobody can."""
    user = os.geteuid()
    if status.st_uid not in (0, user):
        return f"{user_name(status.st_uid)} owns {place}"
    if stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX:
        return ""
    if status.st_mode & stat.S_IWOTH:
        return f"everybody can write to {place}"
    # a user's own group has no other members as a rule; root's is root's
    if status.st_mode & stat.S_IWGRP and status.st_gid not in ((0, os.getegid()) if user else (0,)):
        try:
            group = grp.getgrgid(status.st_gid).gr_name
        except KeyError:
            group = str(status.st_gid)
        return f"the group {group} can write to {place}"
    return ""


def tree_writer(top: str) -> str:
    """The others who can write to something under `top` or where its links and .pth files lead; empty if nobody can."""
    left, seen = [top], set()
    while left:
        place = left.pop()
        found = other_writer(place)
        if found:
            return found
        folders = [os.path.realpath(place)] if os.path.exists(place) else []
        while folders:
            folder = folders.pop()
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen or not stat.S_ISDIR(status.st_mode):
                continue  # checked already, or a file, which other_writer has looked at
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        left.append(entry.path)
                        continue
                    found = describe_writer(entry.path, entry.stat(follow_symlinks=False))
                    if found:
                        return found
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.name.endswith(".pth"):
                        left += _pth_folders(folder, entry.path)
    return ""


def _pth_folders(folder: str, path: str) -> list[str]:
    """The folders that a .pth file adds to where modules are looked for."""
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file]
    named = [os.path.join(folder, line) for line in lines if line and not line.startswith(("#", "import ", "import\t"))]
    return [path for path in named if os.path.isdir(path)]


@contextlib.contextmanager
def opened_folder(path: str) -> Iterator[int]:
    """A descriptor of the folder `path`, in which the links are resolved already: one on the way is refused."""
    descriptor = os.open("/", PATH_ONLY)
    try:
        for part in reversed(_parts(path)):
            try:
                inner = os.open(part, PATH_ONLY, dir_fd=descriptor)
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno or 0), path) from error
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def rights_of(uid: int, gid: int) -> Iterator[None]:
    """The rights of another user, for root alone."""
    groups, group = os.getgroups(), os.getegid()
    try:
        known = os.getgrouplist(pwd.getpwuid(uid).pw_name, gid)
    except KeyError:
        known = [gid]
    try:
        os.setgroups(known)
        os.setegid(gid)
        os.seteuid(uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def _lesser_rights(path: str, status: os.stat_result) -> contextlib.AbstractContextManager[None]:
    """For root, where others can exchange `path`: the rights of the owner in `status`; else those that we have."""
    found = other_writer(os.path.dirname(path)) if os.geteuid() == 0 else ""
    if not found:
        return contextlib.nullcontext()
    if status.st_uid == 0:
        advice = "give file and folder to the same user, or take the right to write away"
        raise UnsafePathError(f"{path} is root's, but {found}: root does not use it there; {advice}")
    return rights_of(status.st_uid, status.st_gid)


def _look(name: str, folder: int, path: str) -> os.stat_result | None:
    """The status of the plain file of that name; None if there is nothing. Raises UnsafePathError for anything else."""
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        is_folder = stat.S_ISDIR(status.st_mode)
        raise UnsafePathError(f"{path} is {'a folder: name a file in it' if is_folder else 'not a plain file'}")
    return status


def read_file(path: str) -> bytes:
    """The bytes of a plain file, read as its owner where others could exchange it. The links on the way are followed;
    others cannot change one meanwhile without an error."""
    path = os.path.realpath(path)
    with opened_folder(os.path.dirname(path)) as folder:
        name = os.path.basename(path)
        status = _look(name, folder, path)
        if status is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        owner = os.fstat(folder) if status.st_uid == 0 else status  # root's file in another user's folder: as that user
        with _lesser_rights(path, owner):
            try:
                descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno or 0), path) from error
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UnsafePathError(f"{path} is not a plain file")
            return file.read()


def write_file(path: str, data: bytes) -> None:
    """Replace a plain file, or make one of mode 0600: a reader sees the old content or the new one. A file that is a
    mount of its own is written in place.

    Links of folders on the way are followed. Owner, mode and extended attributes stay. For root where others could
    exchange the file or a folder on the way, all is done with the rights of the file's owner, so that nobody gets more
    than he had; raises UnsafePathError where that owner is root.
    """
    found = other_writer(os.path.dirname(path)) if os.geteuid() == 0 else ""
    given, path = path, os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    if found and not other_writer(os.path.dirname(path)):
        raise UnsafePathError(f"{given} leads to a folder of root by a way that others can change: {found}")
    with opened_folder(os.path.dirname(path)) as folder:
        name = os.path.basename(path)
        old = _look(name, folder, path)
        with _lesser_rights(path, old or os.fstat(folder)):
            try:
                _replace(folder, name, data, old)
            except UnsafePathError:
                raise
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno or 0), path) from error


def clear_temporary(path: str) -> None:
    """Remove what a `write_file` of `path` left beside it that was killed. For those who know that none is at work."""
    path = os.path.realpath(path)
    try:
        with opened_folder(os.path.dirname(path)) as folder:
            ours = re.compile(rf"\.{re.escape(os.path.basename(path))}\.[0-9a-f]{{12}}\.tmp")
            for name in filter(ours.fullmatch, os.listdir(f"/proc/self/fd/{folder}")):
                status = _look(name, folder, path)
                if status is not None:
                    with _lesser_rights(path, os.fstat(folder)):
                        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return  # nor is its folder


def _replace(folder: int, name: str, data: bytes, old: os.stat_result | None) -> None:
    temporary = f".{name}.{secrets.token_hex(6)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600, dir_fd=folder)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            if old is not None:
                new = os.fstat(descriptor)
                if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
                    os.fchown(descriptor, old.st_uid, old.st_gid)
                _copy_attributes(name, folder, descriptor)
                os.fchmod(descriptor, old.st_mode & 0o777)
            file.flush()
            os.fsync(descriptor)
        try:
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            _write_in_place(name, folder, data)
            os.unlink(temporary, dir_fd=folder)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        raise
    readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.fsync(readable)
    finally:
        os.close(readable)


def _write_in_place(name: str, folder: int, data: bytes) -> None:
    """For a file that is a mount of its own, as containers have them, which no other can be renamed over.

    Cut short, the file is the new content up to some byte and the old one from there on.
    """
    descriptor = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with open(descriptor, "wb", buffering=0) as file:
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
        file.truncate()
        os.fsync(descriptor)


def _copy_attributes(name: str, folder: int, target: int) -> None:
    """The extended attributes of the old file, as far as this user and the file system allow."""
    source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        for attribute in os.listxattr(source):
            if attribute != "security.capability":
                os.setxattr(target, attribute, os.getxattr(source, attribute))
    except OSError as error:
        if error.errno not in PASSED_BY:
            raise
    finally:
        os.close(source)
