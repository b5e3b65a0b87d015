"""The engine as its workers described it, for the status page and /metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gonka_poc.answers import EngineStatus, WorkerStatus


def described(model: str, answers: Sequence[Mapping[str, Any] | None], must_warm_up: bool) -> EngineStatus:
    """The status of an engine that serves `model`, from its workers' answers to `poc_describe`; `must_warm_up`: their
    warm-up decides whether proof runs compiled layers."""
    workers = [_worker_status(answer) for answer in answers if answer is not None]
    compiled = None if must_warm_up else False
    return EngineStatus(model=model, workers=sorted(workers, key=lambda worker: worker.rank), compiled=compiled)


def warmed_up(engine: EngineStatus, answers: Sequence[Mapping[str, Any]]) -> EngineStatus:
    """The status after the workers' answers to `poc_warm_up`; without any it failed."""
    figures: Mapping[str, Any] = next((answer for answer in answers if "floor" in answer), {})
    compiled = bool(answers) and all(answer["compiled"] for answer in answers)
    update = {"compiled": compiled, "floor": figures.get("floor"), "distance": figures.get("distance")}
    return engine.model_copy(update=update)


def computed_on(engine: EngineStatus) -> dict[str, Any]:
    """The fields of GET /versions about an engine, by name; empty before its workers were reached."""
    if not engine.workers:
        return {}
    first = engine.workers[0]
    facts = {
        "workers": len(engine.workers),
        "dtype": first.dtype,
        "attention_backend": first.attention_backend,
        "gpu": first.gpu,
        "compiled": engine.compiled,
        "noise_floor": engine.floor,
    }
    return {name: value for name, value in facts.items() if value not in ("", None)}


def _worker_status(answer: Mapping[str, Any]) -> WorkerStatus:
    layers = answer.get("layers", ())
    return WorkerStatus(
        rank=answer.get("rank", 0),
        gpu=answer.get("gpu", ""),
        dtype=answer.get("dtype", ""),
        attention_backend=answer.get("attention_backend", ""),
        first_layer=min(layers, default=None),
        last_layer=max(layers, default=None),
        is_output_rank=answer.get("is_output_rank", False),
    )
