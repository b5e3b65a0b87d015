"""The meaning of a receiver's answer for the batch that it was asked to take."""

from __future__ import annotations

from enum import Enum


class Meaning(Enum):
    """The fate of a batch after one try."""

    ACCEPTED = "accepted"
    OUT_OF_PHASE = "out of phase"
    """The receiver takes such a batch in another phase of its stage: ask again every interval, until the stage ends."""
    RETRY = "retry"
    """The fault is not of the batch: try again, then keep it."""
    STAGE_OVER = "stage over"
    """The stage that the batch belongs to is over: nobody will take it any more."""
    PARK = "park"
    """The receiver cannot take this batch, however often it is tried."""


# The texts that receivers say, in lower case, wherever they stand in the answer.
OUT_OF_PHASE_TEXTS = ("not in poc generate phase", "not in poc validate phase")
STAGE_OVER_TEXT = "not the active poc stage"
NODES_UNKNOWN_TEXT = "unknown node_num"  # the receiver was restarted, and learns of its nodes within minutes
# Only these speak of the batch itself. A 404, 401 or 405 speaks of the route to the receiver, which somebody can mend.
BATCH_REFUSED = (400, 413, 422)


def outcome_of(meaning: Meaning) -> str:
    """The label of a meaning in `gonka_poc_callbacks_total`, one of CALLBACK_OUTCOMES."""
    return meaning.name.lower()


def meaning_of(status: int, text: str) -> Meaning:
    """The meaning of an answer, by its HTTP status and the beginning of its body."""
    text = text.lower()
    if 200 <= status < 300:
        return Meaning.ACCEPTED
    if status == 503 and any(phrase in text for phrase in OUT_OF_PHASE_TEXTS):
        return Meaning.OUT_OF_PHASE
    if status == 400 and STAGE_OVER_TEXT in text:
        return Meaning.STAGE_OVER
    if status == 400 and (NODES_UNKNOWN_TEXT in text or text.lstrip().startswith("<")):
        return Meaning.RETRY  # HTML comes from a proxy, which speaks of the way to the receiver
    return Meaning.PARK if status in BATCH_REFUSED else Meaning.RETRY
