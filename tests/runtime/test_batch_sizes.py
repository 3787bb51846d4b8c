"""How the size of batches is learned, from made-up costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from service.runtime.batch_sizes import BATCHES_BETWEEN_TRIALS, LONGEST_BETWEEN_TRIALS, BatchSizes

Cost = Callable[[int], float]


def run(sizes: BatchSizes, cost: Cost, batches: int, waiting: int = 1000, group: str = "a") -> list[int]:
    """Run batches of the sizes asked for while so many wait, each taking the seconds of `cost`; their sizes."""
    taken = []
    for _ in range(batches):
        taken.append(min(waiting, sizes.limit(group, waiting)))
        sizes.learn(group, taken[-1], cost(taken[-1]))
    return taken


def constant(images: int) -> float:
    """A GPU: a batch takes as long as one image."""
    return 0.01


def proportional(images: int) -> float:
    """A large network on a CPU: nothing is gained."""
    return 0.05 * images


def with_overhead(images: int) -> float:
    """A small network on a CPU: an image costs 1.5, 1.25, 1.125, 1.06, 1.03 ms at 1, 2, 4, 8, 16."""
    return 0.0005 + 0.001 * images


def test_the_largest_batch_is_reached_soon_where_company_costs_nothing() -> None:
    sizes = BatchSizes(16)
    assert run(sizes, constant, 9) == [1, 1, 2, 2, 4, 4, 8, 8, 16]
    assert sizes.best("a") == 16


def test_one_image_at_a_time_where_nothing_is_gained() -> None:
    sizes = BatchSizes(16)
    taken = run(sizes, proportional, 1000)
    assert sizes.best("a") == 1
    assert set(taken) == {1, 2}
    assert taken.count(2) < 30


def test_the_size_stops_where_an_image_gets_no_clearly_cheaper() -> None:
    sizes = BatchSizes(16)
    run(sizes, with_overhead, 100)
    assert sizes.best("a") == 8


def test_a_long_batch_must_be_worth_waiting_for() -> None:
    def slightly(images: int) -> float:
        return 0.06 * images**0.85  # an image is 10 % cheaper at twice the size

    short, long = BatchSizes(16), BatchSizes(16)
    run(short, lambda images: slightly(images) / 100, 400)
    run(long, slightly, 400)
    assert (short.best("a"), long.best("a")) == (16, 1)
    run(long, constant, 2 * LONGEST_BETWEEN_TRIALS)
    assert long.best("a") == 16


def test_a_size_is_tried_only_when_as_many_wait() -> None:
    sizes = BatchSizes(16)
    assert set(run(sizes, constant, 50, waiting=1)) == {1}
    assert set(run(sizes, constant, 50, waiting=3)) == {2}
    assert sizes.best("a") == 2


@pytest.mark.parametrize("max_batch", [1, 2, 3, 12, 16])
def test_no_size_goes_beyond_the_largest_batch(max_batch: int) -> None:
    sizes = BatchSizes(max_batch)
    assert max(run(sizes, constant, 100)) == max_batch
    assert sizes.best("a") == max_batch


def test_the_size_follows_the_load_down_and_up() -> None:
    sizes = BatchSizes(16)
    run(sizes, constant, 20)
    run(sizes, lambda images: 0.01 * images * (2 if images > 1 else 1), 200)
    assert sizes.best("a") == 1
    run(sizes, constant, 3 * BATCHES_BETWEEN_TRIALS)
    assert sizes.best("a") == 16


def test_what_a_new_shape_costs_once_does_not_count_against_its_size() -> None:
    sizes, met = BatchSizes(16), set()

    def cost(images: int) -> float:
        first = images not in met
        met.add(images)
        return 0.01 + (0.5 if first else 0.0)

    run(sizes, cost, 40)
    assert sizes.best("a") == 16


def test_one_slow_batch_in_between_changes_little() -> None:
    sizes = BatchSizes(4)
    run(sizes, constant, 40)
    sizes.learn("a", 4, 1000.0)
    run(sizes, constant, 20)
    assert sizes.best("a") == 4


def test_groups_and_crowds_are_learned_apart() -> None:
    sizes = BatchSizes(16)
    run(sizes, constant, 20, group="small images")
    run(sizes, proportional, 20, group="large images")
    assert (sizes.best("small images"), sizes.best("large images")) == (16, 1)
    assert sizes.best("small images", crowded=True) == 1
    assert sizes.best("never met") == 1


def test_only_the_groups_met_last_are_remembered() -> None:
    sizes = BatchSizes(16, max_groups=2)
    for group in "abc":
        run(sizes, constant, 20, group=group)
    assert [sizes.best(group) for group in "abc"] == [1, 16, 16]


def test_a_batch_that_fails_is_tried_no_more_for_a_while() -> None:
    sizes = BatchSizes(16)
    run(sizes, constant, 2)
    sizes.put_off("a")
    assert set(run(sizes, constant, BATCHES_BETWEEN_TRIALS)) == {1}
    assert run(sizes, constant, 9)[-1] == 16


def test_seconds_come_from_the_group_or_from_others() -> None:
    sizes = BatchSizes(16)
    assert 0 < sizes.seconds("a", 1) < 1
    run(sizes, proportional, 10, waiting=1)
    assert sizes.seconds("a", 4) == pytest.approx(0.2)
    assert sizes.seconds("never met", 4) == pytest.approx(0.2)


def test_a_request_larger_than_any_batch_tells_of_no_size() -> None:
    sizes = BatchSizes(4)
    run(sizes, proportional, 10)
    for _ in range(10):
        sizes.learn("a", 32, 0.001)
    assert sizes.best("a") == 1
