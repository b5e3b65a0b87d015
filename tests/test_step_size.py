"""The size of micro-batches over a clock that the test moves."""

from __future__ import annotations

from fakes import Clock

from gonka_poc.step_size import CHAT_MEMORY_SEC, MEASUREMENTS, StepSize


def test_full_size_without_chat():
    size = StepSize(0.2)
    assert size.limit(64, 32) == 32
    size.measured(64, 32, 0.1)
    assert size.limit(64, 32) == 32


def test_two_slow_batches_without_chat_are_one_of_full_size():
    size = StepSize(0.2)
    size.measured(64, 32, 0.11)
    assert [size.limit(64, full) for full in (32, 33, 30, 29, 1)] == [16, 17, 15, 29, 1]


def test_within_the_budget_while_chat_is_around():
    size, clock = StepSize(0.2, clock := Clock()), clock
    size.measured(64, 32, 0.32)  # 10 ms a nonce
    size.chat_seen()
    assert size.limit(64, 32) == 10  # half of the budget
    assert size.limit(64, 4) == 4
    clock.now += CHAT_MEMORY_SEC - 0.01
    assert size.limit(64, 32) == 10
    clock.now += 0.02
    assert size.limit(64, 32) == 16


def test_a_nonce_that_takes_longer_than_the_budget_is_still_computed():
    size = StepSize(0.2)
    size.measured(64, 1, 5.0)
    size.chat_seen()
    assert size.limit(64, 32) == 1


def test_an_unknown_speed_is_measured_with_one_nonce():
    size = StepSize(0.2)
    size.measured(64, 32, 0.64)
    size.chat_seen()
    assert size.limit(128, 32) == 1
    size.measured(128, 1, 0.04)
    assert size.limit(128, 32) == 2


def test_the_slowest_of_the_last_batches_counts():
    size = StepSize(0.2)
    size.chat_seen()
    size.measured(64, 4, 0.16)
    for _ in range(MEASUREMENTS - 1):
        size.measured(64, 4, 0.04)
    assert size.limit(64, 32) == 2
    size.measured(64, 4, 0.04)
    assert size.limit(64, 32) == 10


def test_what_did_not_fit_is_halved_for_its_length():
    size = StepSize(0.2)
    assert size.out_of_memory(64, 32) == 16
    assert size.out_of_memory(64, 16) == 8
    assert size.limit(64, 32) == 8
    assert size.limit(32, 32) == 32
    assert size.out_of_memory(64, 1) == 1
