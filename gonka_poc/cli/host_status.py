"""The health of one host, from its HTTP API: what `gonka-poc status` shows, and what is wrong."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gonka_poc.answers import ReceiverStatus, StatusAnswer, VersionsAnswer, oldest_sec
from gonka_poc.cli.client import PoCClient
from gonka_poc.errors import ServerAnswerError, counted

LATE_SEC = 60.0  # a receiver that works takes artifacts within a few callback intervals
STILL_BUCKETS = 3  # of 10 seconds: a batch is shorter, unless the server is hard at work on something else


@dataclass
class HostStatus:
    """A host as it is now. `rows` are its facts by name, `problems` are sentences, none if it is all right.
    `figures` are those of the columns of several hosts, `answer` is GET /status."""

    url: str
    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    answer: dict[str, Any] = field(default_factory=dict)


def unreachable(url: str, error: Exception) -> HostStatus:
    """The status of a host that gave no answer."""
    return HostStatus(url, problems=[str(error)])


def look_at(client: PoCClient) -> HostStatus:
    """Ask the server of `client`. Raises ServerAnswerError where it does not answer at all."""
    status = client.status()
    figures = client.dashboard_data()
    host = HostStatus(client.url, answer=status.model_dump())
    _add_server(host, client, figures)
    if figures.get("started_at"):
        host.rows.append(("up for", duration(figures["time"] - figures["started_at"])))
    _add_round(host, status, figures)
    _add_rates(host, status, figures)
    _add_outbox(host, status, figures)
    _add_last_error(host, figures)
    host.problems += _standstill(status, figures)
    if status.error:
        ended = status.status in ("IDLE", "STOPPED")
        label = "the last round ended" if ended else "waits for"
        host.rows.append((label, status.error))
        host.problems.append(f"{label}: {status.error}")
    return host


def _add_server(host: HostStatus, client: PoCClient, figures: Mapping[str, Any]) -> None:
    """The model, the releases, how proof is computed, and why it is not."""
    if figures.get("engine_problem"):
        host.problems.append(str(figures["engine_problem"]))
    model = (figures.get("engine") or {}).get("model")
    try:
        model = model or client.model_name()  # which may ask for vLLM's own key
    except ServerAnswerError as error:
        model = "unknown"
        host.rows.append(("model", f"unknown: {error}"))
    else:
        host.rows.append(("model", model))
    host.figures["model"] = model
    try:
        versions = client.versions()
    except ServerAnswerError as error:
        host.problems.append(str(error))
        return
    host.figures |= {"versions": versions.model_dump()}
    host.rows.append(("versions", f"vLLM {versions.vllm_version}, gonka_poc {versions.gonka_poc_version}"))
    workers = "" if versions.workers is None else f"{versions.workers} x "
    hardware = [f"{workers}{versions.gpu}" if versions.gpu else None, versions.dtype]
    if versions.attention_backend:
        hardware.append(f"attention {versions.attention_backend}")
    if any(hardware):
        host.rows.append(("computes on", ", ".join(filter(None, hardware))))
    if versions.compiled is not None:
        host.rows.append(("proof runs", _proof_path(versions)))
    if not versions.poc_validation_inference:
        host.rows.append(("chat", "not while it validates: POC_PRIORITY is poc, or this server gives no proofs"))


def _proof_path(versions: VersionsAnswer) -> str:
    """Compiled or plain, and the noise floor where it was measured."""
    path = "compiled layers" if versions.compiled else "the plain forward"
    if versions.noise_floor is None:
        return path
    return f"{path}; noise floor of this model: {versions.noise_floor:.2g}"


def _add_round(host: HostStatus, status: StatusAnswer, figures: Mapping[str, Any]) -> None:
    host.figures["state"] = status.status
    host.rows.append(("state", status.status))
    if status.config is not None:
        config = status.config
        text = f"block {config.block_height} ({config.block_hash}), node {config.node_id} of {config.node_count}"
        if figures.get("round_began_at"):
            text += f", begun {duration(figures['time'] - figures['round_began_at'])} ago"
        if "round_receiver" in figures:
            text += f", for {figures['round_receiver'] or 'no receiver'}"
        host.rows.append(("round", text))
        host.rows.append(("public key", config.public_key))
        sizes = "" if config.k_dim is None else f", k_dim {config.k_dim}"
        host.rows.append(("nonces of", f"{config.seq_len} tokens{sizes}"))
    if status.stats is not None:
        host.rows.append(("nonces done", str(status.stats.total_processed)))


def _add_rates(host: HostStatus, status: StatusAnswer, figures: Mapping[str, Any]) -> None:
    """Nonces per second now, in the mean and at best, and the share of chat."""
    rates: Sequence[float] = figures.get("nonces_per_second") or []
    busy = [rate for rate in rates if rate > 0]
    now = _rate_now(status, figures)
    texts = [f"{now:.2f} nonces/s now"]
    host.figures["rate"] = {"now": now}
    if busy:
        mean, best = sum(busy) / len(busy), max(busy)
        texts += [f"{mean:.2f} in the mean while it computed", f"{best:.2f} at best"]
        host.figures["rate"] |= {"mean": mean, "best": best}
    expected = figures.get("expected_nonces_per_second")
    if expected is not None:
        texts.append(f"{expected:.2f} expected")
        host.figures["rate"]["expected"] = expected
    host.rows.append(("rate", ", ".join(texts)))
    share = figures.get("chat_share")
    host.figures["chat_share"] = share
    if share is not None:
        text = f"had {share:.0%} of the time in which there was proof to compute, in the last 30 minutes"
        host.rows.append(("chat", text))


def _rate_now(status: StatusAnswer, figures: Mapping[str, Any]) -> float:
    """That of the last 10 seconds; of a round that is younger than twice that, its own."""
    of_round = status.stats.nonces_per_second if status.stats is not None and status.status == "GENERATING" else 0.0
    if "rate" not in figures or _round_age(figures) < 2 * figures["bucket_seconds"]:
        return of_round
    return float(figures["rate"])


def _round_age(figures: Mapping[str, Any]) -> float:
    """Seconds since the round began; 0 where there is none, or the server does not say."""
    began_at = figures.get("round_began_at")
    return float(figures["time"] - began_at) if began_at else 0.0


def _standstill(status: StatusAnswer, figures: Mapping[str, Any]) -> list[str]:
    """A sentence where a round has computed nothing for a while, and gives no reason of its own."""
    seconds = STILL_BUCKETS * figures.get("bucket_seconds", 10)
    last = (figures.get("nonces_per_second") or [])[-STILL_BUCKETS:]
    if status.status != "GENERATING" or status.error or _round_age(figures) < 2 * seconds or any(last):
        return []
    histories = figures.get("histories") or [{}]
    shares = [share for share in (histories[0].get("chat_shares") or [])[-STILL_BUCKETS:] if share is not None]
    if shares and min(shares) > 0.9:
        advice = "chat has all of the time; with POC_PRIORITY=abort a round goes first"
    else:
        advice = "see the server's log"
    return [f"a round generates, and nothing was computed in the last {seconds} s: {advice}"]


def _add_outbox(host: HostStatus, status: StatusAnswer, figures: Mapping[str, Any]) -> None:
    receivers = status.callbacks or []
    waiting = sum(receiver.waiting for receiver in receivers)
    oldest = oldest_sec(receivers) or 0.0
    host.figures |= {"waiting": waiting, "oldest_sec": oldest}
    text = f"{counted(waiting, 'artifact')} {'waits' if waiting == 1 else 'wait'}"
    if waiting:
        text += f", the oldest for {duration(oldest)}"
    if figures.get("outbox_path"):
        text += f"; {figures['outbox_path']}"
    host.rows.append(("outbox", text))
    for receiver in receivers:
        host.rows.append(("receiver", f"{receiver.receiver}: {_receiver_text(receiver)}"))
        host.problems += _receiver_problems(receiver, host.url)


def _receiver_text(receiver: ReceiverStatus) -> str:
    """The counts of a receiver in words; of those that are 0, only what waits and what was delivered."""
    parts = [f"{receiver.delivered} delivered", f"{receiver.waiting} waiting"]
    if receiver.waiting and receiver.oldest_sec is not None:
        parts[-1] += f" (the oldest for {duration(receiver.oldest_sec)})"
    if receiver.refused:
        parts.append(f"{counted(receiver.refused, 'try', 'tries')} answered with an error")
    if receiver.parked:
        parts.append(f"{receiver.parked} parked")
    if receiver.expired:
        parts.append(f"{receiver.expired} expired")
    return ", ".join(parts) + (f"; last error: {receiver.error}" if receiver.error else "")


def _receiver_problems(receiver: ReceiverStatus, url: str) -> list[str]:
    found = []
    if receiver.waiting and (receiver.oldest_sec or 0.0) > LATE_SEC:
        why = f": {receiver.error}" if receiver.error else ""
        found.append(
            f"{receiver.receiver} does not take what it is sent; the oldest of {counted(receiver.waiting, 'artifact')} "
            f"waits for {duration(receiver.oldest_sec or 0.0)}{why}"
        )
    if receiver.parked:
        found.append(
            f"{receiver.receiver} refused {counted(receiver.parked, 'artifact')} for good; see `gonka-poc outbox "
            f"--server {url} list`, on that host"
        )
    return found


def _add_last_error(host: HostStatus, figures: Mapping[str, Any]) -> None:
    errors: Sequence[Mapping[str, Any]] = figures.get("errors") or []
    if errors:
        newest = errors[0]
        age = duration(max(0.0, float(figures.get("time", time.time())) - float(newest["time"])))
        times = f" ({newest['count']} times)" if newest.get("count", 1) > 1 else ""
        host.rows.append(("last error", f"{age} ago{times}: {newest['text']}"))
        host.figures["last_error"] = dict(newest)


def duration(seconds: float) -> str:
    """A time as a person says it: 7 s, 3 min, 2 h 5 min."""
    whole = int(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes = whole // 60
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
