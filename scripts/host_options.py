"""The options of install.sh, install_b300.sh and install_universal.sh on a GPU host."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from host_common import RefusalError

HELP = """\
On a GPU host (each option also works with install_b300.sh and install_universal.sh):

  --yes              do not ask; needed where there is no terminal
  --dry-run          print every step, change nothing; needs no root
  --python P         the Python that MLNode starts vLLM with (default: $VLLM_PYTHON_PATH here, of MLNode's processes or
                     of its systemd unit, then the default in runner.py; 3.10 and 3.11 only if named)
  --mlnode-dir DIR   MLNode's folder (default: /app, ./mlnode, ../mlnode, /opt/mlnode, /opt/gonka/mlnode)
  --profile NAME     standard (default): chat in eager mode; graphs: the same with a compiled model and CUDA graphs for
                     chat, for vLLM 0.15 and newer; hardened: no VLLM_ALLOW_INSECURE_SERIALIZATION, and as graphs where
                     the vLLM is new enough. The plan says what each costs
  --replay           vLLM answers chats as the network accepts them, and replays those of other hosts; off if not given.
                     The plan says what it costs
  --no-replay        with --update, which keeps what was chosen: turn it off
  --vllm-version V   install this vLLM (default: an installed one that is supported is kept, else the pinned one)
  --gpus NAME        b300 or universal: install for these GPUs without looking for any, nor for a driver; for images
  --wheels DIR       take every package from this folder of scripts/bundle.sh, none from an index
  --keep-vllm        insist on the installed vLLM; never install another
  --replace-other    put another project's package of our import name aside, or go on beside a vLLM that has a proof of
                     its own inside; --uninstall brings it back
  --force            go on with GPUs that are not supported, or with a Python that the operating system manages; with
                     --uninstall: also take back what was edited since
  --update           install this checkout over the last installation, with its profile, runner.py and GPUs where no
                     option says otherwise. Without a checkout: gonka-poc update
  --uninstall        take everything back, as the journal recorded it. Without a checkout: gonka-poc uninstall
  --status           what is installed; exit status 0 in order, 3 not installed, 1 changed since
  --help             print this text

What it does not do: kill processes, delete caches, touch the driver or the CUDA toolkit, write outside that Python's
folder and MLNode's runner.py (pip's cache apart, and /var/lib/gonka-poc for the system's Python). It needs root only
to write there.

Exit status: 0 done or nothing to do, 1 failed and taken back, 2 refused before anything was changed, 3 see --status.
"""

ACTIONS = ("--update", "--uninstall", "--status")
FLAGS = ("--yes", "--dry-run", "--force", "--keep-vllm", "--replace-other", "--replay", "--no-replay")
VALUES = ("--python", "--mlnode-dir", "--profile", "--vllm-version", "--gpus", "--wheels")


@dataclass
class Options:
    action: str = "install"  # or update, uninstall, status, help
    given: set[str] = field(default_factory=set, compare=False)  # the fields that the command line sets
    yes: bool = False
    dry_run: bool = False
    force: bool = False
    keep_vllm: bool = False
    replace_other: bool = False
    replay: bool = False
    no_replay: bool = False
    python: str | None = None
    mlnode_dir: str | None = None
    profile: str = "standard"
    vllm_version: str | None = None
    gpus: str | None = None
    wheels: str | None = None


def parse_options(words: Sequence[str]) -> Options:
    """The options as given; RefusalError where they are wrong."""
    if "--help" in words or "-h" in words:
        return Options(action="help")
    options, left = Options(), list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        attribute = name.removeprefix("--").replace("-", "_")
        options.given.add(attribute)
        if name in VALUES:
            if not equals and left:
                value = left.pop(0)
            if not value or value.startswith("--"):
                raise RefusalError(f"{name} needs a value")
            setattr(options, attribute, value)
        elif name not in (*ACTIONS, *FLAGS):
            raise RefusalError(f"unknown option: {word}\n    --help lists the options")
        elif equals:
            raise RefusalError(f"{name} takes no value")
        elif name in ACTIONS:
            options.action = attribute
        else:
            setattr(options, attribute, True)
    if options.profile not in ("standard", "graphs", "hardened"):
        raise RefusalError(f"--profile {options.profile}: it is standard, graphs or hardened")
    if options.replay and options.no_replay:
        raise RefusalError("--replay and --no-replay exclude each other")
    if options.gpus not in (None, "b300", "universal"):
        raise RefusalError(f"--gpus {options.gpus}: it is b300 or universal")
    if options.keep_vllm and options.vllm_version:
        raise RefusalError("--keep-vllm and --vllm-version exclude each other")
    if options.vllm_version and not re.fullmatch(r"\d+\.\d+(\.\d+)?([.a-z+]\w*)*", options.vllm_version):
        raise RefusalError(f"--vllm-version {options.vllm_version} is not a version such as 0.25.1")
    return options
