"""vLLM's command line as far as gonka_poc reads it: words, options, and the file of --config."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path


def options_of(args: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Names and values of the options in `args`, written `--option value` or `--option=value`, with - or _ in the name.

    The value of one that takes none is the word behind it; None where there is none.
    """
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name.startswith("-"):
            yield name.replace("_", "-"), value if equals else next(iter(args[i + 1 : i + 2]), None)


def values_of(args: Sequence[str], option: str) -> list[str]:
    """The values given to `option`."""
    return [value for name, value in options_of(args) if name == option and value is not None]


def config_texts(args: Sequence[str]) -> Iterator[str]:
    """The text of vLLM's --config file; none where vLLM itself will say what is wrong with it."""
    for path in values_of(args, "--config"):
        try:
            yield Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return


def config_options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The options at the top level of vLLM's --config file."""
    for text in config_texts(args):
        for name, value in re.findall(r"^[\"']?([\w-]+)[\"']?[ \t]*:[ \t]*([\w-]*)", text, flags=re.MULTILINE):
            yield f"--{name.replace('_', '-')}", value.lower()


def names_anywhere(args: Sequence[str], word: str) -> bool:
    """True if `word` is part of `args`, or of a line of the --config file that is no comment."""
    if any(word in arg for arg in args):
        return True
    return any(re.search(rf"^[^#\n]*{re.escape(word)}", text, flags=re.MULTILINE) for text in config_texts(args))
