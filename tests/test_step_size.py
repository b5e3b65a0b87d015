"""The size of micro-batches over a clock that the test moves."""

from __future__ import annotations

from fakes import Clock

from gonka_poc.data import DistanceSpec, VectorSpec
from gonka_poc.manager import CHAT_MEMORY_SEC, MAX_KINDS, MEASUREMENTS, SETTLED, BatchSizer


def test_full_size_without_chat():
    size = BatchSizer(0.2)
    assert size.limit((64, 12), 32, 32) == 32
    size.record_batch((64, 12), 32, 0.1)
    assert size.limit((64, 12), 32, 32) == 32


def test_two_slow_batches_without_chat_are_one_of_full_size():
    size = BatchSizer(0.2)
    for _ in range(SETTLED):
        assert size.limit((64, 12), 32, 32) == 32
        size.record_batch((64, 12), 32, 0.11)
    assert [size.limit((64, 12), full, full) for full in (32, 59, 58, 1)] == [16, 29, 58, 1]


def test_a_first_batch_over_the_budget_is_halved_at_once():
    size = BatchSizer(0.2)
    size.record_batch((64, 12), 32, 0.21)
    assert size.limit((64, 12), 32, 32) == 16


def test_a_round_at_full_pace_stays_at_full_size():
    """A first batch without prefetch, small batches beside chat and one slow batch say nothing of that pace."""
    size = BatchSizer(0.2, clock := Clock())
    for seconds in (0.15, 0.19, *[0.07] * 20, 0.5):
        size.record_batch((64, 12), 32, seconds)
        assert size.limit((64, 12), 32, 32) == 32
        assert size.may_prefetch((64, 12), 32, 32, 32)
    size.record_chat()
    for _ in range(MEASUREMENTS):
        size.record_batch((64, 12), 2, 0.05)
    clock.now += CHAT_MEMORY_SEC
    assert size.limit((64, 12), 32, 32) == 32
    assert size.may_prefetch((64, 12), 32, 32, 32)


def test_a_prefetched_batch_counts_from_its_begin():
    """A caller that asks late for batches of 300 ms waits for 10 ms only."""
    size = BatchSizer(0.2)
    for _ in range(SETTLED):
        size.record_batch((64, 12), 32, 0.01, 0.3)
    assert size.limit((64, 12), 32, 32) == 16
    assert not size.may_prefetch((64, 12), 32, 32, 32)


def test_a_full_batch_is_tried_where_smaller_ones_are_as_slow():
    size = BatchSizer(0.2)
    for _ in range(MEASUREMENTS):
        size.record_batch((64, 12), 16, 0.06)  # 120 ms for 32, by these
    assert size.limit((64, 12), 32, 32) == 32


def test_within_the_budget_while_chat_is_around():
    size, clock = BatchSizer(0.2, clock := Clock()), clock
    size.record_batch((64, 12), 32, 0.32)  # 10 ms a nonce
    size.record_chat()
    assert size.limit((64, 12), 32, 32) == 10  # half of the budget
    assert size.limit((64, 12), 4, 4) == 4
    clock.now += CHAT_MEMORY_SEC - 0.01
    assert size.limit((64, 12), 32, 32) == 10
    clock.now += 0.02
    assert size.limit((64, 12), 32, 32) == 16


def test_a_nonce_that_takes_longer_than_the_budget_is_still_computed():
    size = BatchSizer(0.2)
    size.record_batch((64, 12), 1, 5.0)
    size.record_chat()
    assert size.limit((64, 12), 32, 32) == 1


def test_an_unknown_speed_is_measured_with_one_nonce():
    size = BatchSizer(0.2)
    size.record_batch((64, 12), 32, 0.64)
    size.record_chat()
    assert size.limit((128, 12), 32, 32) == 1
    size.record_batch((128, 12), 1, 0.04)
    assert size.limit((128, 12), 32, 32) == 2


def test_the_slowest_of_the_last_batches_counts():
    size = BatchSizer(0.2)
    size.record_chat()
    size.record_batch((64, 12), 4, 0.16)
    for _ in range(MEASUREMENTS - 1):
        size.record_batch((64, 12), 4, 0.04)
    assert size.limit((64, 12), 32, 32) == 2
    size.record_batch((64, 12), 4, 0.04)
    assert size.limit((64, 12), 32, 32) == 10


def test_what_did_not_fit_is_halved_for_its_length():
    size = BatchSizer(0.2)
    assert size.record_out_of_memory((64, 12), 32) == 16
    assert size.record_out_of_memory((64, 12), 16) == 8
    assert size.limit((64, 12), 32, 32) == 8
    assert size.limit((32, 12), 32, 32) == 32
    assert size.record_out_of_memory((64, 12), 1) == 1


def test_vectors_of_another_length_have_a_speed_of_their_own():
    size = BatchSizer(0.2)
    size.record_batch((1, 12), 32, 0.001)
    size.record_chat()
    assert size.limit((1, 2048), 32, 32) == 1
    assert size.limit((1, 12), 32, 32) == 32


def test_specs_with_another_cost_have_a_speed_of_their_own():
    vectors = {VectorSpec("b", "k", seq_len, k_dim).cost_key for seq_len in (1, 64) for k_dim in (12, 2048)}
    kinds = ("sign_flips", "layer_hooks", "permutation")
    distances = {DistanceSpec("b", "k", seq_len, kind).cost_key for seq_len in (1, 64) for kind in kinds}
    assert len(vectors | distances) == 4 + 6


def test_an_unknown_speed_is_measured_with_few_random_values():
    size = BatchSizer(0.2)
    assert size.limit((1, 256), 64, 8) == 8
    size.record_batch((1, 256), 8, 0.008)
    assert size.limit((1, 256), 64, 8) == 64  # a fast device
    slow = BatchSizer(0.2)
    slow.record_batch((1, 256), 8, 0.08)
    assert slow.limit((1, 256), 64, 8) == 4


def test_a_batch_is_prefetched_where_both_are_no_more_than_a_full_one_or_within_the_budget():
    size = BatchSizer(0.2, clock := Clock())
    assert not size.may_prefetch((64, 12), 1, 1, 32)  # the first batch shows how long it takes
    size.record_batch((64, 12), 1, 0.15)
    assert [size.may_prefetch((64, 12), nonces, 1, 32) for nonces in (1, 31, 32)] == [True, True, False]
    assert [size.may_prefetch((64, 12), 1, 2, safe) for safe in (2, 3)] == [False, True]
    for _ in range(MEASUREMENTS):
        size.record_batch((64, 12), 1, 0.002)
    assert [size.may_prefetch((64, 12), nonces, 32, 32) for nonces in (32, 100, 101)] == [True, True, False]
    size.record_chat()
    assert not size.may_prefetch((64, 12), 1, 1, 32)
    clock.now += CHAT_MEMORY_SEC
    assert size.may_prefetch((64, 12), 1, 1, 32)


def test_only_so_many_kinds_of_nonces_are_remembered():
    size = BatchSizer(0.2)
    for seq_len in range(1000):
        size.record_batch((seq_len, 12), 1, 5.0)
        size.record_out_of_memory((seq_len, 12), 4)
    assert len(size._sec_per_nonce) == len(size._sec_of_size) == len(size._max_fitting) == MAX_KINDS
