"""Whose turn it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from service.runtime.turns import Turns


@dataclass
class Member:
    name: str
    used_s: float = 0.0


def order(turns: Turns[Member], seconds: float = 0.1) -> Iterator[str]:
    """Who is next, each turn taking so long."""
    while True:
        member = turns.in_order()[0]
        turns.charge(member, seconds)
        yield member.name


def join(turns: Turns[Member], name: str) -> Member:
    return turns.join(name, lambda: Member(name))


def test_whoever_rested_goes_first_for_as_long_as_its_credit() -> None:
    turns = Turns[Member](max_debt_s=10.0, credit_s=0.25)
    join(turns, "busy")
    turning = order(turns)
    assert [next(turning) for _ in range(20)] == ["busy"] * 20
    join(turns, "late")
    # what runs now counts as the one that is furthest behind: hence a turn more
    assert [next(turning) for _ in range(8)] == ["late"] * 4 + ["busy", "late"] * 2


def test_a_moment_of_rest_is_worth_no_more_than_what_was_not_used() -> None:
    turns = Turns[Member](max_debt_s=10.0, credit_s=0.25)
    for name in ("a", "b"):
        join(turns, name)
    turning = order(turns)
    used = [next(turning) for _ in range(20)]
    assert used.count("a") == used.count("b")
    for _ in range(10):  # it comes and goes, and has no more than its part for it
        turns.rest("a")
        join(turns, "a")
        used.append(next(turning))
    assert abs(used.count("a") - used.count("b")) <= 1


def test_without_credit_a_rest_is_worth_nothing() -> None:
    turns = Turns[Member](max_debt_s=10.0)
    join(turns, "busy")
    turning = order(turns)
    for _ in range(20):
        next(turning)
    join(turns, "late")
    assert sorted(next(turning) for _ in range(10)) == ["busy"] * 5 + ["late"] * 5
