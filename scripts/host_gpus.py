"""The GPUs of this host, and the vLLM that their generation gets."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from host_common import RefusalError, complain


@dataclass(frozen=True)
class Generation:
    """GPUs that run the same vLLM; one server may span them."""

    script: str
    pin: str
    oldest: str = ""
    oldest_why: str = ""
    older_driver_pin: str = ""


# 0.32.0: the release that this project's own end-to-end tests use (its CPU build). Its default wheel is built for CUDA
# 13 (torch 2.13), which has kernels for the whole 10.x family and needs driver 580 or newer. Not older than 0.20.0:
# until then it is built for CUDA 12 and has no code for SM 10.3, so an older driver has none to fall back to.
B300 = Generation("install_b300.sh", "0.32.0", "0.20.0", "the first whose default wheel is for CUDA 13")

# 0.25.1: the release on which this project's proofs were compared with the network's on an H200. Its default wheel is
# built for CUDA 13 (torch 2.11): driver 580 or newer. 0.19.1: what an older driver is told to take, the last release
# whose default wheel is built for CUDA 12 (torch 2.10, CUDA 12.8), for any driver from 525 on; it can already leave a
# compiled model aside (0.15). It is named, not chosen silently: hosts should know which of the two they run.
UNIVERSAL = Generation("install_universal.sh", "0.25.1", older_driver_pin="0.19.1")

GENERATIONS = {"10.x": B300, "9.0": UNIVERSAL, "8.0": UNIVERSAL}
NAMED = {"b300": B300, "universal": UNIVERSAL}  # --gpus


@dataclass(frozen=True)
class Gpus:
    text: str  # "8 x NVIDIA H200, SM 9.0"
    driver: str  # empty where --gpus names the generation and nothing was looked at
    generation: Generation


def find_gpus(script: str, force: bool, named: str | None = None) -> Gpus:
    """The GPUs here, if `script` installs for them; with a `named` generation none is looked for, as in an image."""
    if named:
        generation = NAMED[named]
        if script not in ("install.sh", generation.script):
            raise _refusal(f"{script} does not install for --gpus {named}", f"run: bash {generation.script}")
        return Gpus(f"not looked at (--gpus {named})", "", generation)
    lines = _ask_nvidia_smi().splitlines()
    # some drivers print a warning beside the rows; where no line is a row, the first is quoted
    rows = [_parse_row(line) for line in [line for line in lines if _ROW.fullmatch(line)] or lines]
    name, capability, driver = rows[0]
    for other_name, other, _ in rows:
        if _family(other) != _family(capability):
            raise _refusal(
                f"GPUs of different generations: {name} (SM {capability}) and {other_name} (SM {other})",
                "one server computes on one generation; hide the others from this machine or container",
                "(docker: --gpus '\"device=0,1\"'), and install for each generation in its own container",
            )
    text, generation = f"{len(rows)} x {name}, SM {capability}", GENERATIONS.get(_family(capability))
    if generation is None:
        if script == B300.script:
            raise _refusal(f"{script} does not take these GPUs: {text}", "bash install.sh says what can be done")
        if not force:
            supported = "supported are B200 and B300 (SM 10.x), H100 and H200 (9.0), A100 (8.0)"
            advice = "proofs of other GPUs were not compared with these; to go on all the same: --force"
            raise _refusal(f"not supported: {text}; {supported}", advice)
        complain(f"warning: {text} is not supported; going on because of --force")
        generation = UNIVERSAL
    if script == "install.sh":
        complain(f"==> {text}, driver {driver}: {generation.script}")
    elif script != generation.script:
        raise _refusal(f"{script} does not take these GPUs: {text}", f"run: bash {generation.script}")
    return Gpus(text, driver, generation)


def _refusal(*lines: str) -> RefusalError:
    return RefusalError("\n    ".join(lines))


def _no_gpus(problem: str, advice: str) -> RefusalError:
    return _refusal(problem, advice, "to try it without a GPU: bash install.sh --cpu")


def _family(capability: str) -> str:
    """Compute capabilities that one server may span: B200 (10.0) and B300 (10.3) are one."""
    return "10.x" if capability.startswith("10.") else capability


_ROW = re.compile(r"(.+), *(\d+\.\d+), *(\d[\d.]*)\s*")


def _parse_row(line: str) -> tuple[str, str, str]:
    """Name, compute capability and driver; from the right, since a name may hold a comma."""
    row = _ROW.fullmatch(line)
    if row is None:
        problem = f"nvidia-smi answered a line that is not understood: {line}"
        raise _no_gpus(problem, "the line should be: name, compute capability, driver version")
    return row[1], row[2], row[3]


def _ask_nvidia_smi() -> str:
    """One line per GPU; RefusalError where there are none, or it cannot say."""
    if shutil.which("nvidia-smi") is None:
        problem = "nvidia-smi is not on PATH, so there is no NVIDIA driver here, or a container without access to one"
        raise _no_gpus(problem, "install the NVIDIA driver, or start the container with its GPUs (--gpus all)")
    command = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
        status, answer = done.returncode, done.stdout.decode(errors="replace").strip()
    except subprocess.TimeoutExpired:
        status, answer = 124, "no answer within 60 s"
    lines = answer.splitlines() or [""]
    first_line = next((line for line in lines if not _ROW.fullmatch(line)), lines[0])  # the one that went wrong
    if "No devices were found" in answer or (status == 0 and not answer):
        advice = "are they visible to this machine or container (lspci | grep -i nvidia, NVIDIA_VISIBLE_DEVICES)?"
        raise _no_gpus("nvidia-smi finds no GPUs", advice)
    if "not a valid field" in answer:
        problem = "this nvidia-smi does not know compute_cap: its driver is older than any that vLLM can use"
        raise _no_gpus(problem, "update the NVIDIA driver to 580 or newer")
    if status != 0:
        advice = "it must work first: often the driver and its kernel module differ after an update, and a reboot helps"
        raise _no_gpus(f"nvidia-smi failed (status {status}): {first_line}", advice)
    if any(mark in answer for mark in ("[N/A]", "[Not Supported]", "[Unknown Error]")):
        advice = "a GPU that fell off the bus, a virtual GPU or a broken driver does that; look at nvidia-smi -q"
        raise _no_gpus(f"nvidia-smi does not tell the GPU's name, compute capability or driver: {first_line}", advice)
    return answer
