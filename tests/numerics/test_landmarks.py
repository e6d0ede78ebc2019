"""The order of landmarks: a permutation whose prefixes are landmark sets."""

from collections import Counter

import numpy as np
import pytest

from worker.influence.landmarks import landmark_order

USABLE = np.flatnonzero(np.arange(1500) % 3)  # gaps, as where samples have no response
SOURCES = [("a", "b", None, "c")[min(i % 8, 3)] for i in range(len(USABLE))]  # 5/8 of them c


@pytest.mark.parametrize("choice", ["uniform", "stratified"])
def test_a_permutation_of_the_usable_by_the_seed(choice):
    orders = [landmark_order(USABLE, choice=choice, seed=seed, sources=SOURCES) for seed in (3, 3, 4)]
    assert orders[0].dtype == np.int64
    assert np.array_equal(np.sort(orders[0]), USABLE)
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    assert landmark_order(USABLE[:0], choice=choice, seed=0, sources=[]).size == 0


def test_uniform_does_not_look_at_sources():
    with_sources = landmark_order(USABLE, choice="uniform", seed=1, sources=SOURCES)
    assert np.array_equal(with_sources, landmark_order(USABLE, choice="uniform", seed=1))


def test_every_prefix_of_stratified_holds_each_source_in_its_share():
    source = dict(zip(USABLE, SOURCES, strict=True))
    for seed in range(20):
        order = landmark_order(USABLE, choice="stratified", seed=seed, sources=SOURCES)
        for length in (1, 7, 50, 333, 1000):
            counts = Counter(source[index] for index in order[:length])
            for name, count in Counter(SOURCES).items():
                assert abs(counts[name] - length * count / len(SOURCES)) < 2.5


@pytest.mark.parametrize("choice", ["uniform", "stratified"])
def test_each_sample_is_as_likely_as_any_other_to_come_first(choice):
    sources = ["few"] * 2 + ["many"] * 6
    counts = Counter(
        index
        for seed in range(4000)
        for index in landmark_order(np.arange(8), choice=choice, seed=seed, sources=sources)[:2]
    )
    assert all(abs(counts[index] - 1000) < 130 for index in range(8)), counts  # 130 is 4.7 standard deviations


@pytest.mark.parametrize(
    ("choice", "sources", "message"),
    [
        ("random", None, "choice must be uniform or stratified, not 'random'"),
        ("stratified", None, "a source for each of the 1000 usable samples: none are given"),
        ("stratified", ["a"], "a source for each of the 1000 usable samples: there are 1"),
    ],
)
def test_wrong_arguments_are_named(choice, sources, message):
    with pytest.raises(ValueError, match=message):
        landmark_order(USABLE, choice=choice, seed=0, sources=sources)
