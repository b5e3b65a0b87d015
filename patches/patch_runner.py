#!/usr/bin/env python3
"""Patch MLNode's runner.py, so that the vLLM it starts serves proof of compute.

The syntax tree finds the places, whole lines are inserted there between markers, and every other byte stays. So
taking the patch back is taking out the marked lines, also after the file was edited elsewhere. A file whose shape is
not known is left alone. Standard library only. runner_patch.md says what is inserted and why.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import errno
import hashlib
import os
import re
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

FOLDER = os.path.dirname(os.path.realpath(__file__))
sys.path.append(FOLDER)  # `python -I` leaves out the folder of the script that it runs

from runner_shape import PatchError, UnknownShapeError, find_blocks, leading_space  # noqa: E402
from safe_files import read_file, write_file  # noqa: E402

PATCH_VERSION = 4
PROFILES = ("standard", "graphs", "hardened")
OK, IO_ERROR, USAGE_ERROR, NOT_PATCHED, UNKNOWN_SHAPE, OTHER_PATCH = range(6)

EXIT_CODES = """\
exit codes:
  0  done, or nothing to do; check: patched by this version with this profile
  1  a file or folder cannot be read or written; nothing was changed
  2  wrong usage
  3  check: not patched, and can be
  4  the shape of the file is not known; nothing was changed, and the steps to do it by hand were printed
  5  check: patched by another version or profile, or the patch is damaged; apply, revert, diff: the patch is damaged,
     and nothing was changed
"""


class DamagedPatchError(PatchError):
    """The inserted lines are not as they were inserted."""

    exit_code, problem = OTHER_PATCH, "the patch in it is damaged"
    advice = "undo that edit, or delete by hand what is between the markers '>>> gonka-poc' and '<<< gonka-poc'\n"


class Variant(NamedTuple):
    """A profile, whether vLLM must run without compilation, and whether it replays chats."""

    profile: str = "standard"
    enforce_eager: bool = True
    replay: bool = False

    @property
    def name(self) -> str:
        name = "hardened-cuda-graphs" if self.profile == "hardened" and not self.enforce_eager else self.profile
        return f"{name}-replay" if self.replay else name

    @property
    def left_out(self) -> list[str]:
        """The options and variables of the profile `standard` with replays that this one does without."""
        graphs = [] if self.enforce_eager else ["--enforce-eager", "VLLM_USE_CUDA_GRAPHS"]
        graphs += [] if self.replay else ["--logprobs-mode", "--logits-processors", "VLLM_USE_V2_MODEL_RUNNER"]
        return graphs + (["VLLM_ALLOW_INSECURE_SERIALIZATION"] if self.profile == "hardened" else [])


NOTE = "take it back: patch_runner.py revert"  # the installer names its journal instead
BEGIN = re.compile(rb"[ \t]*# >>> gonka-poc patch v(\d+) (\S+) ([0-9a-f]{12}) (?:\(([^)\r\n]*)\))?")
END = re.compile(rb"[ \t]*# <<< gonka-poc patch\s*")
LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


def make_patched(original: bytes, variant: Variant, note: str = NOTE) -> bytes:
    """The file with the patch in it; UnknownShapeError if it cannot be put there."""
    lines = LINE.findall(original)
    try:
        blocks = find_blocks(_parse(original), lines, partial(_definitions, variant))
    except RecursionError as error:
        raise UnknownShapeError("it is nested too deeply") from error
    for number in sorted(blocks, reverse=True):
        lines[number:number] = _marked(blocks[number], variant, note, lines, number)
    patched = b"".join(lines)
    _parse(patched)
    if remove_patch(patched)[0] != original:
        raise UnknownShapeError("the patch could not be taken back from this file")
    return patched


def remove_patch(data: bytes) -> tuple[bytes, set[str]]:
    """The file without the inserted blocks, and what their markers name ("v1 standard"); or DamagedPatchError."""
    kept: list[bytes] = []
    marks: set[str] = set()
    block: list[bytes] | None = None
    digest, begun = "", 0
    for number, line in enumerate(LINE.findall(data), 1):
        begin = BEGIN.match(line)
        if begin and block is None:
            version, variant, digest = (group.decode("ascii", "replace") for group in begin.groups()[:3])
            marks.add(f"v{version} {variant}")
            block, begun = [], number
        elif begin or (END.fullmatch(line) and block is None):
            raise DamagedPatchError(f"the marker in line {number} has no partner")
        elif block is None:
            kept.append(line)
        elif END.fullmatch(line):
            if _digest(block) != digest:
                raise DamagedPatchError(f"the inserted lines {begun} to {number} were changed")
            block = None
        else:
            block.append(line)
    if block is not None:
        raise DamagedPatchError(f"the marker in line {begun} has no partner")
    return b"".join(kept), marks


def note_in(data: bytes) -> str:
    """The note in the first marker of the file, which a new patch keeps; else the usual one."""
    begin = next(filter(None, map(BEGIN.match, LINE.findall(data))), None)
    return begin[4].decode("ascii", "replace") if begin and begin[4] else NOTE


def _parse(data: bytes) -> ast.Module:
    """The syntax tree, of a file that also compiles; the coding cookie and the byte order mark count."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the file's own, such as an invalid escape
            compile(data, "runner.py", "exec", dont_inherit=True)
            return ast.parse(data)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnknownShapeError(f"Python {sys.version.split()[0]} cannot compile it: {error}") from error


def _definitions(variant: Variant, indent_unit: str) -> list[str]:
    """The lines of runner_inserted.py from its first definition on, without what the profile leaves out."""
    with open(os.path.join(FOLDER, "runner_inserted.py"), encoding="ascii") as file:
        _, begin, text = file.read().partition("_GONKA_POC_OPTIONS = ")
    left_out = tuple(f'    "{name}": ' for name in variant.left_out)
    lines = [line for line in (begin + text).split("\n") if not (left_out and line.startswith(left_out))]
    return [re.sub(r"^(?:    )+", lambda spaces: indent_unit * (len(spaces[0]) // 4), line) for line in [*lines, ""]]


def _digest(block: Sequence[bytes]) -> str:
    """Of the text without its indentation and line ends, which editors and git convert for the whole file."""
    return hashlib.sha256(b"\n".join(line.strip() for line in block)).hexdigest()[:12]


def _marked(block: Sequence[str], variant: Variant, note: str, lines: Sequence[bytes], number: int) -> list[bytes]:
    """The block between markers, indented as the line it goes before, with the line end of the one above."""
    digest = _digest([line.encode() for line in block])
    begin = f"# >>> gonka-poc patch v{PATCH_VERSION} {variant.name} {digest} ({note})"
    indent = leading_space(lines[number])
    above = lines[number - 1] if number else b"\n"
    end = above[len(above.rstrip(b"\r\n")) :]
    return [(indent + line if line else "").encode() + end for line in (begin, *block, "# <<< gonka-poc patch")]


def is_mount(path: str) -> bool:
    """True if the file is a mount of its own, so that it can only be written in place."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            points = [line.split(" ")[4] for line in file]
    except OSError:
        return False
    return path in (re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point) for point in points)


def is_cut_short(current: bytes, old: bytes, new: bytes) -> bool:
    """True if `current` is what is left where `new` was being written over `old` in place."""
    alike = zip(current, new, strict=False)
    written = next((index for index, (one, other) in enumerate(alike) if one != other), min(len(current), len(new)))
    return current not in (old, new) and current[written:] == old[written:]


def run_apply(args: argparse.Namespace) -> int:
    data = read_file(args.target)
    original, marks = remove_patch(data)
    patched = make_patched(original, args.variant, note_in(data))
    if patched == data:
        print(f"already patched ({args.variant.name}), nothing to do: {args.target}")
        return OK
    write_file(args.target, patched)
    before = f", instead of {', '.join(sorted(marks))}" if marks else ""
    print(f"patched ({args.variant.name}{before}): {args.target}")
    return OK


def run_check(args: argparse.Namespace) -> int:
    data = read_file(args.target)
    original, marks = remove_patch(data)
    found = ", ".join(sorted(marks))
    text, code = "not patched", NOT_PATCHED
    if marks:
        text, code = f"patched by another version or profile ({found})", OTHER_PATCH
    try:
        if make_patched(original, args.variant, note_in(data)) == data:
            text, code = f"patched ({args.variant.name})", OK
    except UnknownShapeError as error:
        if not marks:
            raise
        text = f"patched ({found}), but the code around it changed ({error})"
    print(f"{text}: {args.target}")
    return code


def run_diff(args: argparse.Namespace) -> int:
    data = read_file(args.target)
    patched = make_patched(remove_patch(data)[0], args.variant, note_in(data))
    name = os.fsencode(args.target)
    before, after = (re.findall(rb"[^\n]*\n|[^\n]+", text) for text in (data, patched))
    for line in difflib.diff_bytes(difflib.unified_diff, before, after, name, name):
        sys.stdout.buffer.write(line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n")
    return OK


def run_revert(args: argparse.Namespace) -> int:
    original, marks = remove_patch(read_file(args.target))
    if marks:
        write_file(args.target, original)
    print(f"{'patch taken out' if marks else 'not patched, nothing to do'}: {args.target}")
    return OK


COMMANDS = {"apply": run_apply, "check": run_check, "revert": run_revert, "diff": run_diff}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("patch_runner.py", epilog=EXIT_CODES, formatter_class=raw, allow_abbrev=False)
    parser.description = (__doc__ or "").split("\n")[0]
    commands = "apply: put the patch in; check: only look; revert: take it out; diff: print what apply would change"
    parser.add_argument("command", choices=COMMANDS, help=commands)
    parser.add_argument("file", metavar="FILE", help="MLNode's runner.py; where it is a link, its target is patched")
    profiles = (
        "standard (default): chat in eager mode; graphs: without --enforce-eager, so chat keeps its CUDA graphs, "
    )
    profiles += "which needs vLLM 0.15; hardened: does not set VLLM_ALLOW_INSECURE_SERIALIZATION"
    parser.add_argument("--profile", choices=PROFILES, default="standard", help=profiles)
    without = "with hardened, where vLLM can skip the compiled forward: no --enforce-eager, as graphs"
    parser.add_argument("--no-enforce-eager", dest="enforce_eager", action="store_false", help=without)
    replays = "chats as the network accepts them, and its replays: --logits-processors, --logprobs-mode, the V1 runner"
    parser.add_argument("--replay", action="store_true", help=replays)
    args = parser.parse_args(argv)
    if not args.enforce_eager and args.profile == "standard":
        parser.error("standard without --enforce-eager is --profile graphs")
    args.variant = Variant(args.profile, args.enforce_eager and args.profile != "graphs", args.replay)
    args.target = os.path.realpath(args.file)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        return COMMANDS[args.command](args)
    except PatchError as error:
        _complain(f"{args.target} was not changed, {error.problem}: {error}")
        sys.stderr.write(error.advice)
        return error.exit_code
    except OSError as error:
        _complain(f"{error.filename or args.target}: {error.strerror or error}; nothing was changed")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            _complain(f"run it as the owner of {args.target} or as root, and where its folder can be written")
        return IO_ERROR


def _complain(text: str) -> None:
    print(f"patch_runner.py: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a path that this locale cannot write is no reason to fail
    sys.exit(main())
