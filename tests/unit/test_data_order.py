"""The order of samples: each exactly once an epoch, shared out without a trace of ranks, mixed, the same for ever."""

from collections import Counter

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from swinv2_scale.data import order as module
from swinv2_scale.data.order import Order, mixing, shuffled

SHARDS = st.lists(st.integers(0, 12), min_size=1, max_size=30).filter(any)


def indices(order: Order, *steps: int) -> list[int]:
    return [index for step in steps for index in order.global_batch_of(step)[1].tolist()]


@settings(max_examples=200, deadline=None)
@given(
    shards=SHARDS,
    seed=st.integers(0, 2**64),
    open_shards=st.integers(1, 40),
    epoch=st.integers(0, 10**6),
    data=st.data(),
)
def test_each_sample_at_most_once_an_epoch_and_exactly_once_without_remainder(shards, seed, open_shards, epoch, data):
    samples = sum(shards)
    batch = data.draw(st.integers(1, samples))
    order = Order([shards], seed=seed, global_batch=batch, open_shards=open_shards)
    first = epoch * order.steps_per_epoch
    found = indices(order, *range(first, first + order.steps_per_epoch))
    assert len(found) == len(set(found)) == samples // batch * batch
    assert set(found) <= set(range(samples))
    assert all(order.global_batch_of(step)[0].tolist() == [epoch] * batch for step in range(first, first + 1))


@settings(max_examples=200, deadline=None)
@given(
    sources=st.lists(SHARDS, min_size=1, max_size=4),
    seed=st.integers(0, 2**64),
    open_shards=st.integers(1, 40),
    world=st.sampled_from([1, 2, 3, 4, 8]),
    micro=st.integers(1, 3),
    passes=st.integers(1, 3),
    start=st.integers(0, 10**5),
)
def test_ranks_and_starts_leave_no_trace(sources, seed, open_shards, world, micro, passes, start):
    """A global batch put together from the ranks' shares is that of one rank, whatever was asked for before."""
    batch = world * micro * passes
    if batch > sum(map(sum, sources)) or not all(map(any, sources)):
        return
    one = Order(sources, seed=seed, global_batch=batch, open_shards=open_shards)
    for step in range(start, start + 3):
        fresh = Order(sources, seed=seed, global_batch=batch, open_shards=open_shards)
        ranks = [fresh.micro_batches(step, rank, world, micro) for rank in range(world)]
        together = np.concatenate([np.stack(ranks[rank][p]) for p in range(passes) for rank in range(world)], axis=1)
        assert np.array_equal(together, np.stack([*one.global_batch_of(step), one.chances(step)]))


def test_chances_rise_within_a_batch_and_are_any_for_a_sample():
    order = Order([[30, 34]], seed=3, global_batch=16, open_shards=2)
    seen: list[list[float]] = [[] for _ in range(64)]
    for step in range(400):
        chances = order.chances(step)
        assert (np.diff(chances) > 0).all() and chances[0] >= 0 and chances[-1] < 1
        for index, chance in zip(order.global_batch_of(step)[1], chances, strict=True):
            seen[index].append(chance)
    means, shares = (np.array([f(own) for own in seen]) for f in (np.mean, lambda own: np.mean(np.array(own) < 0.25)))
    assert abs(means - 0.5).max() < 0.13 and abs(shares - 0.25).max() < 0.2  # each met 100 times
    again = Order([[30, 34]], seed=3, global_batch=16, open_shards=1)  # reads in another order, with the same numbers
    assert np.array_equal(again.chances(7), order.chances(7))
    other = Order([[30, 34]], seed=4, global_batch=16, open_shards=2)
    assert not np.array_equal(other.chances(7), order.chances(7))
    assert not np.array_equal(order.chances(8), order.chances(7))


@settings(max_examples=100, deadline=None)
@given(
    sources=st.lists(SHARDS, min_size=2, max_size=4),
    weights=st.lists(st.floats(0.001, 1000), min_size=4, max_size=4),
    seed=st.integers(0, 1000),
    batch=st.integers(1, 20),
)
def test_several_sources_keep_their_weights_and_their_epochs(sources, weights, seed, batch):
    if batch > sum(map(sum, sources)) or not all(map(any, sources)):
        return
    weights = weights[: len(sources)]
    order = Order(sources, seed=seed, global_batch=batch, open_shards=3, weights=weights)
    ends = np.cumsum([sum(shards) for shards in sources])
    met: Counter[tuple[int, int]] = Counter()
    seen = np.zeros(len(sources), int)
    for step in range(40):
        epochs, found = order.global_batch_of(step)
        assert len(found) == batch
        met.update(zip(epochs.tolist(), found.tolist(), strict=True))
        seen += np.bincount(np.searchsorted(ends, found, side="right"), minlength=len(sources))
        expected = (step + 1) * batch * np.array(weights) / sum(weights)
        assert np.abs(seen - expected).max() < len(sources)
    assert set(met.values()) == {1}  # no sample twice in an epoch of its source
    for number, end in enumerate(ends):
        size = sum(sources[number])
        epochs_of = Counter(epoch for epoch, index in met if end - size <= index < end)
        assert all(epochs_of[epoch] == size for epoch in range(max(epochs_of, default=0)))  # complete, but the last


def test_the_remainder_is_another_one_in_each_epoch():
    order = Order([[9, 9, 8]], seed=3, global_batch=8, open_shards=2)
    dropped = {frozenset(range(26)) - frozenset(indices(order, *range(3 * e, 3 * e + 3))) for e in range(4)}
    assert order.steps_per_epoch == 3 and len(dropped) == 4 and {len(rest) for rest in dropped} == {2}


def test_sources_of_one_size_go_their_own_ways():
    order = Order([[30], [30]], seed=0, global_batch=60, open_shards=2)
    found = indices(order, 0)
    first, second = ([index for index in found if low <= index < low + 30] for low in (0, 30))
    assert len(first) == len(second) == 30
    halves = [Order([[30], [30]], seed=0, global_batch=2, open_shards=2).global_batch_of(step)[1] for step in range(30)]
    assert sum(abs(int(one) - int(other)) == 30 for one, other in halves) < 8


def test_seeds_epochs_and_open_shards_give_different_orders():
    cases = [(0, 0, 2), (0, 1, 2), (1, 0, 2), (0, 0, 1)]
    found = [indices(Order([[25] * 4], seed=s, global_batch=100, open_shards=k), e) for s, e, k in cases]
    assert len(set(map(tuple, found))) == 4


def test_the_order_is_pinned():
    """A change here would change the order of samples in the middle of everybody's runs."""
    assert shuffled(10, 3, 1).tolist() == [5, 8, 9, 6, 3, 7, 0, 1, 2, 4]
    assert indices(Order([[3, 2, 4, 1]], seed=3, global_batch=10, open_shards=2), 1) == [5, 8, 7, 6, 9, 3, 0, 2, 4, 1]
    assert indices(Order([[3, 2], [4, 1]], seed=3, global_batch=5, open_shards=2, weights=[2, 1]), 1) == [9, 7, 3, 1, 4]


def test_no_more_shards_are_open_than_was_said():
    shards = [7, 3, 9, 1, 4, 8, 2, 6, 5, 10, 7]
    order = Order([shards], seed=0, global_batch=1, open_shards=4)
    of = np.repeat(np.arange(len(shards)), shards)[indices(order, *range(sum(shards)))]
    last = {shard: position for position, shard in enumerate(of)}
    first = {shard: position for position, shard in reversed(list(enumerate(of)))}
    assert max(sum(first[s] <= p <= last[s] for s in first) for p in range(len(of))) == 4


def test_a_step_far_into_a_large_epoch_takes_one_block(monkeypatch):
    """So resuming takes milliseconds however many samples come before: see docs/benchmarks/data_resume.py."""
    asked = []
    monkeypatch.setattr(module, "shuffled", lambda samples, *seeds: asked.append(samples) or shuffled(samples, *seeds))
    order = Order([[1000] * 1000], seed=0, global_batch=100, open_shards=64)
    order.global_batch_of(9000)
    assert len(asked) == 2 and sum(asked) <= 1000 + 64_000  # the shards, and one block


def test_mixing_is_better_than_webdatasets_on_shards_of_one_class_each():
    """100 shards of 1,000 samples. webdataset: the shards shuffled, then shuffle(1000)."""
    shards = np.random.default_rng(0).permutation(100).tolist()
    stored = ({"__key__": str(number), "class": shard} for shard in shards for number in range(1000))
    theirs = [sample["class"] for sample in webdataset.shuffle(1000)(stored)]
    neighbours = np.mean(np.array(theirs[1:]) == theirs[:-1])
    found = mixing([1000] * 100, open_shards=64)
    assert found["stored"] == pytest.approx(0.999, abs=1e-4)
    assert found["perfect"] == pytest.approx(0.01, abs=1e-4)
    assert found["shuffled"] == pytest.approx(1 / 50, abs=2e-3)  # two blocks of 50 shards
    assert found["shuffled"] < 0.1 * neighbours, neighbours
    assert mixing([1000] * 100, open_shards=100)["shuffled"] == pytest.approx(0.01, abs=2e-3)


@pytest.mark.parametrize("shards", [[1], [0, 1], [5], [0, 0, 3]])
def test_mixing_of_almost_nothing(shards):
    assert all(0 <= share <= 1 for share in mixing(shards, open_shards=2).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 27}, r"27 cannot be drawn from 26 samples.*choose a global batch of 1 to 26"),
        ({"global_batch": 0}, "choose a global batch of 1 to 26"),
        ({"seed": -1}, "seed -1 is negative"),
        ({"open_shards": 0}, "data.open_shards is 0; choose 1 or more"),
        ({"weights": [1.0]}, r"data.weights is \[1.0\] for 2 sources; give a positive number for each"),
        ({"weights": [1.0, 0.0]}, "give a positive number for each"),
        ({"weights": [1.0, float("nan")]}, "give a positive number for each"),
        ({"weights": [float("inf"), 1.0]}, "give a positive number for each"),
    ],
)
def test_what_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        Order([[13], [13]], **{"seed": 0, "global_batch": 2, "open_shards": 4, **changes})
