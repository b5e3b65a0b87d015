"""validation: honest hosts are accepted, others are not, and the numbers are those of the binomial test."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy.stats import binomtest

from gonka_poc.data import StatTest, encode_vector
from gonka_poc.validation import binomial_p_value, is_mismatch, p_value_text, validate_artifacts

K_DIM = 12


def unit_vectors(count: int, seed: int = 0) -> dict[int, np.ndarray]:
    rows = np.random.default_rng(seed).normal(size=(count, K_DIM))
    return dict(enumerate((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)))


def encoded(vectors: dict[int, np.ndarray]) -> dict[int, str]:
    return {nonce: encode_vector(vector) for nonce, vector in vectors.items()}


# --- one vector -------------------------------------------------------------------------------------------------

COMPUTED = np.array([0.5, -0.25, 0.75], dtype=np.float16)


@pytest.mark.parametrize(
    "received",
    [
        "",
        "not base64!",
        "\ud800",
        encode_vector(COMPUTED)[:-1],
        encode_vector(COMPUTED[:2]),
        encode_vector(np.append(COMPUTED, 0)),
        encode_vector(COMPUTED * [np.nan, 1, 1]),
        encode_vector(COMPUTED * [1, np.inf, 1]),
        encode_vector(COMPUTED * [1, -np.inf, 1]),
        encode_vector(-COMPUTED),
        encode_vector(COMPUTED[::-1]),
        encode_vector(COMPUTED * 1.1),
        encode_vector(COMPUTED.astype(">f2")[::-1]),
        encode_vector(np.full(3, 65504)),
    ],
)
def test_each_kind_of_mismatch(received):
    assert not is_mismatch(encode_vector(COMPUTED), COMPUTED, 0.02)
    assert is_mismatch(received, COMPUTED, 0.02)


@pytest.mark.parametrize(("threshold", "mismatch"), [(0.25, False), (np.nextafter(0.25, 0), True), (0.2501, False)])
def test_a_distance_at_the_threshold_is_no_mismatch(threshold, mismatch):
    received = encode_vector(COMPUTED + np.array([0, 0.25, 0], dtype=np.float16))  # exactly 0.25 away
    assert is_mismatch(received, COMPUTED, threshold) is mismatch


def test_a_threshold_of_zero_accepts_equal_vectors_only():
    assert not is_mismatch(encode_vector(COMPUTED), COMPUTED, 0)
    assert is_mismatch(encode_vector(np.nextafter(COMPUTED, np.float16(9))), COMPUTED, 0)


def test_distances_are_not_rounded_to_float16():
    """A sum of squares over 65504 would be infinite, one under 6e-8 zero."""
    far, near = np.full(1, 300, dtype=np.float16), np.full(1, 2e-4, dtype=np.float16)
    zero = np.zeros(1, dtype=np.float16)
    assert not is_mismatch(encode_vector(far), zero, 301)
    assert is_mismatch(encode_vector(near), zero, 1e-4)


# --- the test of a host -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_mismatch", "n_total", "p_mismatch"),
    [(0, 1, 0.001), (1, 1, 0.001), (1, 100, 0.001), (3, 100, 0.001), (7, 20, 0.3), (20, 20, 0.5), (2, 1000, 0.01)],
)
def test_p_value_is_the_upper_tail(n_mismatch, n_total, p_mismatch):
    tail = sum(
        math.comb(n_total, i) * p_mismatch**i * (1 - p_mismatch) ** (n_total - i)
        for i in range(n_mismatch, n_total + 1)
    )
    assert binomial_p_value(n_mismatch, n_total, p_mismatch) == pytest.approx(tail, rel=1e-9)


def test_p_values_are_those_of_the_binomial_test():
    """Those of scipy.stats, to the last bit but two, over sizes and rates of every kind."""
    draw = random.Random(0)
    for _ in range(1000):
        n_total = draw.randint(1, 5000)
        n_mismatch = draw.randint(0, min(n_total, draw.choice([3, 50, n_total])))
        p_mismatch = draw.choice([0.0, 5e-4, 1e-3, 0.07, draw.random(), 1.0])
        expected = binomtest(n_mismatch, n_total, p_mismatch, alternative="greater").pvalue
        assert binomial_p_value(n_mismatch, n_total, p_mismatch) == pytest.approx(expected, rel=1e-15, abs=0)


def test_a_p_value_is_never_shown_as_0():
    assert p_value_text(0.0) == p_value_text(1e-301) == "< 1e-300"
    assert (p_value_text(1e-300), p_value_text(0.00117, 3), p_value_text(1.0)) == ("1e-300", "0.00117", "1")


def test_p_value_of_nothing_compared():
    assert binomial_p_value(0, 0, 0.001) == 1.0


@pytest.mark.parametrize(
    ("p_mismatch", "n_mismatch", "p_value"), [(0.0, 0, 1.0), (0.0, 1, 0.0), (1.0, 5, 1.0), (1.0, 0, 1.0)]
)
def test_p_value_where_no_or_every_mismatch_is_expected(p_mismatch, n_mismatch, p_value):
    assert binomial_p_value(n_mismatch, 5, p_mismatch) == p_value


def test_an_honest_host_passes():
    computed = unit_vectors(100)
    noise = np.random.default_rng(1).normal(size=(100, K_DIM)) * 0.001
    received = encoded({n: vector + noise[n] for n, vector in computed.items()})
    assert received != encoded(computed)
    verdict = validate_artifacts(received, computed, [], StatTest())
    assert (verdict.n_total, verdict.n_mismatch, verdict.mismatch_nonces) == (100, 0, [])
    assert (verdict.p_value, verdict.fraud_detected) == (1.0, False)


def test_a_host_that_made_its_vectors_up_is_caught():
    verdict = validate_artifacts(encoded(unit_vectors(100, seed=1)), unit_vectors(100), [], StatTest())
    assert (verdict.n_total, verdict.n_mismatch, verdict.fraud_detected) == (100, 100, True)
    assert verdict.p_value < 1e-200


@pytest.mark.parametrize(("tampered", "fraud"), [([], False), ([7], False), ([7, 3], True), ([99, 0, 50], True)])
def test_how_many_of_a_hundred_may_differ(tampered, fraud):
    """An honest host has one of a hundred with probability 0.095, and two with 0.0046."""
    computed = unit_vectors(100)
    received = encoded(computed) | {n: encode_vector(-computed[n]) for n in tampered}
    verdict = validate_artifacts(received, computed, [], StatTest())
    assert (verdict.mismatch_nonces, verdict.n_mismatch) == (sorted(tampered), len(tampered))
    assert verdict.fraud_detected is fraud


@pytest.mark.parametrize(("fraud_threshold", "fraud"), [(0.25, False), (0.2501, True), (0, False)])
def test_a_p_value_at_the_threshold_is_no_fraud(fraud_threshold, fraud):
    computed = {0: COMPUTED}
    stat_test = StatTest(p_mismatch=0.25, fraud_threshold=fraud_threshold)
    verdict = validate_artifacts({0: "bad"}, computed, [], stat_test)
    assert verdict.p_value == 0.25
    assert verdict.fraud_detected is fraud


def test_thresholds_are_those_of_the_request():
    computed = unit_vectors(10)
    received = encoded({n: vector * 1.05 for n, vector in computed.items()})
    assert validate_artifacts(received, computed, [], StatTest()).n_mismatch == 10
    assert validate_artifacts(received, computed, [], StatTest(dist_threshold=0.1)).n_mismatch == 0


def test_what_was_not_computed_leaves_the_total():
    computed = unit_vectors(3)
    received = encoded(computed) | {8: "bad", 9: "bad"}
    verdict = validate_artifacts(received, computed, [8, 9], StatTest())
    assert (verdict.n_total, verdict.n_mismatch, verdict.not_computed_nonces) == (3, 0, [8, 9])
    assert not verdict.fraud_detected


@pytest.mark.parametrize("fraud_threshold", [0.01, 1])
def test_nothing_compared_is_no_fraud(fraud_threshold):
    verdict = validate_artifacts({8: "bad"}, {}, [8], StatTest(fraud_threshold=fraud_threshold))
    assert (verdict.n_total, verdict.p_value, verdict.fraud_detected) == (0, 1.0, False)
