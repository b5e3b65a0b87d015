"""A client of the HTTP API, and the requests that the tools send."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, RootModel, ValidationError

from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.polling import wait_until
from gonka_poc.cli.refusals import NO_POC_SERVER, refusal_text
from gonka_poc.data import (
    PREFIX,
    Artifact,
    ArtifactsAnswer,
    FailedAnswer,
    InitGenerateRequest,
    OkAnswer,
    PendingAnswer,
    QueuedAnswer,
    Randomization,
    StatTest,
    StatusAnswer,
    StopAnswer,
    ValidationAnswer,
    chunks,
)
from gonka_poc.errors import ServerAnswerError
from gonka_poc.threshold_data import ProofBatch, ProofVerdict, ThresholdRequest, ThresholdStatusAnswer
from gonka_poc.validation import Verdict, judge

CONNECT_TIMEOUT_SEC = 10.0
PROGRESS_TIMEOUT_SEC = 120.0  # for the next nonces of a round
# distances lie in [0, 2], so with these every one is valid and no placeholder is called a fraud
ANY_DISTANCE, PLACEHOLDER = 2.0, 0.0

Progress = Callable[[int], None]
"""Called with the number of nonces done since the last call."""


def ignore_progress(nonces: int) -> None:
    """A Progress that shows none."""


Answer = TypeVar("Answer", bound=BaseModel)


Polled = PendingAnswer | ArtifactsAnswer | ValidationAnswer | FailedAnswer


class PoCClient:
    """A client of one server. Raises ServerAnswerError if it refuses, cannot be reached, or has no such API."""

    def __init__(
        self, url: str, timeout: float | None = None, token: str | None = None, api_key: str | None = None
    ) -> None:
        """`url`: of the server or of its API. `timeout`: seconds for one answer; None waits as long as it takes.

        `token` is the server's POC_API_TOKEN, `api_key` vLLM's own, for /v1.
        """
        self._token, self._api_key = token, api_key
        self.url = url.rstrip("/").removesuffix(PREFIX)
        if not _is_address(self.url):
            raise ServerAnswerError(f"{url!a} is no address of a server: write it as http://HOST:PORT")
        # only connecting is tried again: a request that was sent may have reached the server
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
        return str(self._vllm("GET", "/v1/models", None, "data", 0, "id"))

    def status(self) -> StatusAnswer:
        """GET /status."""
        return self._ask(StatusAnswer, "GET", f"{PREFIX}/status")

    def total_processed(self) -> int:
        """The number of nonces that the round has processed. Raises ServerAnswerError if no round generates."""
        status = self.status()
        if status.stats is None:
            raise ServerAnswerError(f"the round ended: {status.error}")
        return status.stats.total_processed

    def wait_for_progress(self) -> int:
        """Wait until the round has processed more nonces than now; the new number. Raises ServerAnswerError."""
        before = self.total_processed()
        if not wait_until(lambda: self.total_processed() > before, PROGRESS_TIMEOUT_SEC):
            raise ServerAnswerError(
                f"the round computed nothing in {PROGRESS_TIMEOUT_SEC:g} s; is the server busy with chats?"
            )
        return self.total_processed()

    def refuse_if_generating(self) -> None:
        """Raise ServerAnswerError if the server generates: a test tool must not end a round that earns."""
        if self.status().status == "GENERATING":
            raise ServerAnswerError(f"{self.url} generates; `gonka-poc stop` ends that, then start this tool again")

    def stop(self) -> StopAnswer:
        """POST /stop."""
        return self._ask(StopAnswer, "POST", f"{PREFIX}/stop")

    @contextmanager
    def round(self, file: ArtifactFile, batch_size: int, url: str | None = None) -> Iterator[None]:
        """An artifact round that generates while this is entered; its callbacks go to `url`."""
        self.init_generate(round_request(file, batch_size, url))
        try:
            yield
        finally:
            self.stop()

    def init_generate(self, request: InitGenerateRequest) -> OkAnswer:
        """POST /init/generate."""
        return self._ask(OkAnswer, "POST", f"{PREFIX}/init/generate", request.model_dump())

    def init_threshold(self, request: ThresholdRequest, phase: Literal["generate", "validate"]) -> OkAnswer:
        """POST /init/generate or /init/validate of a threshold round."""
        return self._ask(OkAnswer, "POST", f"{PREFIX}/init/{phase}", request.model_dump(mode="json", exclude_none=True))

    def validate_distances(self, proof: ProofBatch) -> ProofVerdict:
        """POST /validate: the server recomputes the distances of `proof` in the threshold round that is set."""
        return self._ask(ProofVerdict, "POST", f"{PREFIX}/validate", proof.model_dump())

    def distances(
        self, request: ThresholdRequest, nonces: Sequence[int], progress: Progress = ignore_progress
    ) -> list[float | None]:
        """The server's own distances of `nonces`, None for NaN or Inf: it validates placeholders, then is stopped."""
        request = request.model_copy(update={"r_target": ANY_DISTANCE})
        distances: list[float | None] = []
        self.init_threshold(request, "validate")
        try:
            for batch in chunks(list(nonces), request.batch_size):
                proof = proof_of(request, batch, [PLACEHOLDER] * len(batch))
                distances += self.validate_distances(proof).computed_distances
                progress(len(batch))
        finally:
            self.stop()
        return distances

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
        """The answer of a greedy chat; with `ignore_eos` (a field of vLLM's) it is `max_tokens` long."""
        body: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
            **({"ignore_eos": True} if ignore_eos else {}),
        }
        return str(self._vllm("POST", "/v1/chat/completions", body, "choices", 0, "message", "content") or "")

    def prefill(self, model: str, prompts: Sequence[Sequence[int]]) -> None:
        """Let the server prefill `prompts` (token ids): completions of one token each, in one request."""
        body = {"model": model, "prompt": prompts, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        num_choices = len(self._vllm("POST", "/v1/completions", body, "choices"))
        if num_choices != len(prompts):
            raise ServerAnswerError(f"{self.url} completed {num_choices} of {len(prompts)} prompts")

    def metrics(self) -> dict[str, float]:
        """GET /metrics: the values of gonka_poc by name; with labels as `name{label="value"}`."""
        response = self._response("GET", "/metrics", None)
        families = text_string_to_metric_families(response.text)
        samples = [sample for family in families for sample in family.samples if sample.name.startswith("gonka_poc_")]
        return {sample.name + _labels(sample.labels): sample.value for sample in samples}

    def generate(
        self,
        file: ArtifactFile,
        nonces: Sequence[int],
        batch_size: int,
        on_artifacts: Callable[[list[Artifact]], object],
        progress: Progress = ignore_progress,
    ) -> list[int]:
        """Compute `nonces` as `file` says, one request per batch; `on_artifacts` takes the artifacts of each.

        Returns the nonces that the server could not compute (NaN or Inf).
        """
        not_computed: list[int] = []
        for batch in chunks(list(nonces), batch_size):
            answer = self._generate(ArtifactsAnswer, file, batch, batch_size)
            on_artifacts(answer.artifacts)
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
            raise self._unexpected(path) from error

    def _vllm(self, method: str, path: str, body: Any, *keys: str | int) -> Any:
        """The value at `keys` of an answer of vLLM's own API."""
        try:
            return functools.reduce(lambda value, key: value[key], keys, self._response(method, path, body).json())
        except (ValueError, LookupError, TypeError) as error:
            raise self._unexpected(path) from error

    def _unexpected(self, path: str) -> ServerAnswerError:
        return ServerAnswerError(f"{self.url}{path} answered something else than expected; {NO_POC_SERVER}")

    def _response(self, method: str, path: str, body: Any) -> httpx.Response:
        secret = self._token if path.startswith(PREFIX) else self._api_key
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        try:
            response = self._http.request(method, path, json=body, headers=headers)
        except httpx.HTTPError as error:
            raise ServerAnswerError(
                f"{self.url} cannot be reached: {str(error) or type(error).__name__}; is the server running there?"
            ) from error
        if not response.is_success:
            raise ServerAnswerError(refusal_text(response, self.url, path, bool(secret)))
        return response


def _is_address(url: str) -> bool:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)


def round_request(file: ArtifactFile, batch_size: int, url: str | None = None) -> InitGenerateRequest:
    """A request for an artifact round as `file` says."""
    return InitGenerateRequest(**_round_fields(file, batch_size), url=url)


def _round_fields(file: ArtifactFile, batch_size: int) -> dict[str, Any]:
    """The fields that every request for artifacts of `file` has."""
    identity = file.model_dump(
        include={"block_hash", "block_height", "public_key", "node_id", "node_count", "poc_stronger_rng"}
    )
    params = {"model": file.model, "seq_len": file.seq_len, "k_dim": file.k_dim}
    return {**identity, "params": params, "batch_size": batch_size}


def threshold_request(
    block_hash: str,
    public_key: str,
    r_target: float,
    seq_len: int,
    batch_size: int,
    randomization: Randomization = Randomization.SIGN_FLIPS,
) -> ThresholdRequest:
    """A request for a threshold round of node 0 of 1."""
    return ThresholdRequest(
        block_hash=block_hash,
        block_height=0,
        public_key=public_key,
        r_target=r_target,
        node_id=0,
        node_count=1,
        seq_len=seq_len,
        batch_size=batch_size,
        randomization=randomization,
    )


def proof_of(request: ThresholdRequest, nonces: list[int], dist: list[float]) -> ProofBatch:
    """A claim of the prover of `request`."""
    identity = request.model_dump(include={"block_hash", "block_height", "public_key", "node_id"})
    return ProofBatch(**identity, nonces=nonces, dist=dist)


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}" if labels else ""
