"""A client of the HTTP API, and the requests that the tools send."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import RootModel

from gonka_poc import answers, data
from gonka_poc.cli.artifact_file import ArtifactFile
from gonka_poc.cli.connection import Answer, Connection
from gonka_poc.cli.server_process import wait_until
from gonka_poc.errors import ServerAnswerError
from gonka_poc.request_fields import MAX_LISTED, Artifact
from gonka_poc.threshold_data import ProofBatch, ProofVerdict, ThresholdRequest, ThresholdStatusAnswer
from gonka_poc.validation import Verdict, judge

PROGRESS_TIMEOUT_SEC = 120.0  # for the next nonces of a round
# distances lie in [0, 2], so with these every one is valid and no placeholder is called a fraud
ANY_DISTANCE, PLACEHOLDER = 2.0, 0.0

# fields of GET /versions that files of artifacts keep
COMPUTED_BY = frozenset({"vllm_version", "gonka_poc_version", "dtype", "attention_backend", "gpu"})

Progress = Callable[[int], None]
"""Called with the number of nonces done since the last call."""


def ignore_progress(nonces: int) -> None:
    """A Progress that shows none."""


Polled = answers.PendingAnswer | answers.ArtifactsAnswer | answers.ValidationAnswer | answers.FailedAnswer


class PoCClient:
    """A client of one server. Raises ServerAnswerError if it refuses, cannot be reached, or has no such API.

    `url`: of the server or of its API, or unix:PATH of its socket. `timeout`: seconds for one answer; None waits as
    long as it takes. `token` is the server's POC_API_TOKEN, `api_key` vLLM's own, for /v1.
    """

    def __init__(
        self, url: str, timeout: float | None = None, token: str | None = None, api_key: str | None = None
    ) -> None:
        self._server = Connection(url, timeout, token, api_key)
        self.url = self._server.url

    def __enter__(self) -> PoCClient:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._server.close()

    def model_name(self) -> str:
        """The name of the model that is served."""
        return str(self._server.vllm("GET", "/v1/models", None, "data", 0, "id"))

    def versions(self) -> answers.VersionsAnswer:
        """GET /versions."""
        return self._server.ask(answers.VersionsAnswer, "GET", "versions")

    def computed_by(self) -> dict[str, str]:
        """Releases, dtype, attention backend and GPU of the server; empty where it does not say."""
        try:
            answer = self.versions()
        except ServerAnswerError:
            return {}
        return {name: str(value) for name, value in answer.model_dump(include=set(COMPUTED_BY)).items()}

    def status(self) -> answers.StatusAnswer:
        """GET /status."""
        return self._server.ask(answers.StatusAnswer, "GET", "status")

    def dashboard_data(self) -> dict[str, Any]:
        """GET /dashboard/data, as the server gives it: releases differ in its fields."""
        return dict(self._server.vllm("GET", f"{data.PREFIX}/dashboard/data", None))

    def is_up(self) -> bool:
        """True once the server answers. Raises ServerAnswerError where it answers that it gives no proofs."""
        return self._server.is_up()

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

    def stop(self) -> answers.StopAnswer:
        """POST /stop."""
        return self._server.ask(answers.StopAnswer, "POST", "stop")

    @contextmanager
    def round(self, file: ArtifactFile, batch_size: int, url: str | None = None) -> Iterator[None]:
        """An artifact round that generates while this is entered; its callbacks go to `url`."""
        self.init_generate(round_request(file, batch_size, url))
        try:
            yield
        finally:
            self.stop()

    def init_generate(self, request: data.InitGenerateRequest) -> answers.OkAnswer:
        """POST /init/generate."""
        return self._server.ask(answers.OkAnswer, "POST", "init/generate", request.model_dump())

    def init_threshold(self, request: ThresholdRequest, phase: Literal["generate", "validate"]) -> answers.OkAnswer:
        """POST /init/generate or /init/validate of a threshold round."""
        return self._server.ask(
            answers.OkAnswer, "POST", f"init/{phase}", request.model_dump(mode="json", exclude_none=True)
        )

    def validate_distances(self, proof: ProofBatch) -> ProofVerdict:
        """POST /validate: the server recomputes the distances of `proof` in the threshold round that is set."""
        return self._server.ask(ProofVerdict, "POST", "validate", proof.model_dump())

    def distances(
        self, request: ThresholdRequest, nonces: Sequence[int], progress: Progress = ignore_progress
    ) -> list[float | None]:
        """The server's own distances of `nonces`, None for NaN or Inf: it validates placeholders, then is stopped."""
        request = request.model_copy(update={"r_target": ANY_DISTANCE})
        distances: list[float | None] = []
        self.init_threshold(request, "validate")
        try:
            for batch in data.chunks(list(nonces), request.batch_size or MAX_LISTED):
                proof = proof_of(request, batch, [PLACEHOLDER] * len(batch))
                distances += self.validate_distances(proof).computed_distances
                progress(len(batch))
        finally:
            self.stop()
        return distances

    def threshold_status(self) -> ThresholdStatusAnswer:
        """GET /status while a threshold round is set."""
        return self._server.ask(ThresholdStatusAnswer, "GET", "status")

    def queue(self, file: ArtifactFile, nonces: Sequence[int], batch_size: int) -> answers.QueuedAnswer:
        """POST /generate without waiting."""
        return self._generate(answers.QueuedAnswer, file, nonces, batch_size, wait=False)

    def poll(self, request_id: str) -> Polled:
        """GET /generate/{request_id}."""
        return self._server.ask(RootModel[Polled], "GET", f"generate/{request_id}").root

    def chat(self, model: str, text: str, max_tokens: int) -> str:
        """The answer of a greedy chat, `max_tokens` long."""
        messages = [{"role": "user", "content": text}]
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return str(self._server.vllm("POST", "/v1/chat/completions", body, "choices", 0, "message", "content") or "")

    def chat_answer(self, body: Any) -> Any:
        """The whole answer to a chat request."""
        return self._server.vllm("POST", "/v1/chat/completions", body)

    def chat_status(self, body: Any) -> int:
        """The HTTP status of a chat request, refused or not."""
        return self._server.sent("POST", "/v1/chat/completions", body).status_code

    def prefill(self, model: str, prompts: Sequence[Sequence[int]]) -> None:
        """Let the server prefill `prompts` (token ids): completions of one token each, in one request."""
        body = {"model": model, "prompt": prompts, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        num_choices = len(self._server.vllm("POST", "/v1/completions", body, "choices"))
        if num_choices != len(prompts):
            raise ServerAnswerError(f"{self.url} completed {num_choices} of {len(prompts)} prompts")

    def metrics(self) -> dict[str, float]:
        """GET /metrics: the values of gonka_poc by name; with labels as `name{label="value"}`."""
        return self._server.metrics()

    def generate(
        self,
        file: ArtifactFile,
        nonces: Sequence[int],
        batch_size: int,
        on_artifacts: Callable[[list[Artifact]], object],
        progress: Progress = ignore_progress,
        **calibration: Any,
    ) -> list[int]:
        """Compute `nonces` as `file` says, batch by batch, each for `on_artifacts`; those that gave NaN or Inf.

        `calibration`: the fields of a GenerateRequest that ask for vectors which are no proofs.
        """
        not_computed: list[int] = []
        for batch in data.chunks(list(nonces), batch_size):
            answer = self._generate(answers.ArtifactsAnswer, file, batch, batch_size, **calibration)
            on_artifacts(answer.artifacts)
            not_computed += answer.not_computed_nonces or []
            progress(len(batch))
        return not_computed

    def validate(
        self, file: ArtifactFile, stat_test: data.StatTest, batch_size: int, progress: Progress = ignore_progress
    ) -> Verdict:
        """Let the server recompute the artifacts of `file`; one verdict over all of them."""
        compared = 0
        mismatches: list[int] = []
        not_computed: list[int] = []
        for batch in data.chunks(file.artifacts, batch_size):
            nonces = [artifact.nonce for artifact in batch]
            claim = {"artifacts": [artifact.model_dump() for artifact in batch]}
            more = {"validation": claim, "stat_test": stat_test.model_dump()}
            answer = self._generate(answers.ValidationAnswer, file, nonces, batch_size, **more)
            compared += answer.n_total
            mismatches += answer.mismatch_nonces
            not_computed += answer.not_computed_nonces or []
            progress(len(batch))
        return judge(compared, mismatches, not_computed, stat_test)

    def _generate(
        self, answer: type[Answer], file: ArtifactFile, nonces: Sequence[int], batch_size: int, **more: Any
    ) -> Answer:
        body = {**_round_fields(file, batch_size), "nonces": list(nonces), "wait": True, **more}
        return self._server.ask(answer, "POST", "generate", body)


def round_request(file: ArtifactFile, batch_size: int, url: str | None = None) -> data.InitGenerateRequest:
    """A request for an artifact round as `file` says."""
    return data.InitGenerateRequest(**_round_fields(file, batch_size), url=url)


def _round_fields(file: ArtifactFile, batch_size: int) -> dict[str, Any]:
    whose = {"block_hash", "block_height", "public_key", "node_id", "node_count", "poc_stronger_rng"}
    params = file.model_dump(include={"model", "seq_len", "k_dim"})
    return {**file.model_dump(include=whose), "params": params, "batch_size": batch_size}


def threshold_request(**fields: Any) -> ThresholdRequest:
    """A request for a threshold round of node 0 of 1."""
    return ThresholdRequest(block_height=0, node_id=0, node_count=1, **fields)


def proof_of(request: ThresholdRequest, nonces: list[int], dist: list[float]) -> ProofBatch:
    """A claim of the prover of `request`."""
    identity = request.model_dump(include={"block_hash", "block_height", "public_key", "node_id"})
    return ProofBatch(**identity, nonces=nonces, dist=dist)
