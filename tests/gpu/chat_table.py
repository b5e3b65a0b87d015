"""Milliseconds to a chat's first token, without proof and beside a round, on one GPU.

    python -m tests.gpu.chat_table --out DIR

One compiled server of the Qwen3-8B shape with dummy weights, 32 x 1024 a batch, callbacks taken by a receiver.
Three loads, each without proof, beside a round, and without it again: chats at random times, as many within one
second after a quiet time, and clients that never pause. Writes DIR/chat.md and DIR/chat.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gonka_poc.cli.receive import Receiver
from gonka_poc.cli.server_process import ServerProcess
from tests.chat_load import Chat, ChatLoad, percentile_ms, unlike
from tests.gpu.core_table import table
from tests.gpu.speed_table import SERVER_ARGS, beside_round, make_shape

SHAPE = "qwen3-8b"
CHATS, MAX_TOKENS = 200, 64
QUIET_SEC = 7.0  # longer than chat is remembered


def load_rows(name: str, url: str, callback_url: str, run: Callable[[], list[Chat]]) -> list[dict[str, Any]]:
    """One load without proof, beside a round, without it again."""
    off = run()
    beside, nonces = beside_round(url, callback_url, run, quiet_sec=QUIET_SEC)
    return [
        {
            "load": name,
            "proof": proof,
            "chats": len(chats),
            **{f"p{percent} ms": round(percentile_ms(chats, percent)) for percent in (50, 95, 100)},
            "answers unlike the first": unlike(chats, off),
            "nonces/s": rate,
        }
        for proof, chats, rate in (("off", off, None), ("on", beside, nonces), ("off again", run(), None))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/gonka-poc-chat"))
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="of chats at random times; a third of it without pauses"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    env = {"POC_OUTBOX_PATH": str(options.work / "outbox")}
    model = make_shape(SHAPE, options.work / SHAPE)
    log = options.work / "server.log"
    rows: list[dict[str, Any]] = []
    with (
        Receiver() as receiver,
        ServerProcess(model, log_file=log, args=SERVER_ARGS, env=env, startup_timeout=400) as server,
    ):
        load = ChatLoad(server.url, "m", MAX_TOKENS)
        loads = {
            f"{CHATS} within {options.seconds:g} s": lambda: load.at_random_times(CHATS, options.seconds),
            f"{CHATS} within 1 s": lambda: load.at_random_times(CHATS, 1),
            f"{CHATS} clients without pauses": lambda: load.without_pauses(CHATS, options.seconds / 3),
        }
        load.at_random_times(CHATS, 1)
        for name, run in loads.items():
            rows += load_rows(name, server.url, receiver.url, run)
            print(table(rows[-3:]), flush=True)
            (options.out / "chat.json").write_text(json.dumps(rows, indent=1))
    (options.out / "chat.md").write_text(table(rows))


if __name__ == "__main__":
    main()
