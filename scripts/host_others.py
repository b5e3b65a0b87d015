"""Packages of other projects that stand where ours goes, and what is lost with them."""

from __future__ import annotations

import configparser
import email
import os
from collections.abc import Mapping
from pathlib import Path

from host_common import IMPORT_NAME, PACKAGE, RefusalError
from host_target import Distribution, Target

OWN_EARLIER_NAME = "gonka-poc"  # until 0.1.0; another project's package has that name too
OWN_SUMMARY = "Proof of compute for unmodified vLLM"
ADVICE = "--replace-other goes on without it; --uninstall brings it back"


def others_of(target: Target) -> dict[str, Distribution]:
    """The packages of this Python, other than ours, that have files of our import name or our earlier name."""
    folder = os.path.join(os.path.realpath(target.purelib), IMPORT_NAME, "")
    return {
        name: found
        for name, found in target.own().items()
        if name != PACKAGE
        and (name == OWN_EARLIER_NAME or any(os.path.realpath(file).startswith(folder) for file in found.files or []))
    }


def refuse_others(target: Target, allowed: bool) -> None:
    """RefusalError for another project's package, files that no package lists, or a fork of vLLM with its own proof."""
    if PACKAGE in target.own():
        return
    others = others_of(target)
    for name, found in others.items():
        if not allowed and not is_earlier_release(found):
            raise RefusalError(f"{describe(name, found)} is in the way: it has the import name {IMPORT_NAME}\n{ADVICE}")
    unlisted = unlisted_files(target, others)
    if unlisted:
        problem = f"files that no package lists are in the way: {', '.join(unlisted)}"
        raise RefusalError(f"{problem}\nmove {Path(target.purelib, IMPORT_NAME)} away, then run this again")
    fork = Path(target.vllm).parent / "poc" if target.vllm else None
    if not allowed and fork is not None and fork.is_dir():
        name, version = target.installed_vllm() or ("vllm", "")
        problem = f"{name} {version} has a proof of compute of its own in {fork}: our middleware hides its routes"
        raise RefusalError(f"{problem} (/api/v1/pow/*), and with them its decode proofs\n{ADVICE}")


def is_earlier_release(found: Distribution) -> bool:
    """True for our own package under its earlier name, by its summary."""
    return (read_metadata(found).get("Summary") or "").startswith(OWN_SUMMARY)


def describe(name: str, found: Distribution) -> str:
    """The package by its metadata, and what goes with it."""
    metadata = read_metadata(found)
    about = [metadata.get("Summary"), metadata.get("Home-page"), *metadata.get_all("Project-URL", [])]
    text = f"{metadata.get('Name') or name} {found.version}"
    text += f" ({'; '.join(filter(None, about))})" if any(about) else ""
    points = [f"{group} {point}" for group, names in entry_points(found).items() for point in names]
    return f"{text}, with its decode proofs and its entry points ({', '.join(points) or 'none'}),"


def read_metadata(found: Distribution) -> email.message.Message:
    path = Path(found.folder, "METADATA")
    return email.message_from_string(path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "")


def entry_points(found: Distribution) -> Mapping[str, list[str]]:
    """The names of the package's entry points, by group."""
    parser = configparser.ConfigParser(delimiters=("=",), interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(Path(found.folder, "entry_points.txt"), encoding="utf-8")
    return {group: list(parser[group]) for group in parser.sections()}


def unlisted_files(target: Target, others: Mapping[str, Distribution]) -> list[str]:
    """Files under our import name that none of the packages lists, byte code left out."""
    listed = {os.path.realpath(file) for found in others.values() for file in found.files or []}
    every = Path(target.purelib, IMPORT_NAME).rglob("*")
    files = [path for path in every if not path.is_dir() and "__pycache__" not in path.parts]
    return sorted(str(path) for path in files if os.path.realpath(path) not in listed)
