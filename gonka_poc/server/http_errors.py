"""How an error is answered over HTTP."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import JSONResponse

from gonka_poc.errors import PoCError


def error_response(error: PoCError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The status of `error` and its text as `detail`."""
    return JSONResponse({"detail": str(error)}, status_code=error.http_status, headers=headers)
