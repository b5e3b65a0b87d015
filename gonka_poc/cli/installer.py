"""`gonka-poc update` and `gonka-poc uninstall`: they start the scripts that the installer keeps with its journal."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import click

from gonka_poc.cli.common import options
from gonka_poc.errors import ToolError
from gonka_poc.safe_files import other_writer, tree_writer

KEPT = "installer/install.sh"
KEPT_BEFORE = ".installer.old/install.sh"
SUMS = "SHA256SUMS"

run_options = options(
    click.option("--yes", is_flag=True, help="Do not ask; needed where there is no terminal"),
    click.option("--dry-run", is_flag=True, help="Say what would be done, change nothing"),
)


def state_folder(prefix: str) -> Path:
    """The journal's folder of the Python with this prefix, as the installer has it."""
    return Path("/var/lib/gonka-poc") if prefix in ("/usr", "/usr/local") else Path(prefix, "var", "gonka-poc")


@click.command("uninstall")
@run_options
@click.option("--force", is_flag=True, help="Also take back what was edited since")
def uninstall_command(yes: bool, dry_run: bool, force: bool) -> None:
    """Take back what install.sh did for this Python: the package, what it replaced, and the patch of runner.py.

    \b
    gonka-poc uninstall --dry-run
    sudo /opt/venv/bin/gonka-poc uninstall
    """
    start(kept_script(), "--uninstall", yes=yes, dry_run=dry_run, force=force)


@click.command("update")
@click.argument("source", required=False, type=click.Path(path_type=Path))
@run_options
@click.option("--profile", type=click.Choice(["standard", "graphs", "hardened"]), help="Instead of the one it has")
@click.option("--replay/--no-replay", default=None, help="With or without replays of chats, instead of as it is")
def update_command(source: Path | None, yes: bool, dry_run: bool, profile: str | None, replay: bool | None) -> None:
    """Install again over what install.sh did for this Python, with its profile, runner.py and GPUs.

    SOURCE is a newer checkout, a folder of its scripts/bundle.sh, or a wheel of gonka-poc-vllm. Without it the
    installed release is put in order: after MLNode brought a new runner.py, or somebody edited a file.

    \b
    gonka-poc update
    sudo /opt/venv/bin/gonka-poc update /srv/gonka_poc
    """
    script, words = kept_script(), [] if profile is None else ["--profile", profile]
    words += [] if replay is None else ["--replay" if replay else "--no-replay"]
    if source is not None:
        trusted_source(source)
    if source is None:
        pass
    elif (source / "install.sh").is_file():
        script = source.absolute() / "install.sh"
    elif (source / SUMS).is_file():
        words += ["--wheels", str(source.absolute())]
    elif source.suffix == ".whl" and source.is_file():
        os.environ["GONKA_POC_WHEEL"] = str(source.absolute())
    else:
        raise click.UsageError(
            f"{source} is no checkout (with install.sh), no folder of scripts/bundle.sh (with {SUMS}) and no wheel"
        )
    start(script, "--update", *words, yes=yes, dry_run=dry_run)


def kept_script() -> Path:
    """The installer that is kept for this Python, put back where a killed run left it aside.

    Raises ToolError where there is none that this user may run.
    """
    folder = state_folder(sys.prefix)
    script = folder / KEPT
    old = folder / KEPT_BEFORE
    if not script.is_file() and old.is_file():  # a run was killed while it exchanged the two
        trusted(old).parent.rename(script.parent)
    if folder.is_dir() and not os.access(folder, os.X_OK):
        raise ToolError(f"{folder} is another user's; run the same command with sudo")
    if not script.is_file():
        raise ToolError(
            f"there is no {script}: install.sh did not install this, or did not come to its end; run it again from a "
            "checkout (a package that pip installed: pip uninstall gonka-poc-vllm)"
        )
    return trusted(script)


def trusted(script: Path) -> Path:
    """The script, if root may run it. Raises ToolError for root where others can write it."""
    found = other_writer(script) if os.geteuid() == 0 else ""
    if found:
        raise ToolError(f"{script} is not run by root: {found}; run this as that user")
    return script


def trusted_source(source: Path) -> None:
    """Raise ToolError for root where others can write any of the checkout, or of the wheels: root would run it."""
    found = tree_writer(str(source.absolute())) if os.geteuid() == 0 else ""
    if found:
        raise ToolError(
            f"root does not install from {source}: {found}; run this as that user, or copy it to a folder of root's, "
            "compare the copy with what you know of it, and name that one"
        )


def start(script: Path, *words: str, **flags: bool) -> None:
    """Replace this process by the installer, for this Python."""
    bash = shutil.which("bash")
    if bash is None:
        raise ToolError("bash is not on PATH, and the installer needs it")
    named = [f"--{name.replace('_', '-')}" for name, is_given in flags.items() if is_given]
    sys.stdout.flush()
    os.execv(bash, ["bash", str(script), *words, "--python", sys.executable, *named])
