"""`gonka-poc completion`: the script by which a shell completes commands and options, made by click."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from gonka_poc.cli.common import PASS, print_lines
from gonka_poc.errors import ToolError

PROGRAM, VARIABLE = "gonka-poc", "_GONKA_POC_COMPLETE"


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> int:
    """Print the script that lets SHELL complete commands and options.

    \b
    gonka-poc completion bash > ~/.local/share/bash-completion/completions/gonka-poc
    gonka-poc completion zsh > ~/.zfunc/_gonka-poc      # with ~/.zfunc in fpath
    gonka-poc completion fish > ~/.config/fish/completions/gonka-poc.fish
    """
    make = get_completion_class(shell)
    if make is None:
        raise ToolError(f"this release of click has no completion for {shell}; update click to 8.1 or newer")
    print_lines(*make(click.Group(), {}, PROGRAM, VARIABLE).source().splitlines())
    return PASS
