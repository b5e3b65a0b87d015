"""The picture of the status page in README.md: a made-up host at work, on the real page.

python tests/status_picture.py docs/images/status.png
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

from browser import open_page
from http_receiver import Receiver
from live_server import LiveServer
from page_scenes import DASHBOARD, HostView, busy_metrics, round_of

from gonka_poc.answers import RoundStats
from gonka_poc.server.rounds import Round

WIDTH = 1000


def take_picture(file: Path) -> None:
    """Write the picture to `file`."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"POC_OUTBOX_PATH": f"{folder}/outbox", "POC_COMPILE": "always", "POC_CALLBACK_INTERVAL_SEC": "0.5"}
        with patch.dict(os.environ, settings), patch("socket.gethostname", lambda: "host-1"), Receiver(200) as receiver:
            stats = patch.object(Round, "stats", RoundStats(total_processed=262_144, nonces_per_second=139.0))
            with stats, LiveServer(metrics=busy_metrics(), view=HostView()) as server:
                round_of(server, receiver.url)
                with open_page(Path(folder)) as page:
                    page.display(width=WIDTH, height=900)
                    page.open(server.url + DASHBOARD)
                    page.until(
                        "(byId('receivers').textContent.match(/^\\S+ ([\\d,]+) delivered/) || ['', '0'])[1] !== '0'"
                    )
                    page.screenshot(file)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    take_picture(target)
