"""The HTML pages of this package, with the headers that keep them to themselves."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi.responses import HTMLResponse


def page(name: str, scripts: str = "", styles: str = "") -> HTMLResponse:
    """The page in the file `name`. Its own script and style are allowed, and what `scripts` and `styles` add, in the
    words of a content security policy; it may ask only the server that it came from."""
    html = files("gonka_poc.server").joinpath(name).read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_hash_of('script', html)}{scripts}; "
        f"style-src {styles or _hash_of('style', html)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(html, headers=headers)


def _hash_of(tag: str, html: str) -> str:
    """The source expression that allows the one inline element `tag` of the page, and no other."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
