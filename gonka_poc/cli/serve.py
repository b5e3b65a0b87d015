"""`gonka-poc serve`: `python -m gonka_poc.serve` with a help of its own."""

from __future__ import annotations

import click

from gonka_poc.config import setting_rows

OPTIONS = (
    ("--enable-poc", "Serve proof of compute at /api/v1/pow."),
    ("--enable-replay", "With --enable-poc: chats that the network accepts, and replays of those of others."),
    ("--help=all", "Show vLLM's own options, all of which are taken."),
)


class ServeCommand(click.Command):
    """A command that hands every word on as it is written: vLLM's own parser reads them."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep `args`; -h and --help show the help of this command."""
        if {"-h", "--help"} & set(args):
            click.Command.parse_args(self, ctx, ["--help"])
        ctx.params["args"] = tuple(args)
        return []

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Our options, then every POC_* variable."""
        with formatter.section("Options"):
            formatter.write_dl(OPTIONS)
        with formatter.section("Environment variables, with their defaults"):
            formatter.write_dl([(f"{name} [{default}]", meaning) for name, default, meaning in setting_rows()])


@click.command("serve", cls=ServeCommand, options_metavar="MODEL --enable-poc [any option of vLLM's server]")
def serve_command(args: tuple[str, ...]) -> None:
    """Start vLLM's own OpenAI server, with proof of compute if --enable-poc is given.

    \b
    gonka-poc serve MODEL --enable-poc
    gonka-poc serve MODEL --enable-poc --port 5001 --tensor-parallel-size 2
    """
    from gonka_poc.serve import main

    main(args)
