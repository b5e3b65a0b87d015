"""Errors and messages of the installer. Standard library only, Python 3.10 or newer, as in all of host_*.py."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "patches"))  # for patch_runner and safe_files


PACKAGE, IMPORT_NAME = "gonka-poc-vllm", "gonka_poc"
KEPT_INSTALLER = "installer"  # next to the journal; gonka_poc.cli.installer starts its install.sh


class InstallError(Exception):
    """Something stands in the way; the further lines of its text say what to do."""

    exit_code = 1
    printed = False


class RefusalError(InstallError):
    """Found before anything was changed."""

    exit_code = 2


class InterruptionError(BaseException):
    """A signal asks us to stop."""


def say(text: str) -> None:
    print(for_terminal(text), flush=True)


def complain(text: str) -> None:
    print(for_terminal(text), file=sys.stderr, flush=True)


def for_terminal(text: str) -> str:
    """`text`, much of which others wrote, without what could steer a terminal; its lines stay lines."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def version_of(text: str) -> tuple[int, ...]:
    """The release numbers that a version begins with: "0.19.1+cu129" is (0, 19, 1)."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
