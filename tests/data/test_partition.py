"""Dividing into train and val: nothing lost, copies together, each class on both sides where that can be."""

import numpy as np
import pytest

from rtmdet_fast.data.partition import partition
from rtmdet_fast.errors import UserError


def classes_of(labels, chosen):
    return set().union(*(labels[i] for i in np.flatnonzero(chosen)))


@pytest.mark.parametrize("seed", range(5))
def test_every_class_of_two_images_is_on_both_sides_and_shares_are_kept(seed):
    rng = np.random.default_rng(seed)
    weights = np.array([0.4, 0.3, 0.2, 0.08, 0.02])
    labels = [set(rng.choice(5, size=rng.integers(0, 4), p=weights).tolist()) for _ in range(400)]
    labels[7], labels[300] = {0, 5}, {5}  # two images of a rare class
    labels[11] = {0, 6}  # the only one of its class
    train = partition(labels, np.arange(400), 0.8, seed)
    assert train.shape == (400,) and train.dtype == bool
    assert abs(train.mean() - 0.8) < 0.02
    assert classes_of(labels, train) == set(range(7)) and classes_of(labels, ~train) == set(range(6))
    for label in range(4):
        holding = np.array([label in held for held in labels])
        assert abs(train[holding].mean() - 0.8) < 0.06
    empty = np.array([not held for held in labels])
    assert abs(train[empty].mean() - 0.8) < 0.05


def test_the_seed_alone_decides():
    labels = [{i % 3} for i in range(60)]
    first, again, other = (partition(labels, np.arange(60), 0.7, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("seed", range(60))
def test_copies_stay_together_and_every_class_is_trained_on(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 12))
    labels = [set(rng.integers(4, size=rng.integers(0, 3)).tolist()) for _ in range(count)]
    groups = rng.integers(0, count, size=count) * 7
    if len(set(groups.tolist())) < 2:
        return
    try:
        train = partition(labels, groups, 0.75, seed)
    except UserError as error:
        assert "only objects of some class" in str(error)
        return
    assert 0 < train.sum() < count
    assert all(len(set(train[groups == group])) == 1 for group in groups)
    assert classes_of(labels, train) == set().union(*labels)


def test_a_class_that_the_shares_would_leave_out_is_moved():
    # dealing out class 1, the rarest, takes both images of class 0 to one side
    labels = [{0, 1}, {0, 1}, {2}, {2}, {2}, {2}, {2}, {2}]
    for seed in range(20):
        train = partition(labels, np.arange(8), 0.8, seed)
        assert classes_of(labels, train) == classes_of(labels, ~train) == {0, 1, 2}


@pytest.mark.parametrize(
    ("labels", "groups", "word"),
    [
        ([{0}], [0], "two different"),
        ([{0}, {0}], [3, 3], "two different"),
        ([{0}, {1}], [0, 1], "only objects"),
    ],
)
def test_what_cannot_be_divided_is_told(labels, groups, word):
    with pytest.raises(UserError, match=word):
        partition(labels, np.array(groups), 0.8)
