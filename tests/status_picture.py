"""The picture of the status page in README.md: a made-up host at work, on the real page.

python tests/status_picture.py docs/images/status.png

The file says of which page it is, by the SHA-256 of dashboard.html in a tEXt chunk.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
import sys
import tempfile
import zlib
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest.mock import patch

from browser import open_page
from http_receiver import Receiver
from live_server import LiveServer
from page_scenes import DASHBOARD, HostView, busy_metrics, round_of

from gonka_poc.server.rounds import Round

WIDTH = 1000
ROOT = Path(__file__).parent.parent
PAGE = "dashboard.html"
ROUND_AGE_SEC, ROUND_MEAN = 47 * 60, 131  # of the made-up host
AFTER_HEADER = 33  # where the first chunk of a PNG that is not its header begins


def page_digest() -> str:
    """The SHA-256 of the page as it is now."""
    return hashlib.sha256(files("gonka_poc.server").joinpath(PAGE).read_bytes()).hexdigest()


def stamped(png: bytes) -> bytes:
    """A PNG that says of which page it is."""
    content = b"tEXt" + PAGE.encode() + b"\0" + page_digest().encode()
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    return png[:AFTER_HEADER] + chunk + png[AFTER_HEADER:]


def stamp_of(png: bytes) -> str | None:
    """The digest of the page of which a PNG is; None where it does not say."""
    begin = png[AFTER_HEADER + 4 :]
    key = b"tEXt" + PAGE.encode() + b"\0"
    return begin[len(key) :][:64].decode() if begin.startswith(key) else None


def _start_as_older(self: Round, start: Any = Round.start) -> Any:
    """Round.start of a round that has generated for a while."""
    self.began_at -= ROUND_AGE_SEC
    self._started -= ROUND_AGE_SEC
    self._first -= ROUND_AGE_SEC * ROUND_MEAN
    return start(self)


def take_picture(file: Path) -> None:
    """Write the picture to `file`."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"POC_OUTBOX_PATH": f"{folder}/outbox", "POC_COMPILE": "always", "POC_CALLBACK_INTERVAL_SEC": "0.5"}
        (version,) = re.findall(r'(?m)^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        with (
            patch.dict(os.environ, settings),
            patch("socket.gethostname", lambda: "host-1"),
            patch("gonka_poc.server.dashboard.__version__", version),
            patch.object(Round, "start", _start_as_older),
            Receiver(200) as receiver,
        ):
            view = HostView()
            with LiveServer(metrics=busy_metrics(), view=view) as server:
                round_of(server, receiver.url)
                with open_page(Path(folder)) as page:
                    page.display(width=WIDTH, height=900)
                    page.open(server.url + DASHBOARD)
                    page.until(
                        "(byId('receivers').textContent.match(/^\\S+ ([\\d,]+) delivered/) || ['', '0'])[1] !== '0'"
                    )
                    page.screenshot(file)
    file.write_bytes(stamped(file.read_bytes()))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    take_picture(target)
