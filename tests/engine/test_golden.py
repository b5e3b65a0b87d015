"""Golden vectors over HTTP: three models, float32 and float16, default and stronger RNG, in any batch, beside chat."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from tests.engine.support import (
    GOLDEN_LIMIT,
    Client,
    ServerConfig,
    Servers,
    artifact_file,
    golden_cases,
    golden_distance,
    max_distance,
)

MODELS = ("qwen3", "llama", "qwen3_moe")
DTYPES = ("float32", "float16")
# on every release of vLLM; other tests there have qwen3
IN_MATRIX = {("llama", "float32"), ("llama", "float16"), ("qwen3_moe", "float32")}
CONFIGS = [
    pytest.param(
        ServerConfig(model, dtype),
        id=f"{model}-{dtype}",
        marks=[pytest.mark.matrix] if (model, dtype) in IN_MATRIX else [],
    )
    for model in MODELS
    for dtype in DTYPES
]


@pytest.fixture(scope="module", params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ServerConfig:
    return request.param


@pytest.fixture(scope="module")
def server(config: ServerConfig, servers: Servers) -> Client:
    return servers.get(config)


def test_golden_vectors_between_two_equal_chats(server: Client, config: ServerConfig) -> None:
    before = server.chat()
    limit = GOLDEN_LIMIT[config.dtype]
    for case in golden_cases(config.model):
        assert golden_distance(server, case) < limit
        # batch_size 3 cuts the five nonces into forwards of 3 and 2
        assert golden_distance(server, case, batch_size=3) < limit
    assert server.chat() == before


def test_a_vector_does_not_depend_on_its_batch(
    server: Client, config: ServerConfig, record_property: Callable[[str, object], None]
) -> None:
    case = golden_cases(config.model)[0]
    nonces = list(range(32))
    together = server.vectors(case, nonces)
    # for tests/matrix, which compares them with those of other releases
    record_property(f"vectors {config.model} {config.dtype}", artifact_file(case, nonces, together).model_dump_json())
    shuffled = random.Random(0).sample(nonces, k=len(nonces))
    reordered = server.vectors(case, shuffled)[np.argsort(shuffled)]
    alone = server.vectors(case, [7])
    # the contract's 1e-5 is for float32; in float16 each vector is within 5e-3 of the golden one
    limit = 1e-5 if config.dtype == "float32" else 2 * GOLDEN_LIMIT["float16"]
    assert max_distance(reordered, together) < limit
    assert max_distance(alone, together[7:8]) < limit
    # and vectors do differ by nonce: independent unit vectors of 12 numbers are about sqrt(2) apart
    assert max_distance(together[:1], together[1:2]) > 0.1
