"""The client side of the API: what the command line and the demo ask of a server."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, Field, RootModel, ValidationError

from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.data import (
    PREFIX,
    Artifact,
    ArtifactsAnswer,
    FailedAnswer,
    InitGenerateRequest,
    OkAnswer,
    PendingAnswer,
    QueuedAnswer,
    StatTest,
    StatusAnswer,
    StopAnswer,
    ValidationAnswer,
    chunks,
)
from gonka_poc.errors import ServerAnswerError
from gonka_poc.threshold_data import ProofBatch, ProofVerdict, ThresholdRequest, ThresholdStatusAnswer
from gonka_poc.validation import Verdict, judge
from gonka_poc.vllm_compat import MIDDLEWARE

CONNECT_TIMEOUT_SEC = 10.0

Progress = Callable[[int], None]
"""Called with the number of nonces that were done since the last call."""


def ignore_progress(nonces: int) -> None:
    """The Progress that shows none."""


Answer = TypeVar("Answer", bound=BaseModel)


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model] = Field(min_length=1)


class _Message(BaseModel):
    content: str | None


class _Choice(BaseModel):
    message: _Message


class _Chat(BaseModel):
    choices: list[_Choice] = Field(min_length=1)


class _Completion(BaseModel):
    choices: list[Any]


Polled = PendingAnswer | ArtifactsAnswer | ValidationAnswer | FailedAnswer


class PoCClient:
    """One server. Everything raises ServerAnswerError where the server refuses, cannot be reached or cannot be one."""

    def __init__(
        self, url: str, timeout: float | None = None, token: str | None = None, api_key: str | None = None
    ) -> None:
        """`url`: of the server, or of its API there. `timeout`: seconds for one answer; None waits as long as the
        server works (chat goes first there).

        `token` is the server's POC_API_TOKEN, `api_key` vLLM's own, for /v1.
        """
        self._token, self._api_key = token, api_key
        self.url = url.rstrip("/").removesuffix(PREFIX)
        if not _is_address(self.url):
            raise ServerAnswerError(f"{url!a} is no address of a server: write it as http://HOST:PORT")
        # what fails before the request has left is tried again; what may have reached the server is not
        self._http = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(timeout, connect=CONNECT_TIMEOUT_SEC),
            transport=httpx.HTTPTransport(retries=2),
        )

    def __enter__(self) -> PoCClient:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._http.close()

    def model_name(self) -> str:
        """The name of the model that is served."""
        return self._ask(_Models, "GET", "/v1/models").data[0].id

    def status(self) -> StatusAnswer:
        """GET /status."""
        return self._ask(StatusAnswer, "GET", f"{PREFIX}/status")

    def total_processed(self) -> int:
        """The nonces that the round has processed. Raises ServerAnswerError also where none generates."""
        status = self.status()
        if status.stats is None:
            raise ServerAnswerError(f"the round ended: {status.error}")
        return status.stats.total_processed

    def stop(self) -> StopAnswer:
        """POST /stop."""
        return self._ask(StopAnswer, "POST", f"{PREFIX}/stop")

    def init_generate(self, request: InitGenerateRequest) -> OkAnswer:
        """POST /init/generate."""
        return self._ask(OkAnswer, "POST", f"{PREFIX}/init/generate", request.model_dump())

    def init_threshold(
        self, request: ThresholdRequest, then: Literal["generate", "validate"] | None = None
    ) -> OkAnswer:
        """POST /init, or /init/generate or /init/validate: set a threshold round, which then waits, or begins."""
        path = f"{PREFIX}/init/{then}" if then else f"{PREFIX}/init"
        return self._ask(OkAnswer, "POST", path, request.model_dump(mode="json", exclude_none=True))

    def phase(self, phase: Literal["generate", "validate"]) -> OkAnswer:
        """POST /phase/generate or /phase/validate."""
        return self._ask(OkAnswer, "POST", f"{PREFIX}/phase/{phase}")

    def validate_distances(self, proof: ProofBatch) -> ProofVerdict:
        """POST /validate: the server recomputes the distances of `proof` in the threshold round that is set."""
        return self._ask(ProofVerdict, "POST", f"{PREFIX}/validate", proof.model_dump())

    def threshold_status(self) -> ThresholdStatusAnswer:
        """GET /status while a threshold round is set."""
        return self._ask(ThresholdStatusAnswer, "GET", f"{PREFIX}/status")

    def queue(self, file: ArtifactFile, nonces: Sequence[int], batch_size: int) -> QueuedAnswer:
        """POST /generate without waiting."""
        return self._generate(QueuedAnswer, file, nonces, batch_size, wait=False)

    def poll(self, request_id: str) -> Polled:
        """GET /generate/{request_id}."""
        return self._ask(RootModel[Polled], "GET", f"{PREFIX}/generate/{request_id}").root

    def chat(self, model: str, text: str, max_tokens: int, ignore_eos: bool = False) -> str:
        """The answer of a greedy chat; with `ignore_eos` (vLLM's own field) it is `max_tokens` long."""
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
            **({"ignore_eos": True} if ignore_eos else {}),
        }
        return self._ask(_Chat, "POST", "/v1/chat/completions", body).choices[0].message.content or ""

    def prefill(self, model: str, prompts: Sequence[Sequence[int]]) -> None:
        """Let the server prefill `prompts` (token ids): completions of one token each, in one request."""
        body = {"model": model, "prompt": prompts, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        answer = self._ask(_Completion, "POST", "/v1/completions", body)
        if len(answer.choices) != len(prompts):
            raise ServerAnswerError(f"{self.url} completed {len(answer.choices)} of {len(prompts)} prompts")

    def metrics(self) -> dict[str, float]:
        """GET /metrics: this package's figures by name; one with labels as `name{label="value"}`."""
        response = self._response("GET", "/metrics", None)
        families = text_string_to_metric_families(response.text)
        samples = [sample for family in families for sample in family.samples if sample.name.startswith("gonka_poc_")]
        return {sample.name + _shown_labels(sample.labels): sample.value for sample in samples}

    def generate(
        self,
        file: ArtifactFile,
        nonces: Sequence[int],
        batch_size: int,
        keep: Callable[[list[Artifact]], None],
        progress: Progress = ignore_progress,
    ) -> list[int]:
        """Compute `nonces` for what `file` asks, one request a batch; `keep` takes each batch's artifacts.

        Returns the nonces that the server could not compute (NaN or Inf).
        """
        not_computed: list[int] = []
        for batch in chunks(list(nonces), batch_size):
            answer = self._generate(ArtifactsAnswer, file, batch, batch_size)
            keep(answer.artifacts)
            not_computed += answer.not_computed_nonces or []
            progress(len(batch))
        return not_computed

    def validate(
        self, file: ArtifactFile, stat_test: StatTest, batch_size: int, progress: Progress = ignore_progress
    ) -> Verdict:
        """Let the server recompute the artifacts of `file`; one verdict over all of them."""
        compared = 0
        mismatches: list[int] = []
        not_computed: list[int] = []
        for batch in chunks(file.artifacts, batch_size):
            more = {
                "validation": {"artifacts": [artifact.model_dump() for artifact in batch]},
                "stat_test": stat_test.model_dump(),
            }
            nonces = [artifact.nonce for artifact in batch]
            answer = self._generate(ValidationAnswer, file, nonces, batch_size, **more)
            compared += answer.n_total
            mismatches += answer.mismatch_nonces
            not_computed += answer.not_computed_nonces or []
            progress(len(batch))
        return judge(compared, mismatches, not_computed, stat_test)

    def _generate(
        self, answer: type[Answer], file: ArtifactFile, nonces: Sequence[int], batch_size: int, **more: Any
    ) -> Answer:
        body = {**_round_fields(file, batch_size), "nonces": list(nonces), "wait": True, **more}
        return self._ask(answer, "POST", f"{PREFIX}/generate", body)

    def _ask(self, answer: type[Answer], method: str, path: str, body: Any = None) -> Answer:
        try:
            return answer.model_validate_json(self._response(method, path, body).content)
        except ValidationError as error:
            raise ServerAnswerError(
                f"{self.url}{path} answered something else than expected; is it a vLLM server with gonka_poc?"
            ) from error

    def _response(self, method: str, path: str, body: Any) -> httpx.Response:
        secret = self._token if path.startswith(PREFIX) else self._api_key
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        try:
            response = self._http.request(method, path, json=body, headers=headers)
        except httpx.HTTPError as error:
            raise ServerAnswerError(
                f"{self.url} cannot be reached: {str(error) or type(error).__name__}; is the server running there?"
            ) from error
        if response.status_code == 404 and path.startswith(PREFIX):
            raise ServerAnswerError(f"{self.url} has no {PREFIX}: start it with --middleware {MIDDLEWARE}")
        if response.status_code == 401 and path.startswith(PREFIX):
            raise ServerAnswerError(f"{self.url} answered 401: give the server's POC_API_TOKEN with --token")
        if not response.is_success:
            raise ServerAnswerError(f"{self.url}{path} answered {response.status_code}: {_detail(response)}")
        return response


def _is_address(url: str) -> bool:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)


def round_request(file: ArtifactFile, batch_size: int, url: str | None = None) -> InitGenerateRequest:
    """The artifact round that makes what `file` asks."""
    return InitGenerateRequest(**_round_fields(file, batch_size), url=url)


def _round_fields(file: ArtifactFile, batch_size: int) -> dict[str, Any]:
    """What every request for artifacts of `file` says."""
    identity = file.model_dump(
        include={"block_hash", "block_height", "public_key", "node_id", "node_count", "poc_stronger_rng"}
    )
    params = {"model": file.model, "seq_len": file.seq_len, "k_dim": file.k_dim}
    return {**identity, "params": params, "batch_size": batch_size}


def _detail(response: httpx.Response) -> str:
    """What the server says is wrong: our sentence, FastAPI's list, or the text itself."""
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        if "<html" in response.text[:500].lower():
            return "a page of HTML; is it a vLLM server with gonka_poc?"
        return response.text[:500]
    if isinstance(detail, list):
        return "; ".join(f"{'.'.join(map(str, item['loc'][1:]))}: {item['msg']}" for item in detail)
    return str(detail)


def _shown_labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}" if labels else ""
