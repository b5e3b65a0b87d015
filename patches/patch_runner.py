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
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

FOLDER = os.path.dirname(os.path.realpath(__file__))
sys.path.append(FOLDER)  # `python -I` leaves out the folder of the script that it runs

from safe_files import read_file, write_file  # noqa: E402

PATCH_VERSION = 2
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

   vLLM takes several `--middleware`, but one `--worker-extension-cls`. On GPUs of 70 GiB or more add
   `"--max-num-batched-tokens", "32768"` too, unless it is there or chunked prefill is off.
3. Find the child's environment (`env = os.environ.copy()`). Just before the process is started, add:

       env["VLLM_USE_V1"] = "1"
       env["VLLM_USE_CUDA_GRAPHS"] = "0"
       env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"

4. Profile hardened: leave out VLLM_ALLOW_INSECURE_SERIALIZATION; and, where the installed vLLM can skip the compiled
   forward, `{EAGER_OPTION}` and VLLM_USE_CUDA_GRAPHS too.
5. `python3 -m py_compile runner.py`, then restart MLNode. vLLM's port must answer `GET /api/v1/pow/status`.
"""

# Put into runner.py as it is here: MLNode's Python need not have gonka_poc installed. The limits are gonka_poc.serve's.
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
    return kept + _gonka_poc_batch(names)


def _gonka_poc_batch(names):
    """The option for batches of 32 sequences of 1024 tokens, where no other speaks of it and the GPUs have 70 GiB."""
    import shutil
    import subprocess

    others = {"--config", "--no-enable-chunked-prefill", "--runner", "--convert", "--nnodes", "-n"}
    if any(name.startswith("--max-num-b") for name in names) or others & names or not shutil.which("nvidia-smi"):
        return []
    ask = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        sizes = [int(mib) for mib in subprocess.check_output(ask, timeout=60).split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    return ["--max-num-batched-tokens", "32768"] if min(sizes, default=0) >= 70 * 1024 else []
'''


class PatchError(Exception):
    """The path is not a file that can be patched."""

    exit_code, problem, advice = IO_ERROR, "it cannot be patched", ""


class UnknownShapeError(PatchError):
    """The file is not a runner.py of a known shape."""

    exit_code, problem = UNKNOWN_SHAPE, "its shape is not known"
    advice = f"\nBy hand, with the same result:\n\n{MANUAL_STEPS}"


class DamagedPatchError(PatchError):
    """The inserted lines are not as they were inserted."""

    exit_code, problem = OTHER_PATCH, "the patch in it is damaged"
    advice = "undo that edit, or delete by hand what is between the markers '>>> gonka-poc' and '<<< gonka-poc'\n"


class Variant(NamedTuple):
    """A profile, and whether vLLM must run without compilation."""

    profile: str = "standard"
    enforce_eager: bool = True

    @property
    def name(self) -> str:
        return self.profile if self.enforce_eager else f"{self.profile}-cuda-graphs"


SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
LIST_MUTATORS = {"append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"}


def find_blocks(tree: ast.Module, lines: Sequence[bytes], variant: Variant) -> dict[int, list[str]]:
    """The lines to insert, by the 0-based line they go before; each anchor must be there once, or UnknownShapeError."""
    runners = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "VLLMRunner"]
    runner = _only(runners, "class VLLMRunner at the top level")
    starts = [node for node in runner.body if isinstance(node, ast.FunctionDef) and node.name == "start"]
    start = _only(starts, "method VLLMRunner.start")

    nodes = list(_walk(start))
    assignments = sorted((node for node in nodes if _assigned_name(node)), key=_position)
    command = _only([a for a in assignments if _is_vllm_command(a)], "vLLM command list + self.additional_args")
    name = _assigned_name(command)
    derived = _derived(assignments, command)
    names = {name, *map(_assigned_name, derived)}
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    popens = [call for call in calls if ast.unparse(call.func) in ("subprocess.Popen", "Popen")]
    launches = [call for call in popens if _mentions(_argument(call, "args"), names)]
    launch = _only(launches, "subprocess.Popen of that command")
    use_env = f"{_environment_name(assignments, launch)}.update(_GONKA_POC_ENV)"
    first_use = _first_use(nodes, command, [*derived, launch])
    innermost = [node for node in nodes if isinstance(node, ast.stmt) and launch in _walk(node)][-1]

    blocks = {_own_line(runner, lines): _definitions(variant, _leading_space(lines[start.lineno - 1]))}
    blocks[_own_line(first_use, lines)] = [f"{name} = _gonka_poc_command({name})"]
    blocks.setdefault(_own_line(innermost, lines), []).append(use_env)
    return blocks


def _only(found: Sequence[Any], what: str) -> Any:
    if len(found) != 1:
        where = ", ".join(str(getattr(node, "lineno", "?")) for node in found)
        raise UnknownShapeError(f"expected one {what}, found {len(found)}" + (f" (lines {where})" if found else ""))
    return found[0]


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and what is in it, outer before inner, without nested functions and classes."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, SCOPES):
            yield from _walk(child)


def _assigned_name(node: ast.AST) -> str:
    """The one plain name that `node` gives a value, with or without an annotation; else empty."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
        return ""
    target, *more = node.targets if isinstance(node, ast.Assign) else [node.target]
    return target.id if isinstance(target, ast.Name) and not more else ""


def _position(node: Any) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _is_vllm_command(assignment: Any) -> bool:
    """`command = [..., "-m", ..., "--host", ...] + self.additional_args`, perhaps with more lists added."""
    first, *others = _sum_terms(assignment.value)
    return (
        _assigned_name(assignment) in ("command", "vllm_command")
        and isinstance(first, ast.List)
        and {"-m", "--host"} <= {word.value for word in first.elts if isinstance(word, ast.Constant)}
        and any(ast.unparse(term) == "self.additional_args" for term in others)
    )


def _sum_terms(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_sum_terms(node.left), *_sum_terms(node.right)]
    return [node]


def _argument(launch: ast.Call, name: str) -> ast.expr | None:
    """An argument of Popen; only `args` may be positional."""
    named = {keyword.arg: keyword.value for keyword in launch.keywords}
    return launch.args[0] if name == "args" and launch.args else named.get(name)


def _mentions(node: ast.AST | None, names: set[str]) -> bool:
    return node is not None and any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))


def _derived(assignments: Sequence[Any], command: ast.stmt) -> list[ast.stmt]:
    """The assignments that make something of the command before it is started: `sh -c` and its string."""
    names, derived = {_assigned_name(command)}, []
    for a in assignments[assignments.index(command) + 1 :]:
        grows = _assigned_name(a) == _assigned_name(command) and isinstance(a.value, ast.BinOp)
        if not grows and _mentions(a.value, names):
            names.add(_assigned_name(a))
            derived.append(a)
    return derived


def _environment_name(assignments: Sequence[Any], launch: ast.Call) -> str:
    """The variable that holds the child's environment: a copy, so changing it changes nothing else."""
    env = _argument(launch, "env")
    if not isinstance(env, ast.Name):
        raise UnknownShapeError("subprocess.Popen has no `env=` variable")
    made = _only([a for a in assignments if _assigned_name(a) == env.id], f"assignment to `{env.id}`")
    if ast.unparse(made.value) != "os.environ.copy()":
        raise UnknownShapeError(f"`{env.id}` in line {made.lineno} is not os.environ.copy()")
    return env.id


def _first_use(nodes: Sequence[ast.AST], command: ast.stmt, uses: Sequence[ast.AST]) -> ast.stmt:
    """The first statement behind the command, in the same block, that uses it; nothing may change it later."""
    fields = [value for node in nodes for _, value in ast.iter_fields(node)]
    block: list[ast.stmt] = next(value for value in fields if isinstance(value, list) and command in value)
    behind = block[block.index(command) + 1 :]
    first = next((s for s in behind if any(use in _walk(s) for use in uses)), None)
    if first is None:
        raise UnknownShapeError("the vLLM command is made in one block and used in another")
    made_of_it = [node for use in uses if isinstance(use, ast.stmt) for node in ast.walk(use)]
    name = _assigned_name(command)
    for node in nodes:
        if _changes(node, name) and _position(node) > _position(first) and node not in made_of_it:
            raise UnknownShapeError(f"`{name}` is used in line {first.lineno} and changed after that")
    return first


def _changes(node: ast.AST, name: str) -> bool:
    """True if `node` gives the list another content or the name another value."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner, changing = node.func.value, node.func.attr in LIST_MUTATORS
    elif isinstance(node, (ast.Name, ast.Subscript)):
        owner = node.value if isinstance(node, ast.Subscript) else node
        changing = not isinstance(node.ctx, ast.Load)
    else:
        return False
    return changing and isinstance(owner, ast.Name) and owner.id == name


def _own_line(node: ast.stmt, lines: Sequence[bytes]) -> int:
    """The 0-based line that the statement, or its first decorator, begins; it must have it for itself."""
    if lines[node.lineno - 1][: node.col_offset].strip():
        raise UnknownShapeError(f"line {node.lineno} holds more than one statement")
    decorators = node.decorator_list if isinstance(node, ast.ClassDef) else []
    return min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1


def _leading_space(line: bytes) -> str:
    return line[: len(line) - len(line.lstrip())].decode("ascii")


BEGIN = re.compile(rb"[ \t]*# >>> gonka-poc patch v(\d+) (\S+) ([0-9a-f]{12}) ")
END = re.compile(rb"[ \t]*# <<< gonka-poc patch\s*")
LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


def make_patched(original: bytes, variant: Variant) -> bytes:
    """The file with the patch in it; UnknownShapeError if it cannot be put there."""
    lines = LINE.findall(original)
    try:
        blocks = find_blocks(_parse(original), lines, variant)
    except RecursionError as error:
        raise UnknownShapeError("it is nested too deeply") from error
    for number in sorted(blocks, reverse=True):
        lines[number:number] = _marked(blocks[number], variant, lines, number)
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
            version, variant, digest = (group.decode("ascii", "replace") for group in begin.groups())
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
    options = {EAGER_OPTION: ""} if variant.enforce_eager else {}  # "" for a flag
    options.update({"--middleware": MIDDLEWARE, "--worker-extension-cls": WORKER_EXTENSION})
    environment = {"VLLM_USE_V1": "1", **({"VLLM_USE_CUDA_GRAPHS": "0"} if variant.enforce_eager else {})}
    if variant.profile == "standard":
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    lines = []
    for name, values in (("OPTIONS", options), ("ENV", environment)):
        lines += [f"_GONKA_POC_{name} = {{", *(f'    "{key}": "{value}",' for key, value in values.items()), "}"]
    lines += ["", "", *COMMAND_FUNCTION.split("\n"), ""]
    return [re.sub(r"^(?:    )+", lambda spaces: indent_unit * (len(spaces[0]) // 4), line) for line in lines]


def _digest(block: Sequence[bytes]) -> str:
    """Of the text without its indentation and line ends, which editors and git convert for the whole file."""
    return hashlib.sha256(b"\n".join(line.strip() for line in block)).hexdigest()[:12]


def _marked(block: Sequence[str], variant: Variant, lines: Sequence[bytes], number: int) -> list[bytes]:
    """The block between markers, indented as the line it goes before, with the line end of the one above."""
    digest = _digest([line.encode() for line in block])
    begin = f"# >>> gonka-poc patch v{PATCH_VERSION} {variant.name} {digest} (take it back: patch_runner.py revert)"
    indent = _leading_space(lines[number])
    above = lines[number - 1] if number else b"\n"
    end = above[len(above.rstrip(b"\r\n")) :]
    return [(indent + line if line else "").encode() + end for line in (begin, *block, "# <<< gonka-poc patch")]


def run_apply(args: argparse.Namespace) -> int:
    data = read_file(args.target)
    original, marks = remove_patch(data)
    patched = make_patched(original, args.variant)
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
        if make_patched(original, args.variant) == data:
            text, code = f"patched ({args.variant.name})", OK
    except UnknownShapeError as error:
        if not marks:
            raise
        text = f"patched ({found}), but the code around it changed ({error})"
    print(f"{text}: {args.target}")
    return code


def run_diff(args: argparse.Namespace) -> int:
    data = read_file(args.target)
    patched = make_patched(remove_patch(data)[0], args.variant)
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
    hardened = "hardened: do not set VLLM_ALLOW_INSECURE_SERIALIZATION (default: standard)"
    parser.add_argument("--profile", choices=["standard", "hardened"], default="standard", help=hardened)
    graphs = "with hardened, where vLLM can skip the compiled forward: no --enforce-eager, chat keeps CUDA graphs"
    parser.add_argument("--no-enforce-eager", dest="enforce_eager", action="store_false", help=graphs)
    args = parser.parse_args(argv)
    if not args.enforce_eager and args.profile != "hardened":
        parser.error("--no-enforce-eager needs --profile hardened")
    args.variant = Variant(args.profile, args.enforce_eager)
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
