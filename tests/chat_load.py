"""Many streamed chats at a server: what each answered, and how long it waited for its first token."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx
import numpy as np


@dataclass(frozen=True)
class Chat:
    """One streamed chat: its number, its token ids, and the seconds until the first of them."""

    number: int
    tokens: tuple[int, ...]
    first_token_sec: float


@dataclass(frozen=True)
class ChatLoad:
    """Greedy chats of `max_tokens` tokens with `model` of the server at `url`."""

    url: str
    model: str
    max_tokens: int

    def at_random_times(self, chats: int, seconds: float) -> list[Chat]:
        """`chats` chats that begin at random times within `seconds`, the same times at every call."""
        rng, now = random.Random(3), time.monotonic()
        starts = [now + rng.uniform(0, seconds) for _ in range(chats)]

        async def one(client: httpx.AsyncClient, number: int) -> list[Chat]:
            await asyncio.sleep(max(0.0, starts[number] - time.monotonic()))
            return [await self._chat(client, number)]

        return asyncio.run(self._run(one, chats))

    def without_pauses(self, clients: int, seconds: float) -> list[Chat]:
        """`clients` clients, each of which begins its next chat when the last has ended, for `seconds`."""
        end = time.monotonic() + seconds

        async def one(client: httpx.AsyncClient, number: int) -> list[Chat]:
            chats = []
            while time.monotonic() < end:
                chats.append(await self._chat(client, number))
            return chats

        return asyncio.run(self._run(one, clients))

    async def _run(self, one: Callable[[httpx.AsyncClient, int], Awaitable[list[Chat]]], count: int) -> list[Chat]:
        # connections that idle are closed here before the server closes them, which would fail the next chat
        limits = httpx.Limits(max_connections=None, keepalive_expiry=2)
        async with httpx.AsyncClient(base_url=self.url, timeout=300, limits=limits) as client:
            found = await asyncio.gather(*(one(client, number) for number in range(count)))
        return [chat for chats in found for chat in chats]

    async def _chat(self, client: httpx.AsyncClient, number: int) -> Chat:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": f"chat number {number}"}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        started, first = time.monotonic(), None
        tokens: list[int] = []
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    tokens += json.loads(line[6:])["choices"][0].get("token_ids") or []
                    if tokens and first is None:
                        first = time.monotonic() - started
        if first is None or len(tokens) != self.max_tokens:
            raise RuntimeError(f"chat {number} ended with {len(tokens)} of {self.max_tokens} tokens")
        return Chat(number, tuple(tokens), first)


def unlike(chats: list[Chat], others: list[Chat]) -> int:
    """How many of `chats` answered otherwise than the chat of the same number in `others`."""
    tokens = {chat.number: chat.tokens for chat in others}
    return sum(1 for chat in chats if tokens[chat.number] != chat.tokens)


def percentile_ms(chats: list[Chat], percent: float) -> float:
    """Milliseconds to the first token that `percent` of the chats did not exceed."""
    return float(np.percentile([chat.first_token_sec for chat in chats], percent) * 1000)
