"""A click group whose commands are imported when they are used, so that `gonka-poc --version` imports none of them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import click


class LazyGroup(click.Group):
    """A group of the commands in `places`: by name, "module:attribute". They are listed in that order."""

    def __init__(self, *args: object, places: Mapping[str, str], **more: object) -> None:
        super().__init__(*args, **more)  # type: ignore[arg-type]
        self._places = dict(places)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in their order; nothing is imported."""
        return list(self._places)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now; None where there is none of that name."""
        if cmd_name not in self._places:
            return None
        module, _, attribute = self._places[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command
