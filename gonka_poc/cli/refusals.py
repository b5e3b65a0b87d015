"""Error texts for answers that are no success: what happened, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import httpx

from gonka_poc.data import PREFIX
from gonka_poc.vllm_compat import MIDDLEWARE

MAX_TEXT = 500
HTML = "a page of HTML"
NO_POC_SERVER = "is it a vLLM server with gonka_poc?"
NO_ANSWER_BEHIND_PROXY = "a proxy in front of the server got no answer from it; is the server running?"
ADVICE: Mapping[int, str] = MappingProxyType(
    {
        400: "change that value and try again",
        403: "something in front of the server forbids it; ask whoever runs that",
        409: "`gonka-poc status` shows what runs there, `gonka-poc stop` ends it; --model names the served model",
        413: "use a smaller --batch-size; a proxy in front of the server may have a limit of its own",
        422: "correct these values; a field that is unknown there means another release of gonka_poc",
        429: "try again later",
        501: "run `gonka-poc doctor` on the server's host",
        502: NO_ANSWER_BEHIND_PROXY,
        503: "try again when GET /health answers 200; if it does not, see the server's log",
        504: NO_ANSWER_BEHIND_PROXY,
        507: "`gonka-poc outbox --server URL list` on the server's host shows what fills the outbox",
    }
)
FROM_PROXIES = (403, 413, 429, 502, 503, 504)


def refusal_text(response: httpx.Response, url: str, path: str, sent_secret: bool) -> str:
    """One line about a failed request for `path` of `url`; `sent_secret`: it carried a token or key."""
    status, reason = response.status_code, reason_of(response)
    is_ours = path.startswith(PREFIX)
    if status == 404 and is_ours:
        detail = _object(response).get("detail")
        # a route of gonka_poc answered, not the router of a server that has no such route
        if path.startswith(f"{PREFIX}/generate/") and isinstance(detail, str) and detail != "Not Found":
            return f"{url} has no such request: {reason}; results expire, so send its nonces again"
        return f"{url} has no {PREFIX}: start it with --middleware {MIDDLEWARE}, or correct --url"
    if status == 401:
        what = "its POC_API_TOKEN with --token" if is_ours else "vLLM's API key with --api-key"
        return f"{url}{path} answered 401: {'the one given is wrong; ' if sent_secret else ''}give {what}"
    if response.is_redirect:
        advice = f"it redirects to {_one_line(response.headers.get('location', ''))}; give the final address as --url"
    elif reason == HTML and status not in FROM_PROXIES:
        advice = NO_POC_SERVER
    else:
        advice = ADVICE.get(status, "see the server's log" if status >= 500 else NO_POC_SERVER)
    if status == 429 and response.headers.get("retry-after", "").isdecimal():
        advice = f"try again in {response.headers['retry-after']} s"
    return f"{url}{path} answered {status}: {reason}; {advice}"


def reason_of(response: httpx.Response) -> str:
    """The reason in the answer: our sentence, FastAPI's list, vLLM's message, or the text itself."""
    body = _object(response)
    detail, error = body.get("detail"), body.get("error")
    if isinstance(detail, list) and detail:
        return _one_line("; ".join(map(_invalid_value, detail)))
    message = detail or (error.get("message") if isinstance(error, dict) else None) or body.get("message")
    if isinstance(message, str):
        return _one_line(message)
    if "<html" in response.text[:MAX_TEXT].lower():
        return HTML
    return _one_line(response.text) or "no text"


def _invalid_value(item: Any) -> str:
    loc, msg = (item.get("loc"), item.get("msg")) if isinstance(item, dict) else (None, None)
    return f"{'.'.join(map(str, loc[1:]))}: {msg}" if isinstance(loc, list) and msg else str(item)


def _object(response: httpx.Response) -> dict[str, Any]:
    """The JSON object in the answer; empty if there is none."""
    try:
        body = response.json()
    except ValueError:
        body = None
    return body if isinstance(body, dict) else {}


def _one_line(text: str) -> str:
    """`text` without line breaks and control characters, shortened."""
    return "".join(filter(str.isprintable, " ".join(text.split())))[:MAX_TEXT]
