"""Options of vLLM that hosts of the network use, on engines in one process: the vectors stay the golden ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine.support import (
    COMPOSITIONS,
    GOLDEN_LIMIT,
    assert_any_composition,
    decoded,
    golden_cases,
    max_distance,
    offline,
    offline_job,
    spec_of,
)

# four engines for options that the code of proof does not look at
pytestmark = pytest.mark.nightly

CASE = golden_cases("qwen3")[0]
OPTIONS: dict[str, dict[str, Any]] = {
    # what the published node configurations give and a CPU takes; parsers are of the HTTP server
    "node configuration": {
        "scheduling_policy": "priority",
        "max_num_seqs": 2048,
        "logprobs_mode": "processed_logprobs",
        "compilation_config": {"cudagraph_mode": "NONE"},
        "additional_config": {"name": "value"},
        "enable_prefix_caching": True,
    },
    "pooling model": {"runner": "pooling", "convert": "embed"},
    # last: what it imports keeps vLLM from starting another engine in this process
    "ngram speculation": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    },
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The answers of tests/engine/offline.py with each of OPTIONS, and with none."""
    calls = [{"spec": spec_of(CASE), "nonces": nonces} for nonces in (CASE["nonces"], *COMPOSITIONS)]
    jobs = [offline_job("qwen3", "float32", calls, **options) for options in ({}, *OPTIONS.values())]
    folder: Path = tmp_path_factory.mktemp("options")
    return dict(zip(("plain", *OPTIONS), offline(folder, jobs), strict=True))


@pytest.mark.parametrize("name", ["plain", *OPTIONS])
def test_vectors_are_golden_in_any_batch(name: str, answers: dict[str, dict[str, Any]]) -> None:
    golden, *compositions = answers[name]["values"]
    assert max_distance(np.array(golden), decoded(CASE["vectors_b64"], CASE["k_dim"])) < GOLDEN_LIMIT["float32"]
    assert_any_composition(compositions)


@pytest.mark.parametrize("name", ["plain", *OPTIONS])
def test_chat_is_the_same_before_and_after(name: str, answers: dict[str, dict[str, Any]]) -> None:
    answer = answers[name]
    assert answer["tokens_before"]
    assert answer["tokens_after"] == answer["tokens_before"]
    if name != "pooling model":
        assert answer["tokens_before"] == answers["plain"]["tokens_before"]
