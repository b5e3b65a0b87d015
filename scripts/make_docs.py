"""Writes the parts of docs/ that are made of the code: the table of settings, and the options of every command.

    python scripts/make_docs.py           writes them
    python scripts/make_docs.py --check   exit status 1 if one is not as the code says

Needs the package and its dependencies, no vLLM. A test holds the files against it.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from gonka_poc.cli.main import app
from gonka_poc.cli.serve import OPTIONS, ServeCommand
from gonka_poc.config import setting_rows

DOCS = Path(__file__).resolve().parent.parent / "docs"


def settings_table() -> str:
    """The table of POC_* variables."""
    rows = [f"| `{name}` | `{default}` | {meaning} |" for name, default, meaning in setting_rows()]
    return "\n".join(["| Variable | Default | Meaning |", "| --- | --- | --- |", *rows])


def command_reference() -> str:
    """Every command: its text, its examples and its options."""
    return "\n\n".join(_section(path, command) for path, command in commands(app, "gonka-poc"))


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """The commands below `group` with the words to type, depth first; a group itself only where it has options."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if command.params or not isinstance(command, click.Group):
            yield f"{path} {name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")


def _section(path: str, command: click.Command) -> str:
    arguments = [param.human_readable_name for param in command.params if isinstance(param, click.Argument)]
    text, _, examples = inspect.cleandoc(command.help or "").partition("\n\n\b\n")
    parts = [f"### {path}", text]
    if examples:
        parts.append(f"```bash\n{examples.strip()}\n```")
    elif arguments:
        parts.append(f"`{path} {' '.join(arguments)}`")
    rows = [_option_row(param) for param in command.params if isinstance(param, click.Option)]
    if isinstance(command, ServeCommand):
        rows = [f"| `{name}` |  | {meaning} |" for name, meaning in OPTIONS]
    if rows:
        parts.append("\n".join(["| Option | Default | Meaning |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts)


def _option_row(param: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))
    if param.required:
        default = "required"
    elif param.show_default is not True or callable(param.default) or param.default in (None, ""):
        default = ""
    elif isinstance(param.default, (list, tuple)):
        default = f"`{' '.join(map(str, param.default))}`"
    else:
        default = f"`{param.default}`"
    help_text = " ".join((param.help or "").split()).replace("|", "\\|")
    return f"| {names} | {default} | {help_text} |"


def made(file: str, text: str) -> str:
    """The content that docs/`file` ought to have, from the one that it has, `text`."""
    name, make = {"configuration.md": ("settings", settings_table), "cli.md": ("commands", command_reference)}[file]
    begin, end = f"<!-- {name}: made by scripts/make_docs.py -->", f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"docs/{file} must have the lines {begin} and {end} once each")
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{make()}\n{end}", text, flags=re.DOTALL)


def main() -> None:
    """Write or check both files."""
    stale = []
    for name in ("configuration.md", "cli.md"):
        file = DOCS / name
        text = file.read_text(encoding="utf-8")
        wanted = made(name, text)
        if text != wanted:
            stale.append(name)
            if "--check" not in sys.argv[1:]:
                file.write_text(wanted, encoding="utf-8")
    print("not as the code says:" if "--check" in sys.argv[1:] else "written:", ", ".join(stale) or "none")
    sys.exit(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    main()
