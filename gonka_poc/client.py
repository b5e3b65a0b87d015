"""The client side of the API: what the command line and the demo ask of a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import httpx

from gonka_poc.artifact_file import ArtifactFile
from gonka_poc.data import (
    Artifact,
    ArtifactsAnswer,
    InitGenerateRequest,
    StatTest,
    StatusAnswer,
    ValidationAnswer,
    chunks,
)
from gonka_poc.errors import ServerAnswerError
from gonka_poc.validation import Verdict, judge

PREFIX = "/api/v1/pow"
CONNECT_TIMEOUT_SEC = 10.0

Progress = Callable[[int], None]
"""Called with the number of nonces that were done since the last call."""


def ignore_progress(nonces: int) -> None:
    """The Progress that shows none."""


class PoCClient:
    """One server. Every method raises ServerAnswerError where the server refuses or cannot be reached."""

    def __init__(self, url: str, timeout: float | None = None, token: str | None = None) -> None:
        """`timeout` in seconds for one answer; None waits as long as the server works (chat goes first there)."""
        self.url = url.rstrip("/")
        # what fails before the request has left is tried again; what may have reached the server is not
        self._http = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(timeout, connect=CONNECT_TIMEOUT_SEC),
            transport=httpx.HTTPTransport(retries=2),
            headers={"Authorization": f"Bearer {token}"} if token else {},
        )

    def __enter__(self) -> PoCClient:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._http.close()

    def model_name(self) -> str:
        """The name of the model that is served."""
        return self._call("GET", "/v1/models")["data"][0]["id"]

    def status(self) -> StatusAnswer:
        """GET /status."""
        return StatusAnswer.model_validate(self._call("GET", f"{PREFIX}/status"))

    def stop(self) -> None:
        """POST /stop."""
        self._call("POST", f"{PREFIX}/stop")

    def init_generate(self, request: InitGenerateRequest) -> None:
        """POST /init/generate."""
        self._call("POST", f"{PREFIX}/init/generate", request.model_dump())

    def chat(self, model: str, text: str, max_tokens: int) -> str:
        """The answer of a greedy chat."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        return self._call("POST", "/v1/chat/completions", body)["choices"][0]["message"]["content"]

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
            answer = ArtifactsAnswer.model_validate(self._generate(file, batch, batch_size))
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
            answer = ValidationAnswer.model_validate(
                self._generate(file, [artifact.nonce for artifact in batch], batch_size, **more)
            )
            compared += answer.n_total
            mismatches += answer.mismatch_nonces
            not_computed += answer.not_computed_nonces or []
            progress(len(batch))
        return judge(compared, mismatches, not_computed, stat_test)

    def _generate(self, file: ArtifactFile, nonces: Sequence[int], batch_size: int, **more: Any) -> dict[str, Any]:
        identity = file.model_dump(
            include={"block_hash", "block_height", "public_key", "node_id", "node_count", "poc_stronger_rng"}
        )
        body = {
            **identity,
            "params": {"model": file.model, "seq_len": file.seq_len, "k_dim": file.k_dim},
            "nonces": list(nonces),
            "batch_size": batch_size,
            "wait": True,
            **more,
        }
        return self._call("POST", f"{PREFIX}/generate", body)

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        try:
            response = self._http.request(method, path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerAnswerError(
                f"{self.url} cannot be reached: {str(error) or type(error).__name__}; is the server running there?"
            ) from error
        if response.is_success:
            try:
                return response.json()
            except ValueError as error:
                raise ServerAnswerError(f"{self.url}{path} did not answer with JSON; is it a vLLM server?") from error
        if response.status_code == 404 and path.startswith(PREFIX):
            raise ServerAnswerError(
                f"{self.url} has no {PREFIX}: start it with --middleware gonka_poc.middleware.PoCMiddleware"
            )
        raise ServerAnswerError(f"{self.url}{path} answered {response.status_code}: {_detail(response)}")


def _detail(response: httpx.Response) -> str:
    """What the server says is wrong: our sentence, FastAPI's list, or the text itself."""
    try:
        detail = response.json()["detail"]
    except (ValueError, KeyError, TypeError):
        return response.text[:500]
    if isinstance(detail, list):
        return "; ".join(f"{'.'.join(map(str, item['loc'][1:]))}: {item['msg']}" for item in detail)
    return str(detail)
