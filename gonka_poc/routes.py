"""The HTTP API under /api/v1/pow (docs/protocol.md, section 6)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response

from gonka_poc.answers import (
    Completed,
    ErrorAnswer,
    FailedAnswer,
    GenerateAnswer,
    OkAnswer,
    PendingAnswer,
    PowStatus,
    QueuedAnswer,
    State,
    StatusAnswer,
    StopAnswer,
    VersionsAnswer,
)
from gonka_poc.data import PREFIX, GenerateRequest, InitGenerateRequest
from gonka_poc.errors import PoCError, printable
from gonka_poc.server.api_docs import add_docs
from gonka_poc.server.bodies import BodyRoute
from gonka_poc.server.dashboard import DashboardData, RecentErrors, dashboard_data, dashboard_page
from gonka_poc.server.guards import error_response
from gonka_poc.server.service import PoCService
from gonka_poc.threshold_data import InitGenerateBody, ProofBatch, ProofVerdict, ThresholdRequest, ThresholdStatusAnswer
from gonka_poc.version import __version__

MAX_LISTED_ERRORS = 20
MAX_ERROR_TEXT = 300
DISCONNECT_POLL_SEC = 0.5

logger = logging.getLogger("vllm.gonka_poc.routes")

Outcome = TypeVar("Outcome")


def service_of(request: Request) -> PoCService:
    """The service of the app that this request came to."""
    return request.app.state.poc_service


Service = Annotated[PoCService, Depends(service_of)]


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer} for status in statuses}


router = APIRouter(prefix=PREFIX, tags=["proof of compute"], responses=_errors(401, 403), route_class=BodyRoute)


@router.post("/init/generate", responses=_errors(400, 408, 409, 413, 500, 501, 503, 507))
async def init_generate(body: InitGenerateBody, service: Service) -> OkAnswer:
    """Start continuous generation of this node's nonces: of artifacts with `params`, of distances with `r_target`;
    409 if a round runs."""
    if isinstance(body, InitGenerateRequest):
        await service.init_generate(body)
    else:
        await service.init_threshold(body, "GENERATING")
    return _ok("GENERATING")


@router.post("/init", responses=_errors(400, 408, 409, 413, 500, 501, 503, 507))
async def init(body: ThresholdRequest, service: Service) -> OkAnswer:
    """Set a threshold round that waits for its phase; 409 if a round generates."""
    await service.init_threshold(body, "IDLE")
    return _ok("IDLE")


@router.post("/init/validate", responses=_errors(400, 408, 409, 413, 500, 501, 503, 507))
async def init_validate(body: ThresholdRequest, service: Service) -> OkAnswer:
    """Set a threshold round that validates; 409 if a round generates."""
    await service.init_threshold(body, "VALIDATING")
    return _ok("VALIDATING")


@router.post("/phase/generate", responses=_errors(400, 409, 500, 503))
async def phase_generate(service: Service) -> OkAnswer:
    """Let the threshold round generate, from where it left off; 400 if none is set."""
    await service.enter_phase("GENERATING")
    return _ok("GENERATING")


@router.post("/phase/validate", responses=_errors(400))
async def phase_validate(service: Service) -> OkAnswer:
    """Let the threshold round only validate; 400 if none is set."""
    await service.enter_phase("VALIDATING")
    return _ok("VALIDATING")


@router.post("/validate", responses=_errors(400, 408, 409, 413, 429, 500, 501, 503, 507))
async def validate(body: ProofBatch, request: Request, service: Service) -> ProofVerdict:
    """The verdict over a prover's distances in the threshold round that is set; 400 if none is."""
    job = await service.validate(body)
    return await _outcome_while_connected(job.outcome, partial(service.proofs.drop, job), request)


@router.post("/generate", response_model=GenerateAnswer, responses=_errors(400, 408, 409, 413, 429, 500, 501, 503, 507))
async def generate(body: GenerateRequest, request: Request, service: Service) -> QueuedAnswer | Response:
    """Artifacts of given nonces, or the validation of received ones; `wait` true: inline, false: queued."""
    job = await service.submit(body)
    if not body.wait:
        return QueuedAnswer(request_id=job.request_id, queued_count=len(body.nonces))
    await _outcome_while_connected(job.outcome, partial(service.queue.drop, job), request)
    assert job.body is not None  # an outcome that is no error
    return _raw_json(job.body)


@router.get("/generate/{request_id}", response_model=PendingAnswer | Completed | FailedAnswer, responses=_errors(404))
async def generate_result(request_id: str, service: Service) -> PendingAnswer | Response:
    """State or result of a queued request; 404 if unknown or expired."""
    answer = service.queue.poll(request_id)
    return _raw_json(answer) if isinstance(answer, bytes) else answer


def _raw_json(body: bytes) -> Response:  # can be large: made into JSON once, and not looked at again
    return Response(body, media_type="application/json")


@router.get("/status", response_model=ThresholdStatusAnswer | StatusAnswer)
async def status(service: Service) -> StatusAnswer | Response:
    """The round that generates; of a threshold round, also its valid nonces."""
    answer = service.status_answer()
    return _raw_json(answer) if isinstance(answer, bytes) else answer


@router.get("/versions", responses=_errors(500, 503), response_model_exclude_none=True)
async def versions(service: Service) -> VersionsAnswer:
    """The releases of vLLM and gonka_poc, and whether chat is answered while this server validates."""
    return await service.versions()


@router.post("/stop")
async def stop(service: Service) -> StopAnswer:
    """Stop the round and drop queued requests; `stopped` says what there was to stop."""
    return StopAnswer(pow_status=PowStatus(status="STOPPED"), stopped=service.stop())


@router.get("/dashboard", response_class=HTMLResponse)
async def dashboard() -> HTMLResponse:
    """The status page; it asks for the token itself where there is one."""
    return dashboard_page()


@router.get("/dashboard/data")
async def dashboard_figures(service: Service, request: Request) -> DashboardData:
    """The figures of the status page."""
    return dashboard_data(service, request.app.state.recent_errors)


def _ok(state: State) -> OkAnswer:
    return OkAnswer(pow_status=PowStatus(status=state))


async def _outcome_while_connected(
    outcome: asyncio.Future[Outcome], drop: Callable[[str], None], request: Request
) -> Outcome:
    """The outcome of a job; its work ends when its client hangs up, or the engine is dead, which it may not meet."""
    try:
        while not (await asyncio.wait([outcome], timeout=DISCONNECT_POLL_SEC))[0]:
            if await request.is_disconnected():
                break
            service_of(request).ensure_engine_alive()
    finally:
        drop("nobody waits for its answer any more")
    return outcome.result()


async def answer_poc_error(request: Request, error: Exception) -> JSONResponse:
    """A PoCError as its HTTP status and a sentence."""
    assert isinstance(error, PoCError)
    if error.http_status >= 500:
        logger.error("%s %a: %s", request.method, request.url.path, printable(str(error)))
    return error_response(error)


async def answer_invalid_request(request: Request, error: Exception) -> JSONResponse:
    """422 with what is wrong where; not what was sent, which can be megabytes."""
    assert isinstance(error, RequestValidationError)
    listed = [
        {"type": item["type"], "loc": [_shortened(part) for part in item["loc"]], "msg": _shortened(item["msg"])}
        for item in error.errors()[:MAX_LISTED_ERRORS]
    ]
    return JSONResponse({"detail": listed}, status_code=422)


def _shortened(part: str | int) -> str | int:  # an unknown field is named by what was sent
    return part[:MAX_ERROR_TEXT] if isinstance(part, str) else part


def make_app(service: PoCService, recent_errors: RecentErrors | None = None) -> FastAPI:
    """The application of /api/v1/pow/* over `service`."""
    app = FastAPI(
        title="gonka_poc",
        version=__version__,
        description="Proof of compute beside vLLM's own API.",
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.poc_service = service
    app.state.body_lock = asyncio.Lock()
    app.state.recent_errors = recent_errors or RecentErrors()
    app.include_router(router)
    add_docs(app, service)
    app.add_exception_handler(PoCError, answer_poc_error)
    app.add_exception_handler(RequestValidationError, answer_invalid_request)
    return app
