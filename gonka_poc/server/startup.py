"""The block that the log has once a server is up: where its page is, who may ask, where artifacts wait and go to."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gonka_poc.config import Settings
from gonka_poc.data import PREFIX
from gonka_poc.errors import counted, printable
from gonka_poc.server.service import PoCService

PRIORITIES: Mapping[str, str] = MappingProxyType(
    {
        "chat": "chat: proof waits while a chat is served",
        "poc": "poc: while a round generates new chats get 503, running ones complete first",
        "abort": "abort: while a round generates new chats get 503, running ones are ended",
    }
)


def startup_text(settings: Settings, service: PoCService, address: str | None) -> str:
    """The block, in printable ASCII but for its line breaks. `address`: of the server, None where it is not known."""
    rows = {
        "page": f"{address or ''}{PREFIX}/dashboard",
        "token": _token(settings),
        "outbox": _outbox(service),
        "callbacks": _callbacks(settings),
        "priority": PRIORITIES[settings.priority],
        "proof": _proof(service),
    }
    return "\n".join(["PoC is served", *(f"  {name:<10}{printable(text)}" for name, text in rows.items())])


def _token(settings: Settings) -> str:
    if settings.api_token is None:
        return "none: all who reach the port may start and stop rounds (POC_API_TOKEN)"
    return "asked for" + (", not of callers on this machine (POC_TRUST_LOOPBACK)" if settings.trust_loopback else "")


def _outbox(service: PoCService) -> str:
    counts, path = service.callbacks.counts, service.callbacks.outbox_path
    if service.callbacks.problem:
        return f"{path}, {service.callbacks.problem}"
    callbacks, artifacts = counted(counts.pending_batches, "callback"), counted(counts.pending_artifacts, "artifact")
    waits = f"{callbacks} with {artifacts} {'waits' if counts.pending_batches == 1 else 'wait'}"
    parked = f"; parked: {counted(counts.parked_artifacts, 'artifact')}" if counts.parked_artifacts else ""
    return f"{path}, {waits}{parked}"


def _callbacks(settings: Settings) -> str:
    if settings.callback_allow:
        return f"only to {settings.callback_allow}"
    return "to every host but link-local and cloud metadata addresses (POC_CALLBACK_ALLOW)"


def _proof(service: PoCService) -> str:
    engine = service.metrics.engine()
    if not engine.workers:
        return "not ready; a request for proof is answered with the reason"
    if engine.compiled is None:
        path = "the plain forward, until it is warmed up"
    else:
        path = "compiled layers" if engine.compiled else "the plain forward"
    floor = "" if engine.floor is None else f"; noise floor {engine.floor:.2g}"
    return f"{path}{floor}, on {counted(len(engine.workers), 'worker')}"
