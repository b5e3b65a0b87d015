"""Checks of a host: can MLNode start vLLM here with proof of compute? Nothing is changed.

    python -m gonka_poc.doctor [--runner FILE] [--json]

vLLM and torch are read as files, never imported, so that a broken installation can be reported.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from packaging.version import Version
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from gonka_poc import vllm_compat
from gonka_poc.callbacks.file import outbox_path, try_outbox
from gonka_poc.callbacks.locks import IN_MEMORY
from gonka_poc.certificates import ssl_context
from gonka_poc.config import load_settings, unused_variables
from gonka_poc.errors import (
    OutboxDamagedError,
    OutboxError,
    OutboxFullError,
    PoCError,
    SettingsError,
    ToolError,
    UnsupportedServerError,
    for_terminal,
)
from gonka_poc.gpus import nvidia_smi
from gonka_poc.mlnode_python import PYTHON_VARIABLE, NamedPython, named_pythons, same_python
from gonka_poc.safe_files import other_writer
from gonka_poc.vllm_compat import INSECURE_SERIALIZATION, MIDDLEWARE, SUPPORTED, WORKER_EXTENSION
from gonka_poc.vllm_contract import Finding, judge, known_release, read_package

MODULE_VARIABLE = "MLNODE_VLLM_MODULE"
PYTHON_MIN = (3, 10)
# NVIDIA's table of minor version compatibility: the oldest driver that runs any release of that CUDA.
MIN_DRIVER = ((12, 525), (13, 580))
# The scratch cache is one layer deep: 128 MiB for 32768 tokens of 8 heads of 128 in bfloat16. The rest is for the
# activations of that batch.
SCRATCH_MIB = 1024

State = Literal["ok", "warn", "fail"]
# from good to bad
STYLES: Mapping[State, str] = MappingProxyType({"ok": "green", "warn": "yellow", "fail": "bold red"})


@dataclass(frozen=True)
class Check:
    """A row of the table; `fix` is empty if nothing has to be done."""

    name: str
    state: State
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Surroundings:
    """The host under check: MLNode's runner.py, its interpreter, and the environment that it would pass on."""

    runner: Path | None
    python: str | None
    environment: Mapping[str, str]

    def runner_text(self) -> str:
        """The text of MLNode's runner.py; empty if it cannot be read."""
        with contextlib.suppress(OSError):
            return self.runner.read_text(encoding="utf-8", errors="replace") if self.runner else ""
        return ""

    @cached_property
    def named_pythons(self) -> list[NamedPython]:
        """The interpreters that MLNode starts vLLM with, as far as can be known here."""
        return named_pythons(self.runner, self.runner_text(), self.environment)

    def mlnode_python(self) -> str:
        """The interpreter that was given, else the first that is named for MLNode, else this one."""
        return self.python or next((named.python for named in self.named_pythons), sys.executable)


def _find(pattern: str, text: str) -> str | None:
    """The first group of the first match."""
    found = re.search(pattern, text, flags=re.MULTILINE)
    return found[1] if found else None


def run_checks(runner: Path | None = None, python: str | None = None, look_at_gpus: bool = True) -> list[Check]:
    """All checks of this host, causes before effects.

    `python` is the interpreter that MLNode uses if neither runner.py nor the environment names one. An image is
    checked without `look_at_gpus`: those are of the host that will run it.
    """
    here = Surroundings(runner, python, os.environ)
    checks = [check_python(), check_interpreter(here), check_vllm()]
    checks += [check_settings(), check_certificates(), check_outbox()]
    checks += [check_gpu()] if look_at_gpus else []
    checks += [check_extension_points(), check_token(here)]
    checks += [check(here) for check in (check_package, check_runner, check_module, check_serialization, check_eager)]
    return [*checks, check_memory()] if look_at_gpus else checks


def check_python() -> Check:
    """This interpreter's version."""
    found = f"{'.'.join(map(str, sys.version_info[:3]))}, {sys.executable}"
    if sys.version_info[:2] >= PYTHON_MIN:
        return Check("Python", "ok", found)
    return Check("Python", "fail", found, "use Python 3.10 or newer, 3.12 if you can choose")


def check_vllm() -> Check:
    """The installed release of vLLM."""
    try:
        return Check("vLLM", "ok", f"{vllm_compat.installed_version()} (supported: {SUPPORTED})")
    except UnsupportedServerError as error:
        return Check("vLLM", "fail", str(error), "bash install.sh, or pip install a release in that range")


def check_settings() -> Check:
    """The POC_* variables of this environment."""
    try:
        load_settings()
    except SettingsError as error:
        return Check("settings", "fail", str(error), "set the variable to a value in its range, or unset it")
    unused = unused_variables()
    if unused:
        return Check("settings", "warn", "; ".join(unused), "correct the name, or unset the variable")
    return Check("settings", "ok", "every POC_* variable that is set can be used")


def check_certificates() -> Check:
    """The authorities that callbacks trust; without them the server does not start."""
    try:
        ssl_context()
    except SettingsError as error:
        return Check("certificates", "fail", str(error), "do what the text says; the server does not start like this")
    return Check("certificates", "ok", "those that callbacks trust can be read")


def check_outbox() -> Check:
    """The file of POC_OUTBOX_PATH. One that is not there yet is tried with another in its folder, which is removed:
    made by root, the real one would be closed to the server. Root does not try what belongs to another user."""
    name = "outbox"
    try:
        path = outbox_path(load_settings().outbox_path)
    except SettingsError:
        return Check(name, "warn", "not looked at", "correct the settings first")
    except OutboxError as error:
        return Check(name, "fail", str(error), "set POC_OUTBOX_PATH to a file on a local disk")
    if path == IN_MEMORY:
        return Check(name, "ok", "in memory: undelivered callbacks are lost with the server")
    folder = next(folder for folder in Path(path).absolute().parents if os.path.exists(folder))
    if owner := _other_owner(path, folder):
        found = (
            f"{path} was not tried: it or its folder belongs to {owner}, and files that root leaves there shut it out"
        )
        return Check(
            name, "warn", found, f"run the doctor as the user of the server ({owner}?); nothing if that is root"
        )
    try:
        if os.path.lexists(path):
            try_outbox(path, create=False)
        else:
            with tempfile.TemporaryDirectory(prefix=".gonka_poc-", dir=folder) as trial:
                try_outbox(os.path.join(trial, "outbox.sqlite3"))
    except (OutboxDamagedError, OutboxFullError) as error:
        return Check(name, "fail", str(error), "do what the text says; the server starts, and callbacks wait")
    except PoCError as error:
        return Check(name, "fail", str(error), "do what the text says; the server does not start like this")
    except OSError as error:
        fix = "let the server's user write there, or set POC_OUTBOX_PATH to a file on a local disk"
        return Check(name, "fail", f"{path} cannot be made: {error}", fix)
    return Check(name, "ok", f"{path} can be written")


def _other_owner(path: str, folder: Path) -> str | None:
    """The user, other than root, that the file or else the folder belongs to, where this process is root's."""
    if os.geteuid() != 0:
        return None
    uids = [os.stat(each).st_uid for each in (path, folder) if os.path.exists(each)]
    uid = next((uid for uid in uids if uid != 0), 0)
    try:
        return pwd.getpwuid(uid).pw_name if uid else None
    except KeyError:
        return f"user {uid}"


def check_gpu() -> Check:
    """GPUs and driver, against the CUDA that torch was built for."""
    name = "GPU and driver"
    cuda = torch_cuda()
    if cuda is None:
        return Check(name, "ok", "torch is built without CUDA; no GPU is used")
    need = dict(MIN_DRIVER).get(cuda, MIN_DRIVER[-1][1])
    rows = nvidia_smi("name,driver_version")
    if not rows:
        return Check(name, "fail", "nvidia-smi shows no GPU", "install the driver, or give the container its GPUs")
    driver = rows[0][-1]
    found = f"{len(rows)} x {rows[0][0]}, driver {driver}; torch is built for CUDA {cuda}"
    release = _find(r"\A(\d+)", driver)
    if release is None:
        return Check(name, "fail", found, "nvidia-smi must work first; see what `nvidia-smi -q` says of the driver")
    if int(release) < need:
        fix = (
            f"update the driver to {need} or newer, take a vLLM for an older CUDA, or make sure that NVIDIA's forward "
        )
        return Check(name, "warn", found, f"{fix}compatibility libraries (cuda-compat) are where the server starts")
    return Check(name, "ok", found)


def torch_cuda() -> int | None:
    """The major CUDA release that the installed torch was built for; None for a CPU build."""
    folder = package_folder("torch")
    path = folder / "version.py" if folder else None
    text = path.read_text(encoding="utf-8", errors="replace") if path and path.is_file() else ""
    found = _find(r"^cuda\b[^=\n]*=\s*'(\d+)", text)
    return int(found) if found else None


def package_folder(package: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def check_extension_points() -> Check:
    """The contract with vLLM, against the installed source."""
    name = "extension points"
    folder = package_folder("vllm")
    if folder is None:
        return Check(name, "fail", "vLLM is not installed", "bash install.sh")
    try:
        findings = judge(read_package(folder))
    except ToolError as error:
        return Check(name, "fail", str(error), "bash install.sh")
    missing = [finding.name for finding in findings if not finding.is_good]
    if missing:
        return Check(name, "fail", f"not as needed in this vLLM: {', '.join(missing)}", f"install vLLM {SUPPORTED}")
    return Check(name, "ok", f"all {len(findings)} are in this vLLM")


def contract_checks(path: Path, release: str = "") -> list[Check]:
    """The contract against vLLM's source at `path`: a source tree, a package folder or a wheel. Failures come last.

    `release` replaces what the source says of its release. Raises ToolError if there is no vLLM at `path`, or a file
    there cannot be read.
    """
    package = read_package(path)
    package.release = release or package.release
    checks = [check_release(package.release), *map(check_finding, judge(package))]
    return sorted(checks, key=lambda check: list(STYLES).index(check.state))


GIVE_RELEASE = "give its release by --release"


def check_release(release: str) -> Check:
    """A release against the supported ones. A newer one is a warning until it was judged and tested."""
    fix = f"if nothing below fails, run the engine tests with it, then raise SUPPORTED ({SUPPORTED})"
    known = known_release(release)
    if known is None:
        unknown = "unknown: there is no _version.py, as in a checkout"
        found = f"{release}, which names no release" if release else unknown
        return Check("release", "warn", found, f"{GIVE_RELEASE}; {fix}")
    if known < min(Version(limit.version) for limit in SUPPORTED):
        return Check("release", "fail", f"{release}, too old (supported: {SUPPORTED})", "take a newer release of vLLM")
    if known not in SUPPORTED:
        return Check("release", "warn", f"{release}, not supported yet", fix)
    return Check("release", "ok", f"{release} (supported: {SUPPORTED})")


def check_finding(finding: Finding) -> Check:
    """One name of the contract."""
    if not finding.is_good:
        fix = f"vllm_compat has to {'pass it' if finding.presence == 'newly required' else 'do without it'}"
        return Check(finding.name, "fail", f"{finding.presence}: {finding.where}", fix)
    if finding.presence == "unsure":
        return Check(finding.name, "warn", finding.where, GIVE_RELEASE)
    return Check(finding.name, "ok", finding.where)


def check_token(here: Surroundings) -> Check:
    """POC_API_TOKEN beside MLNode, which asks vLLM on this machine and forwards no token."""
    name = "token"
    try:
        settings = load_settings()
    except SettingsError:
        return Check(name, "warn", "not looked at", "correct the settings first")
    if settings.api_token is None:
        return Check(name, "ok", "POC_API_TOKEN is not set: proof is open to all who reach vLLM's port")
    if here.runner is None:
        return Check(name, "ok", "POC_API_TOKEN is set (without MLNode: no --runner)")
    if settings.trust_loopback:
        return Check(name, "ok", "POC_API_TOKEN is set; callers on this machine, as MLNode is, need none")
    found = "POC_API_TOKEN is set, and MLNode forwards no token: it gets 401 and there is no proof"
    return Check(name, "fail", found, "set POC_TRUST_LOOPBACK=1 where MLNode is started, or unset POC_API_TOKEN there")


def check_interpreter(here: Surroundings) -> Check:
    """This interpreter, in which vLLM is looked at, against the one that MLNode starts vLLM with."""
    name = "MLNode's Python"
    found = [NamedPython(here.python, "--python")] if here.python else here.named_pythons
    if not found:
        return Check(name, "ok", "nothing names one (without MLNode: no --runner)")
    text = "; ".join(f"{named.python} ({named.source})" for named in found)
    if len(found) > 1:
        return Check(name, "fail", f"several are named: {text}", "say which by --python, and run the doctor in it")
    if same_python(found[0].python, sys.executable):
        return Check(name, "ok", text)
    fix = f"{found[0].python} -m gonka_poc.doctor, with the same options"
    return Check(name, "fail", f"{text}; this is {sys.executable}, and vLLM was looked at in it", fix)


def check_package(here: Surroundings) -> Check:
    """This package, in the Python that MLNode starts vLLM with."""
    name = "gonka_poc in MLNode's Python"
    python = here.mlnode_python()
    problem = why_not_found(python, "gonka_poc")
    if problem:
        return Check(name, "fail", problem, f"bash install.sh --python {python}; or set {PYTHON_VARIABLE} for MLNode")
    for named in here.named_pythons:
        if here.python and not same_python(named.python, here.python):
            fix = f"start MLNode with {PYTHON_VARIABLE}={here.python}"
            return Check(name, "warn", f"{python} finds it, but MLNode here would use {named.python}", fix)
    return Check(name, "ok", f"{python} finds it")


FIND = """
import importlib.util, os, sys
first, *rest = sys.argv[1].split(".")
spec = importlib.util.find_spec(first)
folders = [os.path.join(f, *rest) for f in (spec.submodule_search_locations or [])] if spec and rest else []
found = spec is not None and (not rest or any(os.path.exists(p) for f in folders for p in (f + ".py", f)))
sys.exit(0 if found else 3)
"""


def why_not_found(python: str, module: str) -> str:
    """The reason why `python` cannot import `module`; empty if it can. Its file is looked for, never run."""
    found = other_writer(shutil.which(python) or python) if os.geteuid() == 0 else ""
    if found:
        return f"{python} is not run by root, since {found}; run the doctor as that user"
    try:
        done = subprocess.run([python, "-I", "-B", "-c", FIND, module], capture_output=True, timeout=60, check=False)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        return f"{python} does not run: {error}"
    if done.returncode == 0:
        return ""
    return f"{python} does not find {module}" if done.returncode == 3 else f"{python} does not run as Python 3"


def check_runner(here: Surroundings) -> Check:
    """The two options in runner.py. `patch_runner.py check` compares all of the patch."""
    name = "runner.py"
    if here.runner is None:
        return Check(name, "warn", "not looked at", "add --runner FILE (MLNode's inference/vllm/runner.py)")
    text = here.runner_text()
    if not text:
        return Check(name, "fail", f"{here.runner} cannot be read", "give the path of MLNode's runner.py")
    try:
        compile(text, str(here.runner), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        return Check(name, "fail", f"{here.runner} does not compile: {error}", "correct it, then patch it again")
    missing = [option for option in (MIDDLEWARE, WORKER_EXTENSION) if option not in text]
    if missing:
        return Check(name, "fail", f"{here.runner} lacks {', '.join(missing)}", f"patch_runner.py apply {here.runner}")
    return Check(name, "ok", f"{here.runner} has both options")


def check_module(here: Surroundings) -> Check:
    """The module that MLNode is set to start instead of vLLM's."""
    module = here.environment.get(MODULE_VARIABLE)
    if not module:
        return Check(MODULE_VARIABLE, "ok", "not set; MLNode starts vLLM's own server")
    problem = why_not_found(here.mlnode_python(), module)
    if problem:
        fix = f"unset it, or set it to {vllm_compat.API_SERVER_MODULE} or gonka_poc.entrypoint.api_router"
        return Check(MODULE_VARIABLE, "fail", f"{module}: {problem}", fix)
    return Check(MODULE_VARIABLE, "ok", module)


def check_serialization(here: Surroundings) -> Check:
    """Check whether functions may be sent to the workers. Only a server without the worker extension needs that."""
    name = "serialization"
    text = here.runner_text()
    in_file = re.search(rf"{INSECURE_SERIALIZATION}\W+1\b", text) is not None
    in_environment = here.environment.get(INSECURE_SERIALIZATION, "0") not in ("", "0")
    if in_environment and "gonka-poc patch" in text and not in_file:
        fix = f"unset {INSECURE_SERIALIZATION} where MLNode is started: the hardened profile does without"
        return Check(name, "warn", "runner.py is hardened, but the environment allows functions", fix)
    if in_file or in_environment:
        return Check(name, "ok", "functions may be sent to the workers (profile standard)")
    return Check(name, "ok", "calls by name only (profile hardened, or not set)")


def check_eager(here: Surroundings) -> Check:
    """A forward of the model without compilation, which proofs need."""
    name = "eager forward"
    text = here.runner_text()
    # the patch's table has it or not, its code has it always
    if ('"--enforce-eager": ""' if "gonka-poc patch" in text else "--enforce-eager") in text:
        return Check(name, "ok", "runner.py starts vLLM with --enforce-eager")
    if vllm_compat.can_skip_compiled():
        return Check(name, "ok", "this vLLM can run proofs beside a compiled model")
    state: State = "fail" if here.runner else "warn"
    return Check(name, state, "this vLLM cannot run proofs beside a compiled model", "start it with --enforce-eager")


def check_memory() -> Check:
    """Free memory for the scratch cache."""
    name = "free memory"
    if torch_cuda() is None:
        free = [available_mib()]
    else:
        free = [int(row[0]) for row in nvidia_smi("memory.free") if row[0].isdigit()]
    if not free:
        return Check(name, "warn", "nvidia-smi reports no free memory", "see what nvidia-smi prints")
    found = f"{min(free)} MiB" + (f" on the fullest of {len(free)} GPUs" if len(free) > 1 else "")
    if min(free) >= SCRATCH_MIB:
        return Check(name, "ok", found)
    fix = f"leave about {SCRATCH_MIB} MiB: a smaller --gpu-memory-utilization, or stop what else uses it"
    return Check(name, "warn", found, fix)


def available_mib() -> int:
    """Memory that Linux could give to a new process."""
    with contextlib.suppress(OSError):
        return int(_find(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text()) or 0) // 1024
    return 0


def doctor_command(
    json_output: bool = False, runner: Path | None = None, python: str | None = None, look_at_gpus: bool = True
) -> int:
    """Print the checks of this host; 1 if one failed."""
    return print_checks(run_checks(runner, python, look_at_gpus), json_output)


def print_checks(checks: Sequence[Check], json_output: bool) -> int:
    """Print the checks; 1 if one failed."""
    states = Counter(check.state for check in checks)
    if json_output:
        print(json.dumps({"ok": not states["fail"], "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        print_table(checks)
        print(", ".join(f"{states[state]} {state}" for state in STYLES if states[state]))
    return 1 if states["fail"] else 0


def print_table(checks: Sequence[Check]) -> None:
    """Print one row per check."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    folded = [Column(title, overflow="fold") for title in ("found", "what to do")]
    table = Table("state", "check", *folded, box=None, pad_edge=False)
    for check in checks:
        table.add_row(
            *(Text(for_terminal(text)) for text in (check.state, check.name, check.found, check.fix)),
            style=STYLES[check.state],
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m gonka_poc.doctor`, for installers."""
    parser = argparse.ArgumentParser(prog="python -m gonka_poc.doctor", description="Check whether this host is ready.")
    parser.add_argument("--runner", type=Path, metavar="FILE", help="MLNode's inference/vllm/runner.py")
    parser.add_argument("--python", metavar="P", help="the Python that MLNode starts vLLM with")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--no-gpu", action="store_true", help="look at no GPU and no driver: in an image")
    options = parser.parse_args(argv)
    return doctor_command(options.json, options.runner, options.python, not options.no_gpu)


if __name__ == "__main__":
    sys.exit(main())
