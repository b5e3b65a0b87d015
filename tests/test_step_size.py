"""The size of micro-batches over a clock that the test moves."""

from __future__ import annotations

from fakes import Clock

from gonka_poc.manager import CHAT_MEMORY_SEC, MEASUREMENTS, BatchSizer


def test_full_size_without_chat():
    size = BatchSizer(0.2)
    assert size.limit(64, 32) == 32
    size.record_batch(64, 32, 0.1)
    assert size.limit(64, 32) == 32


def test_two_slow_batches_without_chat_are_one_of_full_size():
    size = BatchSizer(0.2)
    size.record_batch(64, 32, 0.11)
    assert [size.limit(64, full) for full in (32, 33, 30, 29, 1)] == [16, 17, 15, 29, 1]


def test_within_the_budget_while_chat_is_around():
    size, clock = BatchSizer(0.2, clock := Clock()), clock
    size.record_batch(64, 32, 0.32)  # 10 ms a nonce
    size.record_chat()
    assert size.limit(64, 32) == 10  # half of the budget
    assert size.limit(64, 4) == 4
    clock.now += CHAT_MEMORY_SEC - 0.01
    assert size.limit(64, 32) == 10
    clock.now += 0.02
    assert size.limit(64, 32) == 16


def test_a_nonce_that_takes_longer_than_the_budget_is_still_computed():
    size = BatchSizer(0.2)
    size.record_batch(64, 1, 5.0)
    size.record_chat()
    assert size.limit(64, 32) == 1


def test_an_unknown_speed_is_measured_with_one_nonce():
    size = BatchSizer(0.2)
    size.record_batch(64, 32, 0.64)
    size.record_chat()
    assert size.limit(128, 32) == 1
    size.record_batch(128, 1, 0.04)
    assert size.limit(128, 32) == 2


def test_the_slowest_of_the_last_batches_counts():
    size = BatchSizer(0.2)
    size.record_chat()
    size.record_batch(64, 4, 0.16)
    for _ in range(MEASUREMENTS - 1):
        size.record_batch(64, 4, 0.04)
    assert size.limit(64, 32) == 2
    size.record_batch(64, 4, 0.04)
    assert size.limit(64, 32) == 10


def test_what_did_not_fit_is_halved_for_its_length():
    size = BatchSizer(0.2)
    assert size.record_out_of_memory(64, 32) == 16
    assert size.record_out_of_memory(64, 16) == 8
    assert size.limit(64, 32) == 8
    assert size.limit(32, 32) == 32
    assert size.record_out_of_memory(64, 1) == 1
