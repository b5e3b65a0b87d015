#!/usr/bin/env python3
"""Patch MLNode's runner.py, so that the vLLM it starts serves proof of compute.

The syntax tree finds the places, whole lines are inserted there between markers, and every other byte stays. So
taking the patch back is taking out the marked lines, also after the file was edited elsewhere. A file whose shape is
not known is left alone. Standard library only. runner_patch.md says what is inserted and why.
"""

from __future__ import annotations

import argparse
import ast
import base64
import difflib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

PATCH_VERSION = 1
RECORD_FORMAT = 1

RUNNER_CLASS = "VLLMRunner"
START_METHOD = "start"
COMMAND_NAMES = ("command", "vllm_command")

EAGER_OPTION = "--enforce-eager"
MIDDLEWARE = "gonka_poc.middleware.PoCMiddleware"
WORKER_EXTENSION = "gonka_poc.worker.PoCWorkerExtension"

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

examples:
  patch_runner.py diff runner.py
  patch_runner.py apply runner.py --profile hardened --state-dir /var/lib/gonka-poc
  patch_runner.py revert runner.py --state-dir /var/lib/gonka-poc
"""

MANUAL_STEPS = f"""\
1. Keep a copy of the file.
2. Find the list of the vLLM command (`... "-m", "vllm.entrypoints.openai.api_server" ...`). At its very end, behind the
   operator's additional args, add what these do not already bring:

       + [
           "{EAGER_OPTION}",
           "--middleware", "{MIDDLEWARE}",
           "--worker-extension-cls", "{WORKER_EXTENSION}",
       ]

   vLLM takes several `--middleware`, but one `--worker-extension-cls`.
3. Find the child's environment (`env = os.environ.copy()`). Just before the process is started, add:

       env["VLLM_USE_V1"] = "1"
       env["VLLM_USE_CUDA_GRAPHS"] = "0"
       env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"

4. Profile hardened: leave out VLLM_ALLOW_INSECURE_SERIALIZATION; and, where the installed vLLM can skip the compiled
   forward, `{EAGER_OPTION}` and VLLM_USE_CUDA_GRAPHS too.
5. `python3 -m py_compile runner.py`, then restart MLNode. vLLM's port must answer `GET /api/v1/pow/status`.
"""

# The functions below are put into runner.py as they are here: MLNode's Python need not have gonka_poc installed.
COMMAND_FUNCTION = '''\
def _gonka_poc_command(command):
    """`command` with each of these options once, at its end; what the operator chose otherwise stays."""
    words, kept, names = list(command), [], set()
    while words:
        name, equals, value = str(words[0]).partition("=")
        name = name.replace("_", "-")
        own_value, length = _GONKA_POC_OPTIONS.get(name), 1
        if own_value and not equals and len(words) > 1 and not str(words[1]).startswith("--"):
            value, length = words[1], 2
        if value != own_value:
            kept += words[:length]
            names.add(name)
        del words[:length]
    for name, value in _GONKA_POC_OPTIONS.items():
        replaced = name in names or "--no-" + name[2:] in names
        if name == "--middleware" or not replaced:  # the only one of which vLLM takes several
            kept += [name, value] if value else [name]
    return kept
'''


# PatchError               any reason not to do what was asked; nothing was changed
# +- FileProblemError      the path is not a file that can be read
# +- UnknownShapeError     the file is not a runner.py of a known shape
# +- DamagedPatchError     the inserted lines are not as they were inserted
class PatchError(Exception):
    """Says in one sentence what stands in the way."""

    exit_code = IO_ERROR


class FileProblemError(PatchError):
    """The path is not a file that can be read."""


class UnknownShapeError(PatchError):
    """The file is not a runner.py of a known shape."""

    exit_code = UNKNOWN_SHAPE


class DamagedPatchError(PatchError):
    """The inserted lines are not as they were inserted."""

    exit_code = OTHER_PATCH


@dataclass(frozen=True)
class Variant:
    """What is asked for: a profile, and whether vLLM must run without compilation."""

    profile: str = "standard"
    enforce_eager: bool = True

    @property
    def name(self) -> str:
        return self.profile if self.enforce_eager else f"{self.profile}-cuda-graphs"

    def options(self) -> dict[str, str]:
        """Option and value, "" for a flag."""
        options = {"--middleware": MIDDLEWARE, "--worker-extension-cls": WORKER_EXTENSION}
        return {EAGER_OPTION: "", **options} if self.enforce_eager else options

    def environment(self) -> dict[str, str]:
        environment = {"VLLM_USE_V1": "1"}
        if self.enforce_eager:
            environment["VLLM_USE_CUDA_GRAPHS"] = "0"
        if self.profile == "standard":
            environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        return environment


# ---------------------------------------------------------------------------------------------------------------------
# Where: anchors in the syntax tree

SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
LIST_MUTATORS = {"append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"}
Assignment = ast.Assign | ast.AnnAssign
Found = TypeVar("Found")


@dataclass(frozen=True)
class Site:
    """Where the lines go (0-based line numbers to insert before) and the names that they need."""

    class_line: int
    command_line: int
    command_name: str
    env_line: int
    env_name: str
    indent_unit: str


def find_site(tree: ast.Module, lines: Sequence[bytes]) -> Site:
    """The one place to patch; UnknownShapeError unless every anchor is there exactly once and fits the others."""
    runners = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == RUNNER_CLASS]
    runner = _only(runners, f"class {RUNNER_CLASS} at the top level")
    starts = [node for node in runner.body if isinstance(node, ast.FunctionDef) and node.name == START_METHOD]
    start = _only(starts, f"method {RUNNER_CLASS}.{START_METHOD}")

    command = _only([a for a in _assignments(start) if _is_vllm_command(a)], "vLLM command list + self.additional_args")
    derived = _derived(start, command)
    names = {_target(node) for node in (command, *derived)}
    popens = [node for node in _walk(start) if isinstance(node, ast.Call) and _is_popen(node)]
    launches = [call for call in popens if _mentions(_command_of(call), names)]
    launch = _only(launches, "subprocess.Popen of that command")
    first_use = _first_use(start, command, [*derived, launch])
    return Site(
        class_line=_own_line(runner, lines),
        command_line=_own_line(first_use, lines),
        command_name=_target(command),
        env_line=_own_line(_innermost_statement(start, launch), lines),
        env_name=_environment_name(start, launch),
        indent_unit=_leading_space(lines[start.lineno - 1]),
    )


def _only(found: Sequence[Found], what: str) -> Found:
    if len(found) != 1:
        where = ", ".join(str(getattr(node, "lineno", "?")) for node in found)
        raise UnknownShapeError(f"expected one {what}, found {len(found)}" + (f" (lines {where})" if found else ""))
    return found[0]


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and what is in it, without the insides of nested functions and classes."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, SCOPES):
            yield from _walk(child)


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Every list of statements in `node`, outer before inner, without those of nested functions and classes."""
    for _, value in ast.iter_fields(node):
        if isinstance(value, list) and value:
            if isinstance(value[0], ast.stmt):
                yield value
            for child in value:
                if isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)) and not isinstance(child, SCOPES):
                    yield from _blocks(child)


def _assignments(function: ast.FunctionDef) -> list[Assignment]:
    """The assignments to one plain name, in the order of the file."""
    found = [node for node in _walk(function) if isinstance(node, (ast.Assign, ast.AnnAssign)) and _target(node)]
    return sorted(found, key=_at)


def _target(node: ast.AST) -> str:
    """The plain name that a statement assigns to, or an empty string."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target: ast.AST = node.targets[0]
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        target = node.target
    else:
        return ""
    return target.id if isinstance(target, ast.Name) else ""


def _at(node: Any) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _is_vllm_command(node: Assignment) -> bool:
    """`command = [..., "-m", ..., "--host", ...] + self.additional_args`, perhaps with more lists added."""
    terms = _sum_terms(node.value) if node.value else []
    return (
        _target(node) in COMMAND_NAMES
        and len(terms) > 1
        and isinstance(terms[0], ast.List)
        and {"-m", "--host"} <= {word.value for word in terms[0].elts if isinstance(word, ast.Constant)}
        and any(ast.unparse(term) == "self.additional_args" for term in terms[1:])
    )


def _sum_terms(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_sum_terms(node.left), *_sum_terms(node.right)]
    return [node]


def _is_popen(call: ast.Call) -> bool:
    return ast.unparse(call.func) in ("subprocess.Popen", "Popen")


def _keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def _command_of(launch: ast.Call) -> ast.expr | None:
    return launch.args[0] if launch.args else _keyword(launch, "args")


def _mentions(node: ast.AST | None, names: set[str]) -> bool:
    return node is not None and any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))


def _derived(start: ast.FunctionDef, command: Assignment) -> list[Assignment]:
    """The assignments that make something of the command before it is started: `sh -c` and its string."""
    name = _target(command)
    names, derived = {name}, []
    for node in _assignments(start):
        grows = _target(node) == name and isinstance(node.value, ast.BinOp)
        if _at(node) > _at(command) and not grows and _mentions(node.value, names):
            names.add(_target(node))
            derived.append(node)
    return derived


def _environment_name(start: ast.FunctionDef, launch: ast.Call) -> str:
    """The variable that holds the child's environment: a copy, so changing it changes nothing else."""
    env = _keyword(launch, "env")
    if not isinstance(env, ast.Name):
        raise UnknownShapeError("subprocess.Popen has no `env=` variable")
    made = _only([a for a in _assignments(start) if _target(a) == env.id], f"assignment to `{env.id}`")
    if made.value is None or ast.unparse(made.value) != "os.environ.copy()":
        raise UnknownShapeError(f"`{env.id}` in line {made.lineno} is not os.environ.copy()")
    return env.id


def _first_use(start: ast.FunctionDef, command: Assignment, uses: Sequence[ast.AST]) -> ast.stmt:
    """The first statement behind the command, in the same block, that uses it; nothing may change it later."""
    block = next(block for block in _blocks(start) if any(statement is command for statement in block))
    behind = [s for s in block if _at(s) > _at(command) and any(_contains(s, use) for use in uses)]
    if not behind:
        raise UnknownShapeError("the vLLM command is made in one block and used in another")
    name, first = _target(command), behind[0]
    replaced = [node for use in uses if isinstance(use, (ast.Assign, ast.AnnAssign)) for node in ast.walk(use)]
    for node in _walk(start):
        if _changes(node, name) and _at(node) > _at(first) and not any(node is other for other in replaced):
            raise UnknownShapeError(f"`{name}` is used in line {first.lineno} and changed after that")
    return first


def _contains(outer: ast.AST, inner: ast.AST) -> bool:
    return any(node is inner for node in _walk(outer))


def _innermost_statement(start: ast.FunctionDef, node: ast.AST) -> ast.stmt:
    return [statement for block in _blocks(start) for statement in block if _contains(statement, node)][-1]


def _changes(node: ast.AST, name: str) -> bool:
    """Whether `node` gives the list another content or the name another value."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner = node.func.value
        return isinstance(owner, ast.Name) and owner.id == name and node.func.attr in LIST_MUTATORS
    if isinstance(node, (ast.Name, ast.Subscript)):
        owner = node.value if isinstance(node, ast.Subscript) else node
        return isinstance(owner, ast.Name) and owner.id == name and not isinstance(node.ctx, ast.Load)
    return False


def _own_line(node: ast.stmt, lines: Sequence[bytes]) -> int:
    """The 0-based line that the statement, or its first decorator, begins; it must have it for itself."""
    if lines[node.lineno - 1][: node.col_offset].strip():
        raise UnknownShapeError(f"line {node.lineno} holds more than one statement")
    decorators = node.decorator_list if isinstance(node, ast.ClassDef) else []
    return min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1


def _leading_space(line: bytes) -> str:
    return line[: len(line) - len(line.lstrip())].decode("ascii")


# ---------------------------------------------------------------------------------------------------------------------
# What: blocks of lines between markers

BEGIN = re.compile(rb"[ \t]*# >>> gonka-poc patch v(\d+) (\S+) ([0-9a-f]{12}) ")
END = re.compile(rb"[ \t]*# <<< gonka-poc patch\s*")
LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


@dataclass(frozen=True)
class Mark:
    """What the first line of a block says."""

    line: int
    version: int
    variant: str


def make_patched(original: bytes, variant: Variant) -> bytes:
    """The file with the patch in it; UnknownShapeError if it cannot be put there."""
    lines = LINE.findall(original)
    try:
        site = find_site(_parse(original), lines)
    except RecursionError as error:
        raise UnknownShapeError("it is nested too deeply") from error
    use_command = f"{site.command_name} = _gonka_poc_command({site.command_name})"
    use_env = f"{site.env_name}.update(_GONKA_POC_ENV)"
    if site.command_line == site.env_line:
        blocks = {site.command_line: [use_command, use_env]}
    else:
        blocks = {site.command_line: [use_command], site.env_line: [use_env]}
    blocks[site.class_line] = _definitions(variant, site.indent_unit)
    for number in sorted(blocks, reverse=True):
        lines[number:number] = _as_lines(_sealed(blocks[number], variant), lines, number)
    patched = b"".join(lines)
    _parse(patched)
    if remove_patch(patched)[0] != original:
        raise UnknownShapeError("the patch could not be taken back from this file")
    return patched


def remove_patch(data: bytes) -> tuple[bytes, list[Mark]]:
    """The file without the inserted blocks, and their marks; DamagedPatchError if one is not as it was inserted."""
    kept: list[bytes] = []
    marks: list[Mark] = []
    block: list[bytes] | None = None
    digest = b""
    for number, line in enumerate(LINE.findall(data), 1):
        begin = BEGIN.match(line)
        if begin and block is None:
            block, digest = [], begin[3]
            marks.append(Mark(number, int(begin[1]), begin[2].decode("ascii", "replace")))
        elif begin or (END.fullmatch(line) and block is None):
            raise DamagedPatchError(f"the marker in line {number} has no partner")
        elif block is None:
            kept.append(line)
        elif END.fullmatch(line):
            if _digest(block) != digest.decode():
                raise DamagedPatchError(f"the inserted lines {marks[-1].line} to {number} were changed")
            block = None
        else:
            block.append(line)
    if block is not None:
        raise DamagedPatchError(f"the marker in line {marks[-1].line} has no partner")
    return b"".join(kept), marks


def _parse(data: bytes) -> ast.Module:
    """The syntax tree, of a file that also compiles; the coding cookie and the byte order mark count."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the file's own, such as an invalid escape
            compile(data, "runner.py", "exec", dont_inherit=True)
            return ast.parse(data)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        version = ".".join(map(str, sys.version_info[:2]))
        raise UnknownShapeError(f"Python {version} cannot compile it: {error}") from error


def _definitions(variant: Variant, indent_unit: str) -> list[str]:
    text = "\n".join(
        [
            *_dict_lines("_GONKA_POC_OPTIONS", variant.options()),
            *_dict_lines("_GONKA_POC_ENV", variant.environment()),
            "",
            "",
            COMMAND_FUNCTION,
            "",
        ]
    )
    return [_reindented(line, indent_unit) for line in text.split("\n")]


def _dict_lines(name: str, values: dict[str, str]) -> list[str]:
    return [f"{name} = {{", *(f'    "{key}": "{value}",' for key, value in values.items()), "}"]


def _reindented(line: str, unit: str) -> str:
    text = line.lstrip(" ")
    return unit * ((len(line) - len(text)) // 4) + text


def _sealed(block: Sequence[str], variant: Variant) -> list[str]:
    """The block between its markers; the digest shows later whether somebody edited it."""
    digest = _digest([line.encode() for line in block])
    begin = f"# >>> gonka-poc patch v{PATCH_VERSION} {variant.name} {digest} (take it back: patch_runner.py revert)"
    return [begin, *block, "# <<< gonka-poc patch"]


def _digest(block: Sequence[bytes]) -> str:
    """Of the text without its indentation and line ends, which editors and git convert for the whole file."""
    return hashlib.sha256(b"\n".join(line.strip() for line in block)).hexdigest()[:12]


def _as_lines(block: Sequence[str], lines: Sequence[bytes], number: int) -> list[bytes]:
    """The block as bytes, with the indentation of the line it goes before and the line end of the one above."""
    indent = _leading_space(lines[number])
    above = lines[number - 1] if number else b"\n"
    end = above[len(above.rstrip(b"\r\n")) :]
    return [(indent + line if line else "").encode() + end for line in block]


# ---------------------------------------------------------------------------------------------------------------------
# Files


@dataclass(frozen=True)
class Record:
    """The original, kept beside the file or in the state folder for as long as the patch is in."""

    path: str
    original: bytes
    original_sha256: str
    patched_sha256: str


def read_file(path: str) -> bytes:
    """The bytes of a plain file; FileProblemError where `path` is something else."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise FileProblemError(f"{path} is a folder: give the path of the file runner.py")
    if not stat.S_ISREG(status.st_mode):
        raise FileProblemError(f"{path} is not a plain file")
    with open(path, "rb") as file:
        return file.read()


@contextmanager
def staged(path: str, data: bytes, like: str) -> Iterator[str]:
    """A complete, synced sibling of `path` with the owner and mode of `like`, to rename; gone if it was not."""
    folder, name = os.path.split(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        wanted, got = os.stat(like), os.stat(temporary)
        if (wanted.st_uid, wanted.st_gid) != (got.st_uid, got.st_gid):
            os.chown(temporary, wanted.st_uid, wanted.st_gid)
        shutil.copystat(like, temporary)
        os.utime(temporary)
        yield temporary
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def record_path(target: str, state_dir: str | None) -> str:
    """Beside the target, or in the state folder under a name of its own for each target."""
    folder, name = os.path.split(target)
    if state_dir is None:
        return os.path.join(folder, f".{name}.gonka-poc.json")
    return os.path.join(os.path.abspath(state_dir), f"{name}.{_sha256(os.fsencode(target))[:12]}.gonka-poc.json")


def make_record(target: str, original: bytes, patched: bytes, variant: Variant) -> bytes:
    record = {
        "format": RECORD_FORMAT,
        "file": target,
        "patch_version": PATCH_VERSION,
        "variant": variant.name,
        "original_sha256": _sha256(original),
        "patched_sha256": _sha256(patched),
        "original_base64": base64.b64encode(original).decode("ascii"),
    }
    return (json.dumps(record, indent=2) + "\n").encode("ascii")


def read_record(path: str) -> Record | None:
    """The record, or None where there is none; FileProblemError if it contradicts itself."""
    try:
        fields = json.loads(read_file(path))
        original = base64.b64decode(fields["original_base64"], validate=True)
        record = Record(path, original, fields["original_sha256"], fields["patched_sha256"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise FileProblemError(f"{path} is not a record of this tool: {error!r}") from error
    if _sha256(original) != record.original_sha256:
        raise FileProblemError(f"{path} holds an original that does not have its own sha256")
    return record


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Commands: each takes the parsed arguments, prints one line and returns the exit code


def run_apply(args: argparse.Namespace) -> int:
    data = read_file(args.target)
    original, marks = remove_patch(data)
    patched = make_patched(original, args.variant)
    if patched == data:
        print(f"already patched ({args.variant.name}), nothing to do: {args.target}")
        return OK
    if args.state_dir:
        os.makedirs(args.state_dir, exist_ok=True)
    record = make_record(args.target, original, patched, args.variant)
    # both are complete on disk before either is renamed, and the record goes first: a crash in between leaves a
    # record that nothing needs, never a patched file without one
    with staged(args.target, patched, args.target) as new, staged(args.record, record, args.target) as new_record:
        os.replace(new_record, args.record)
        os.replace(new, args.target)
    before = f", instead of {_describe(marks)}" if marks else ""
    print(f"patched ({args.variant.name}{before}): {args.target}; the original is kept in {args.record}")
    return OK


def run_check(args: argparse.Namespace) -> int:
    data = read_file(args.target)
    marks: list[Mark] = []
    try:
        original, marks = remove_patch(data)
        patched = make_patched(original, args.variant)
    except DamagedPatchError as error:
        print(f"damaged patch: {args.target}: {error}")
        return OTHER_PATCH
    except UnknownShapeError as error:
        if not marks:
            raise
        print(f"patched ({_describe(marks)}), but the code around it changed: {args.target}: {error}")
        return OTHER_PATCH
    if patched == data:
        print(f"patched ({args.variant.name}): {args.target}")
        return OK
    if marks:
        print(f"patched by another version or profile ({_describe(marks)}): {args.target}")
        return OTHER_PATCH
    print(f"not patched: {args.target}")
    return NOT_PATCHED


def run_diff(args: argparse.Namespace) -> int:
    data = read_file(args.target)
    patched = make_patched(remove_patch(data)[0], args.variant)
    name = os.fsencode(args.target)
    before, after = (re.findall(rb"[^\n]*\n|[^\n]+", text) for text in (data, patched))
    sys.stdout.flush()
    for line in difflib.diff_bytes(difflib.unified_diff, before, after, name, name):
        sys.stdout.buffer.write(line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n")
    sys.stdout.buffer.flush()
    return OK


def run_revert(args: argparse.Namespace) -> int:
    data = read_file(args.target)
    if args.discard_edits:
        record = read_record(args.record)
        if record is None:
            raise FileProblemError(f"there is no record of the original: {args.record}")
        original, outcome = record.original, "the recorded original is back, later edits are gone"
    else:
        original, marks = remove_patch(data)
        outcome = _outcome(data, original, args.record) if marks else "not patched, nothing to do"
    if original != data:
        with staged(args.target, original, args.target) as new:
            os.replace(new, args.target)
    with suppress(FileNotFoundError):
        os.unlink(args.record)
    print(f"{outcome}: {args.target}")
    return OK


def _outcome(data: bytes, original: bytes, path: str) -> str:
    """What taking out the marked lines amounts to. The markers are enough for it, the record only proves it."""
    try:
        record = read_record(path)
    except PatchError as error:
        return f"patch taken out; the record could not be compared ({error})"
    if record is None:
        return f"patch taken out; there was no record to compare with ({path})"
    if _sha256(original) == record.original_sha256:
        return "patch taken out, byte for byte as before"
    if _sha256(data) == record.patched_sha256:
        raise FileProblemError(f"{path} names another original for this very file; nothing was changed")
    return "patch taken out; edits made since it was put in are kept"


def _describe(marks: Sequence[Mark]) -> str:
    return ", ".join(sorted({f"v{mark.version} {mark.variant}" for mark in marks}))


COMMANDS = {
    "apply": run_apply,
    "check": run_check,
    "revert": run_revert,
    "diff": run_diff,
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="patch_runner.py",
        description=(__doc__ or "").split("\n")[0],
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "command",
        choices=COMMANDS,
        help="apply: put the patch in; check: only look; revert: take it out; diff: print what apply would change",
    )
    parser.add_argument("file", metavar="FILE", help="MLNode's runner.py; where it is a link, its target is patched")
    parser.add_argument(
        "--profile",
        choices=["standard", "hardened"],
        default="standard",
        help="hardened: do not set VLLM_ALLOW_INSECURE_SERIALIZATION (default: standard)",
    )
    parser.add_argument(
        "--no-enforce-eager",
        dest="enforce_eager",
        action="store_false",
        help=f"with hardened, for a vLLM that can skip the compiled forward: leave out {EAGER_OPTION} and "
        "VLLM_USE_CUDA_GRAPHS=0, so that chat keeps its CUDA graphs",
    )
    parser.add_argument(
        "--state-dir", metavar="DIR", help="folder for the record of the original (default: a dot file beside FILE)"
    )
    parser.add_argument(
        "--discard-edits",
        action="store_true",
        help="with revert: write back the recorded original, whatever FILE holds now",
    )
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if not args.enforce_eager and args.profile != "hardened":
        parser.error("--no-enforce-eager needs --profile hardened")
    if args.discard_edits and args.command != "revert":
        parser.error("--discard-edits belongs to revert")
    args.variant = Variant(args.profile, args.enforce_eager)
    args.target = os.path.realpath(args.file)
    args.record = record_path(args.target, args.state_dir)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        code: int = COMMANDS[args.command](args)
        return code
    except UnknownShapeError as error:
        _complain(f"{args.target} was not changed, its shape is not known: {error}")
        print(f"\nBy hand, with the same result:\n\n{MANUAL_STEPS}", file=sys.stderr, end="")
        return error.exit_code
    except DamagedPatchError as error:
        _complain(f"{args.target} was not changed, the patch in it is damaged: {error}")
        _complain("undo that edit, or take everything since the patch back with: revert --discard-edits")
        return error.exit_code
    except PatchError as error:
        _complain(str(error))
        return error.exit_code
    except OSError as error:
        _complain(f"{error.filename or args.target}: {error.strerror or error}; nothing was changed")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            _complain(f"run it as the owner of {args.target} or as root, and where its folder can be written")
        return IO_ERROR


def _complain(text: str) -> None:
    print(f"patch_runner.py: {text}", file=sys.stderr)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that this locale cannot write is no reason to fail
    sys.exit(main())
