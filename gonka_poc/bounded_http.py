"""An HTTP transport that reads little of an answer, and little at a time, whatever the other side sends."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx

# of one answer: its head, any informational answers before it, and the beginning of its body
MAX_ANSWER_BYTES = 16 * 1024
# between two turns of the event loop: the shortest informational answer has 25, and takes some 30 microseconds
READ_BYTES = 512


class BoundedStream(httpcore.AsyncNetworkStream):
    """A network stream that gives at most MAX_ANSWER_BYTES, and lets others run after each READ_BYTES.

    A parser that is given answers of `100 Continue` without end would else never return to the event loop. Raises
    httpcore.RemoteProtocolError where more is asked for.
    """

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._num_read = 0

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """The next bytes, fewer than were asked for."""
        if self._num_read >= MAX_ANSWER_BYTES:
            raise httpcore.RemoteProtocolError(f"no answer within its first {MAX_ANSWER_BYTES} bytes")
        data = await self._stream.read(min(max_bytes, READ_BYTES), timeout)
        self._num_read += len(data)
        await asyncio.sleep(0)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send bytes."""
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        """Close the connection."""
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        """The stream inside of TLS, bounded too."""
        return BoundedStream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        """A fact of the stream below, such as its socket."""
        return self._stream.get_extra_info(info)


class BoundedBackend(httpcore.AnyIOBackend):
    """Connections with bounded streams."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A bounded stream to `host`."""
        return BoundedStream(await super().connect_tcp(host, port, timeout, local_address, socket_options))


class BoundedTransport(httpx.AsyncHTTPTransport):
    """An HTTP/1.1 transport over bounded streams; keeps no connection, so that each stream has one answer."""

    def __init__(self, ssl_context: ssl.SSLContext) -> None:
        super().__init__(verify=ssl_context, trust_env=False)
        # httpx hands no network backend on to its pool
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context, max_connections=None, max_keepalive_connections=0, network_backend=BoundedBackend()
        )
