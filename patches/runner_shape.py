"""Finds the places in MLNode's runner.py that patch_runner.py inserts lines at. Standard library only."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from typing import Any

IO_ERROR, UNKNOWN_SHAPE = 1, 4

MANUAL_STEPS = """\
1. Keep a copy of the file.
2. Find the list of the vLLM command (`... "-m", "vllm.entrypoints.openai.api_server" ...`). At its very end, behind the
   operator's additional args, add what these do not already bring:

       + [
           "--enforce-eager",
           "--middleware", "gonka_poc.middleware.PoCMiddleware",
           "--worker-extension-cls", "gonka_poc.worker.PoCWorkerExtension",
       ]

   vLLM takes several `--middleware`, but one `--worker-extension-cls`. On GPUs of 70 GiB or more add
   `"--max-num-batched-tokens", "32768"` too, unless it is there or chunked prefill is off.
3. Find the child's environment (`env = os.environ.copy()`). Just before the process is started, add:

       env["VLLM_USE_V1"] = "1"
       env["VLLM_USE_CUDA_GRAPHS"] = "0"
       env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"

4. Profile graphs, for vLLM 0.15 and newer: leave out `--enforce-eager` and VLLM_USE_CUDA_GRAPHS. Profile hardened:
   leave out VLLM_ALLOW_INSECURE_SERIALIZATION; and these two as well, where the installed vLLM is 0.15 or newer.
5. Replays of chats: add `"--logits-processors", "gonka_poc.replay.processor:ReplayProcessor"` and
   `"--logprobs-mode", "processed_logprobs"` to the list, unless it has a mode, and
   `env["VLLM_USE_V2_MODEL_RUNNER"] = "0"`; not with speculative decoding.
6. `python3 -m py_compile runner.py`, then restart MLNode. vLLM's port must answer `GET /api/v1/pow/status`.
"""


class PatchError(Exception):
    """The path is not a file that can be patched."""

    exit_code, problem, advice = IO_ERROR, "it cannot be patched", ""


class UnknownShapeError(PatchError):
    """The file is not a runner.py of a known shape."""

    exit_code, problem = UNKNOWN_SHAPE, "its shape is not known"
    advice = f"\nBy hand, with the same result:\n\n{MANUAL_STEPS}"


SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
LIST_MUTATORS = {"append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"}


def find_blocks(tree: ast.Module, lines: Sequence[bytes], define: Callable[[str], list[str]]) -> dict[int, list[str]]:
    """The lines to insert, by the 0-based line they go before; each anchor must be there once, or UnknownShapeError.

    `define` makes the lines that go before the class, from the file's unit of indentation.
    """
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
    use_env = f"{_environment_name(assignments, launch)}.update(_gonka_poc_env)"
    first_use = _first_use(nodes, command, [*derived, launch])
    innermost = [node for node in nodes if isinstance(node, ast.stmt) and launch in _walk(node)][-1]

    blocks = {_own_line(runner, lines): define(leading_space(lines[start.lineno - 1]))}
    blocks[_own_line(first_use, lines)] = [
        f"{name} = _gonka_poc_command({name})",
        f"_gonka_poc_env = _gonka_poc_environment({name})",
    ]
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


def leading_space(line: bytes) -> str:
    return line[: len(line) - len(line.lstrip())].decode("ascii")
