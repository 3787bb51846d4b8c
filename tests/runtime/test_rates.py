"""How fast a queue drains, and when that is believed."""

from __future__ import annotations

import pytest

from service.runtime.rates import DrainRate


def seen(*batches_s: float) -> DrainRate:
    """The rate after batches of one image that took so long, one after the other."""
    rate, now = DrainRate(), 0.0
    rate.begin(now)
    for seconds in batches_s:
        now += seconds
        rate.note(1, now)
    return rate


def test_one_slow_batch_is_not_believed() -> None:
    assert not seen(20.0).is_sound
    assert not seen(20.0, 0.1).is_sound


def test_a_slow_batch_after_a_start_does_not_count_for_those_that_follow() -> None:
    rate = seen(20.0, 0.1, 0.1)
    assert rate.is_sound
    assert rate.seconds_for(10) == pytest.approx(1.0)


def test_a_few_slow_batches_are_believed() -> None:
    rate = seen(1.0, 1.0, 1.0)
    assert rate.is_sound
    assert rate.seconds_for(4) == pytest.approx(4.0)


def test_fast_batches_are_believed_when_there_were_many() -> None:
    assert not seen(*[0.01] * 15).is_sound
    assert seen(*[0.01] * 16).is_sound
