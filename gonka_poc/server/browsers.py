"""BrowserGate: an ASGI application that refuses what a foreign web page lets an operator's browser send."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gonka_poc.errors import ForeignPageError
from gonka_poc.server.guards import error_response

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # they change nothing here, and a foreign page cannot read the answer


class BrowserGate:
    """Answers 403 to a request that changes something and that a browser sends for another site's page.

    A page may send a POST without a body, or with one of text/plain, to any server; a token stops that, and a server
    without one would obey it. Browsers say where such a request comes from, in `Origin` and mostly in `Sec-Fetch-Site`,
    which a page cannot change. Clients that are no browsers (Go, Python, curl) send neither, and pass.

    A page whose own name was made to lead to this server counts as the same site to a browser. So where there is no
    token (`any_name` false), a browser is only believed if it knows the server by an address or as localhost.
    """

    def __init__(self, app: ASGIApp, any_name: bool) -> None:
        self._app = app
        self._any_name = any_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = "" if scope["method"] in SAFE_METHODS else self._problem(Headers(scope=scope))
        if problem:
            advice = "proof of compute is steered by programs; try it with curl or gonka-poc"
            await error_response(ForeignPageError(f"{problem}; {advice}"))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _problem(self, headers: Headers) -> str:
        """The reason to refuse a request that changes something; empty if there is none."""
        sites, origins = headers.getlist("sec-fetch-site"), headers.getlist("origin")
        if not sites and not origins:
            return ""
        host = headers.get("host", "")
        foreign = [site for site in sites if site not in ("same-origin", "none")]
        if not sites:
            foreign = [origin for origin in origins if origin.partition("://")[2].lower() != host.lower()]
        if foreign:
            return "a web page of another site sent this"
        if not self._any_name and not _is_address(host):
            return "a web page sent this, to a name that any site could have led here, and there is no POC_API_TOKEN"
        return ""


def _is_address(host: str) -> bool:
    """True for an IP address or localhost, with or without a port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        if name == "localhost" or name.endswith(".localhost"):
            return True
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
