"""The HTTP connection to one server: addresses, secrets, and what is said where no answer is as expected."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import httpx
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ValidationError

from gonka_poc import data
from gonka_poc.certificates import ssl_context
from gonka_poc.cli.refusals import NO_POC_SERVER, reason_of, refusal_text
from gonka_poc.errors import ServerAnswerError, printable

CONNECT_TIMEOUT_SEC = 10.0

Answer = TypeVar("Answer", bound=BaseModel)


class Connection:
    """A connection to one server. Each method raises ServerAnswerError if it refuses, cannot be reached, or answers
    something else than expected; the parameters are those of PoCClient."""

    def __init__(self, url: str, timeout: float | None, token: str | None, api_key: str | None) -> None:
        self._token, self._api_key = token, api_key
        self.url = url.rstrip("/").removesuffix(data.PREFIX)
        self._socket = socket_path(self.url)
        self._http = _http_client(self.url, self._socket, timeout)

    def close(self) -> None:
        """Close it."""
        self._http.close()

    def is_up(self) -> bool:
        """True once the server answers. Raises ServerAnswerError where it answers that it gives no proofs."""
        path = f"{data.PREFIX}/status"
        try:
            response = self.sent("GET", path, None)
        except ServerAnswerError:
            return False
        if response.status_code in (502, 503, 504):  # a proxy before a server that starts, or its engine does
            return False
        if not response.is_success:
            raise ServerAnswerError(refusal_text(response, self.url, path, bool(self._secret(path))))
        return True

    def metrics(self) -> dict[str, float]:
        """GET /metrics: the values of gonka_poc by name; with labels as `name{label="value"}`."""
        found = {}
        for family in text_string_to_metric_families(self.response("GET", "/metrics", None).text):
            for sample in family.samples:
                labels = ",".join(f'{name}="{value}"' for name, value in sample.labels.items())
                if sample.name.startswith("gonka_poc_"):
                    found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return found

    def ask(self, answer: type[Answer], method: str, name: str, body: Any = None) -> Answer:
        """The answer of `name` of the API, as a model."""
        path = f"{data.PREFIX}/{name}"
        try:
            return answer.model_validate_json(self.response(method, path, body).content)
        except ValidationError as error:
            raise self._unexpected(path) from error

    def vllm(self, method: str, path: str, body: Any, *keys: str | int) -> Any:
        """The JSON at `path`, or the value at `keys` in it."""
        try:
            return functools.reduce(lambda value, key: value[key], keys, self.response(method, path, body).json())
        except (ValueError, LookupError, TypeError) as error:
            raise self._unexpected(path) from error

    def _unexpected(self, path: str) -> ServerAnswerError:
        return ServerAnswerError(f"{self.url}{path} answered something else than expected; {NO_POC_SERVER}")

    def response(self, method: str, path: str, body: Any) -> httpx.Response:
        """The answer at `path`, which is a success."""
        response = self.sent(method, path, body)
        if not response.is_success:
            text = refusal_text(response, self.url, path, bool(self._secret(path)))
            raise ServerAnswerError(text, response.status_code, reason_of(response))
        return response

    def _secret(self, path: str) -> str | None:
        return self._token if path.startswith(data.PREFIX) else self._api_key

    def sent(self, method: str, path: str, body: Any) -> httpx.Response:
        """The answer at `path`, whatever its status."""
        secret = self._secret(path)
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        try:
            return self._http.request(method, path, json=body, headers=headers)
        except httpx.HTTPError as error:
            if self._socket and not Path(self._socket).is_socket():
                there = "is no socket" if Path(self._socket).exists() else "does not exist"
                raise ServerAnswerError(
                    f"{printable(self._socket)} {there}; is the server running with --uds {printable(self._socket)}?"
                ) from error
            raise ServerAnswerError(
                f"{self.url} cannot be reached: {str(error) or type(error).__name__}; is the server running there?"
            ) from error


def _http_client(url: str, socket: str | None, timeout: float | None) -> httpx.Client:
    """A client for requests to `url`, or to a socket. Raises ServerAnswerError for what is neither."""
    base_url = "http://localhost" if socket else url
    try:
        parsed = httpx.URL(base_url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ServerAnswerError(f"{url!a} is no address of a server: write it as http://HOST:PORT or unix:PATH")
    # only connecting is tried again: a request that was sent may have reached the server
    transport = httpx.HTTPTransport(verify=ssl_context(), retries=2, uds=socket)
    limit = httpx.Timeout(timeout, connect=CONNECT_TIMEOUT_SEC)
    return httpx.Client(base_url=base_url, timeout=limit, transport=transport)


def socket_path(url: str) -> str | None:
    """The path in unix:PATH, unix://PATH, or http+unix://PATH (there / is written %2F); None if it is another URL."""
    scheme, colon, rest = url.partition(":")
    if scheme == "unix" and colon:
        return rest.removeprefix("//") or None
    if scheme == "http+unix" and rest.startswith("//"):
        return unquote(rest.removeprefix("//")) or None
    return None
