"""The tally of callbacks by receiver, for /status and /metrics."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gonka_poc.access import shown_url
from gonka_poc.answers import ReceiverStatus
from gonka_poc.callbacks.queries import OTHERS, ReceiverCounts
from gonka_poc.errors import printable

MAX_RECEIVERS = 20  # shown by name; the URLs come with requests, so there can be any number
MAX_URL_CHARS = 200


@dataclass
class _Counters:
    delivered: int = 0
    refused: int = 0
    expired: int = 0
    error: str | None = None


class Tally:
    """Counts since the server started, of each of the receivers that were asked last; older ones are summed up.
    Receivers are told apart by what is shown of their URLs."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._of: OrderedDict[str, _Counters] = OrderedDict()
        self._others = _Counters()

    def delivered(self, url: str, size: int) -> None:
        """The receiver accepted a batch with `size` artifacts or verdicts."""
        counters = self._counters(url)
        counters.delivered += size
        counters.error = None

    def failed(self, url: str, reason: str | None, answered: bool) -> None:
        """A batch was not accepted; `answered` if the receiver said so."""
        counters = self._counters(url)
        counters.refused += answered
        counters.error = reason

    def expired(self, url: str, size: int) -> None:
        """`size` artifacts or verdicts of a stage that is over were dropped."""
        self._counters(url).expired += size

    def _counters(self, url: str) -> _Counters:
        name = _shown(url)
        counters = self._of.setdefault(name, _Counters())
        self._of.move_to_end(name)
        if len(self._of) > MAX_RECEIVERS:
            _, oldest = self._of.popitem(last=False)
            self._others.delivered += oldest.delivered
            self._others.refused += oldest.refused
            self._others.expired += oldest.expired
        return counters

    def report(self, counts: Iterable[ReceiverCounts]) -> list[ReceiverStatus]:
        """One entry for each receiver that was asked or has something in the outbox, those that wait first; what goes
        over MAX_RECEIVERS is summed up in a last one."""
        entries = {name: _entry(name, counters) for name, counters in reversed(self._of.items())}
        for count in counts:
            name = _shown(count.url)
            self._add(entries.setdefault(name, _entry(name, _Counters())), count)
        uncounted = entries.pop(OTHERS, None)
        ordered = sorted(entries.values(), key=lambda entry: entry.waiting + entry.parked, reverse=True)
        shown, rest = ordered[:MAX_RECEIVERS], ordered[MAX_RECEIVERS:]
        rest += [] if uncounted is None else [uncounted]
        if rest or self._others != _Counters():
            others = _entry(OTHERS, self._others)
            for name in ("waiting", "delivered", "refused", "parked", "expired"):
                setattr(others, name, sum((getattr(entry, name) for entry in rest), getattr(others, name)))
            ages = [entry.oldest_sec for entry in rest if entry.oldest_sec is not None]
            others.oldest_sec = max(ages, default=None)
            shown.append(others)
        return shown

    def _add(self, entry: ReceiverStatus, count: ReceiverCounts) -> None:
        entry.waiting += count.waiting
        entry.parked += count.parked
        if count.oldest_at is not None:
            age = round(max(0.0, self._clock() - count.oldest_at), 1)
            entry.oldest_sec = max(age, entry.oldest_sec or 0.0)


def _shown(url: str) -> str:
    return printable(shown_url(url))[:MAX_URL_CHARS]


def _entry(name: str, counters: _Counters) -> ReceiverStatus:
    return ReceiverStatus(
        receiver=name,
        waiting=0,
        delivered=counters.delivered,
        refused=counters.refused,
        parked=0,
        expired=counters.expired,
        error=None if counters.error is None else printable(counters.error),
    )
