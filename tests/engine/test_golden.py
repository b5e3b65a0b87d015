"""Golden vectors and distances: three models, float32 and float16, each RNG and randomization, in any batch.

Engines in a process of their own compute them; one server answers the same over HTTP.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from tests.engine.support import (
    DISTANCE_LIMIT,
    GOLDEN_DISTANCES,
    GOLDEN_LIMIT,
    PLAIN,
    Client,
    artifact_file,
    decoded,
    golden_cases,
    golden_distance,
    max_distance,
    offline,
    offline_job,
    spec_of,
)

MODELS = ("qwen3", "llama", "qwen3_moe")
DTYPES = ("float32", "float16")
# on every release of vLLM; other tests there have qwen3
IN_MATRIX = {("llama", "float32"), ("llama", "float16"), ("qwen3_moe", "float32")}
ENGINES = [(model, dtype) for model in MODELS for dtype in DTYPES]
TOGETHER = list(range(32))
SHUFFLED = random.Random(0).sample(TOGETHER, k=len(TOGETHER))
ALONE = [7]
CHEATS = ("fp8", "int4", "layer")


def parts(nonces: Sequence[int], size: int) -> list[list[int]]:
    return [list(nonces[start : start + size]) for start in range(0, len(nonces), size)]


def batches(model: str) -> list[tuple[Mapping[str, Any], list[int]]]:
    """The golden cases of a model and the batches of nonces that each is computed in."""
    found: list[tuple[Mapping[str, Any], list[int]]] = []
    if model == "qwen3":  # first, so that what they leave behind would be seen in the others
        found += [({**golden_cases(model)[0], "cheat": cheat}, TOGETHER) for cheat in CHEATS]
    for case in golden_cases(model):
        found += [(case, nonces) for size in (5, 3) for nonces in parts(case["nonces"], size)]
    found += [(golden_cases(model)[0], nonces) for nonces in (TOGETHER, SHUFFLED, ALONE)]
    for case in GOLDEN_DISTANCES:
        if case["model"] == model:
            found += [(case, nonces) for size in (5, 2) for nonces in parts(case["nonces"], size)]
    return found


class Computed:
    """What the engine of one model and dtype answered."""

    def __init__(self, model: str, dtype: str, answer: Mapping[str, Any]) -> None:
        assert "error" not in answer, answer["error"]
        self.model, self.dtype = model, dtype
        self.tokens_before, self.tokens_after = answer["tokens_before"], answer["tokens_after"]
        self._batches = list(zip(batches(model), answer["values"], strict=True))

    def rows(self, case: Mapping[str, Any], nonces: Sequence[int], size: int) -> np.ndarray:
        """The values of `nonces`, computed `size` at a time."""
        wanted = parts(nonces, size)
        found = [next(rows for what, rows in self._batches if what == (case, batch)) for batch in wanted]
        return np.concatenate([np.array(rows) for rows in found])


@pytest.fixture(scope="module")
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, Any]]:
    """What the engine answered of each model and dtype that a test of this run asks for."""
    ids = {
        item.callspec.id for item in request.session.items if hasattr(item, "callspec") and item.path == request.path
    }
    wanted = [(model, dtype) for model, dtype in ENGINES if f"{model}-{dtype}" in ids]
    jobs = []
    for model, dtype in wanted:
        calls = [{"spec": spec_of(case), "nonces": nonces} for case, nonces in batches(model)]
        jobs.append(offline_job(model, dtype, calls))
    return dict(zip(wanted, offline(tmp_path_factory.mktemp("golden"), jobs, may_fail=True), strict=True))


@pytest.fixture(
    params=[
        pytest.param(engine, id="-".join(engine), marks=[pytest.mark.matrix] if engine in IN_MATRIX else [])
        for engine in ENGINES
    ]
)
def computed(request: pytest.FixtureRequest, engines: dict[tuple[str, str], dict[str, Any]]) -> Computed:
    return Computed(*request.param, engines[request.param])


def test_golden_vectors_between_two_equal_chats(computed: Computed) -> None:
    for case in golden_cases(computed.model):
        golden = decoded(case["vectors_b64"], case["k_dim"])
        for size in (5, 3):
            found = computed.rows(case, case["nonces"], size)
            assert max_distance(found, golden) < GOLDEN_LIMIT[computed.dtype]
    assert computed.tokens_after == computed.tokens_before


def test_a_vector_does_not_depend_on_its_batch(
    computed: Computed, record_property: Callable[[str, object], None]
) -> None:
    case = golden_cases(computed.model)[0]
    together, shuffled = (computed.rows(case, nonces, len(nonces)) for nonces in (TOGETHER, SHUFFLED))
    alone = computed.rows(case, ALONE, 1)
    # for tests/matrix, which compares them with those of other releases
    name = f"vectors {computed.model} {computed.dtype}"
    record_property(name, artifact_file(case, TOGETHER, together).model_dump_json())
    assert_same(together, shuffled[np.argsort(SHUFFLED)], alone, computed.dtype)


def assert_same(together: np.ndarray, reordered: np.ndarray, alone: np.ndarray, dtype: str) -> None:
    # the contract's 1e-5 is for float32; in float16 each vector is within 5e-3 of the golden one
    limit = 1e-5 if dtype == "float32" else 2 * GOLDEN_LIMIT["float16"]
    assert max_distance(reordered, together) < limit
    assert max_distance(alone, together[7:8]) < limit
    # and vectors do differ by nonce: independent unit vectors of 12 numbers are about sqrt(2) apart
    assert max_distance(together[:1], together[1:2]) > 0.1


def test_cheats_are_far_from_honest_vectors(computed: Computed) -> None:
    if computed.model != "qwen3":
        return
    case = golden_cases("qwen3")[0]
    honest = computed.rows(case, TOGETHER, len(TOGETHER))
    nearest = 0.0
    for cheat in CHEATS:
        distances = np.linalg.norm(computed.rows({**case, "cheat": cheat}, TOGETHER, len(TOGETHER)) - honest, axis=-1)
        print(f"{computed.dtype} {cheat}: {distances.min():.1e} to {distances.max():.1e}")
        assert np.median(distances) > max(nearest, 4 * GOLDEN_LIMIT["float16"])
        nearest = float(np.median(distances))


def test_golden_distances(computed: Computed) -> None:
    cases = [case for case in GOLDEN_DISTANCES if case["model"] == computed.model]
    assert "sign_flips" in {case["randomization"] for case in cases}
    for case in cases:
        for size in (5, 2):
            error = np.abs(computed.rows(case, case["nonces"], size) - case["distances"]).max()
            print(f"{computed.model} {computed.dtype} {case['randomization']} by {size}: off by {error:.1e}")
            assert error < DISTANCE_LIMIT[computed.dtype]


@pytest.mark.server(PLAIN)
def test_the_same_over_http(server: Client) -> None:
    before = server.chat()
    for case in golden_cases("qwen3"):
        assert golden_distance(server, case) < GOLDEN_LIMIT["float32"]
        # batch_size 3 cuts the five nonces into forwards of 3 and 2
        assert golden_distance(server, case, batch_size=3) < GOLDEN_LIMIT["float32"]
    case = golden_cases("qwen3")[0]
    together, shuffled = server.vectors(case, TOGETHER), server.vectors(case, SHUFFLED)
    assert_same(together, shuffled[np.argsort(SHUFFLED)], server.vectors(case, ALONE), "float32")
    assert server.chat() == before
