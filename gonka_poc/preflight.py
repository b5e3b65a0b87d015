"""Checks of the settings before the engine loads, so that a wrong one costs seconds and not the loading of a model.

vLLM imports a middleware only when the engine is up (0.14 to 0.33), and its API process sees no other code of ours
before that. `gonka_poc.serve` checks before it starts vLLM. Where vLLM's own module is started, as MLNode does, the
first code of ours is the worker extension, which every worker imports before it loads weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from gonka_poc.callbacks.file import outbox_path, try_outbox
from gonka_poc.certificates import ssl_context
from gonka_poc.config import Settings, load_settings
from gonka_poc.errors import OutboxDamagedError, OutboxFullError, SettingsError
from gonka_poc.vllm_compat import BATCH_INVARIANT


def check_settings(warn: Callable[[str], object]) -> Settings:
    """The settings of this process, all tried. Raises SettingsError, or OutboxError for a wrong POC_OUTBOX_PATH. An
    outbox that is damaged, or cannot be written now, is no reason not to serve chat: `warn` gets a sentence."""
    settings = load_settings()
    if settings.batch_invariant and os.environ.get(BATCH_INVARIANT) != "1":
        raise SettingsError(
            f"POC_BATCH_INVARIANT=1 needs {BATCH_INVARIANT}=1 in vLLM's environment: set both, or start the server "
            "with gonka_poc.serve, which sets it"
        )
    ssl_context()  # callbacks need the certificates that it reads
    try:
        try_outbox(outbox_path(settings.outbox_path))
    except (OutboxDamagedError, OutboxFullError) as error:
        warn(f"{error}. Chat is served all the same, and proof without callbacks")
    return settings
