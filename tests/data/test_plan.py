"""Sampling plans: epochs, caches, and resuming to the bit."""

import io
import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch

from rtmdet_fast.data.plan import PlanSampler, repeat_factors
from rtmdet_fast.data.recipes import recipe_for
from rtmdet_fast.errors import UserError

TINY, LARGE = recipe_for("tiny", 64), recipe_for("l", 64)


def epochs(sampler, n):
    return [list(sampler) for _ in range(n)]


def test_an_epoch_is_a_permutation():
    sampler = PlanSampler(50, 8, TINY, seed=0, num_workers=0, drop_last=False)
    first, second = epochs(sampler, 2)
    orders = [[p.index for batch in epoch for p in batch] for epoch in (first, second)]
    assert len(first) == len(sampler) == 7 and [len(b) for b in first] == [8] * 6 + [2]
    assert all(sorted(order) == list(range(50)) for order in orders) and orders[0] != orders[1]


@pytest.mark.parametrize(
    ("length", "drop_last", "sizes"),
    [(16, True, [8, 8]), (17, True, [8, 8]), (17, False, [8, 8, 1]), (5, True, [5]), (5, False, [5]), (1, True, [1])],
)
def test_drop_last(length, drop_last, sizes):
    sampler = PlanSampler(length, 8, TINY, 0, 0, drop_last)
    assert len(sampler) == len(sizes) and [len(b) for b in sampler] == sizes


def test_nothing_to_sample():
    for length, batch_size in [(0, 8), (8, 0)]:
        with pytest.raises(UserError):
            PlanSampler(length, batch_size, TINY, 0, 0)


def test_seeds():
    plans = [p for seed in (0, 0, 1) for batch in PlanSampler(40, 8, LARGE, seed, 0) for p in batch]
    assert plans[:40] == plans[40:80] != plans[80:]
    assert len({p.seed for p in plans}) == 80


def test_fifo_caches():
    plans = [p for epoch in epochs(PlanSampler(30, 4, TINY, 0, 0), 3) for batch in epoch for p in batch]
    for t, plan in enumerate(plans):
        assert plan.mosaic_cache == tuple(p.index for p in plans[max(t - 19, 0) : t + 1])
        assert [p.seed for p in plan.mixup_cache] == [p.seed for p in plans[max(t - 9, 0) : t + 1]]


def test_random_pop_caches():
    plans = [p for epoch in epochs(PlanSampler(100, 4, LARGE, 0, 0), 20) for batch in epoch for p in batch]
    when = {p.seed: t for t, p in enumerate(plans)}
    for before, after in itertools.pairwise(plans):
        assert len(after.mosaic_cache) == min(len(before.mosaic_cache) + 1, 40)
        lost = Counter((*before.mosaic_cache, after.index)) - Counter(after.mosaic_cache)
        assert lost.total() == (len(before.mosaic_cache) == 40)
        kept = {p.seed for p in before.mixup_cache}
        assert after.mosaic_cache[-1] == after.index and after.mixup_cache[-1].seed == after.seed
        assert {p.seed for p in after.mixup_cache[:-1]} <= kept
    # all but the newest survive a push with probability 19/20: the mean age in a full cache is 19 pushes
    ages = [t - when[p.seed] for t, plan in enumerate(plans) if t > 300 for p in plan.mixup_cache]
    assert sum(ages) / len(ages) == pytest.approx(19, rel=0.1)


def test_cached_plans_are_the_earlier_ones_without_their_own_cache():
    plans = {}
    for batch in PlanSampler(60, 6, LARGE, 3, 2):
        for plan in batch:
            plans[plan.seed] = plan
            for cached in plan.mixup_cache:
                original = plans[cached.seed]
                assert cached.mixup_cache == ()
                assert (cached.index, cached.mosaic_cache) == (original.index, original.mosaic_cache)


def test_every_worker_has_its_own_caches():
    for t, batch in enumerate(PlanSampler(64, 4, LARGE, 0, num_workers=3)):
        assert len(batch[0].mosaic_cache) == min(4 * (t // 3) + 1, 40)
    assert PlanSampler(64, 4, LARGE, 0, 0).state_dict() == PlanSampler(64, 4, LARGE, 0, 1).state_dict()


@pytest.mark.parametrize("recipe", [TINY, LARGE], ids=["fifo", "random pop"])
@pytest.mark.parametrize("workers", [0, 3])
def test_resume_to_the_bit(recipe, workers):
    def make():
        return PlanSampler(37, 4, recipe, 7, workers)

    unbroken = make()
    epochs(unbroken, 3)
    state = json.loads(json.dumps(unbroken.state_dict()))
    expected = epochs(unbroken, 2)
    resumed = make()
    resumed.load_state_dict(state)
    assert epochs(resumed, 2) == expected
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    again = PlanSampler(37, 4, recipe, 99, workers)  # the seed, too, is in the state
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert epochs(again, 2) == expected


def test_resume_refuses_another_run():
    state = PlanSampler(37, 4, TINY, 7, 2).state_dict()
    with pytest.raises(UserError, match="37 training images"):
        PlanSampler(38, 4, TINY, 7, 2).load_state_dict(state)
    with pytest.raises(UserError, match="workers"):
        PlanSampler(37, 4, TINY, 7, 3).load_state_dict(state)


def test_stage2():
    sampler = PlanSampler(40, 4, TINY, 0, 2)
    assert not any(p.stage2 for batch in sampler for p in batch)
    sampler.set_stage2(True)
    assert all(p.stage2 and p.mosaic_cache == p.mixup_cache == () for batch in sampler for p in batch)
    resumed = PlanSampler(40, 4, TINY, 0, 2)
    resumed.load_state_dict(sampler.state_dict())
    assert list(resumed) == list(sampler)
    sampler.set_stage2(False)
    assert [len(p.mosaic_cache) for p in next(iter(sampler))] == [1, 2, 3, 4]


def test_a_recipe_without_caches():
    """The plans tell their stage all the same, and a run is resumed as with caches."""
    sampler = PlanSampler(40, 4, None, 0, 2)
    plans = [p for batch in sampler for p in batch]
    assert sorted(p.index for p in plans) == list(range(40)) and len({p.seed for p in plans}) == 40
    assert all(p.mosaic_cache == p.mixup_cache == () and not p.stage2 for p in plans)
    resumed = PlanSampler(40, 4, None, 9, 2)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert epochs(resumed, 1) == epochs(sampler, 1)
    sampler.set_stage2(True)
    assert all(p.stage2 for batch in sampler for p in batch)


def test_repeat_factors_are_those_of_lvis():
    """max over the classes of an image of max(1, sqrt(t / f)), f the share of images with the class."""
    labels = [np.array(found, np.int64) for found in ([0, 0, 1], [0], [0, 2], [], [0], [0], [0], [0])]
    found = repeat_factors(labels, 0.5)
    rare = (0.5 / 0.125) ** 0.5
    assert found.tolist() == [rare, 1, rare, 1, 1, 1, 1, 1]
    assert repeat_factors(labels, 0.1).tolist() == [1.0] * 8


def repeated(world_size=1, rank=0):
    repeats = np.array([1.0, 2.0, 1.25, 3.5] * 5 + [1.0] * 20)
    return repeats, PlanSampler(40, 4, TINY, 3, 0, rank=rank, world_size=world_size, repeats=repeats)


def test_images_are_repeated_as_often_as_told():
    repeats, sampler = repeated()
    assert sampler.epoch_length == 58 and len(sampler) == 14
    counts = np.zeros((400, 40))
    for epoch, batches in enumerate(epochs(sampler, 400)):
        indices = [p.index for batch in batches for p in batch]
        counts[epoch] = np.bincount(indices, minlength=40)
        assert len({p.seed for batch in batches for p in batch}) == 56  # each time augmented in another way
    # of 58.75 an epoch, 56 fit into whole batches
    assert np.abs(counts.mean(0) - repeats * 56 / 58.75).max() < 0.15
    assert (counts <= np.ceil(repeats)).all() and (counts >= np.floor(repeats) - 3).all()


def test_repeats_resume_to_the_bit():
    _, whole = repeated()
    expected = epochs(whole, 3)
    _, first = repeated()
    epochs(first, 1)
    state = json.loads(json.dumps(first.state_dict()))
    _, second = repeated()
    second.load_state_dict(state, skip=5)
    assert epochs(second, 2) == [expected[1][5:], expected[2]]


def test_processes_share_the_repeats_of_an_epoch():
    parts = [repeated(2, rank)[1] for rank in (0, 1)]
    assert [len(part) for part in parts] == [7, 7]
    indices = [p.index for part in parts for batch in list(part) for p in batch]
    _, alone = repeated()
    order = [p.index for batch in list(alone) for p in batch]
    assert sorted(indices) == sorted(order)


@pytest.mark.parametrize(
    ("length", "drop_last", "sizes", "count"),
    [(17, False, [6, 6, 5], 3), (17, True, [6, 6], 3), (13, False, [6, 6], 1)],
)
def test_processes_as_one_show_what_one_would(length, drop_last, sizes, count):
    """Three of two images each: the plans of one with six, shared out as evenly as they go; none takes a step alone."""
    one = epochs(PlanSampler(length, 6, LARGE, 3, 2, drop_last), count)
    parts = [PlanSampler(length, 2, LARGE, 3, 2, drop_last, rank, 3, as_one=True) for rank in range(3)]
    assert {len(part) for part in parts} == {len(sizes)}
    for epoch, *shared in zip(one, *(epochs(part, count) for part in parts), strict=True):
        assert [sum(map(len, batches)) for batches in zip(*shared, strict=True)] == sizes
        for batch, *of_processes in zip(epoch[: len(sizes)], *shared, strict=True):
            assert max(map(len, of_processes)) - min(map(len, of_processes)) <= 1
            assert sorted(p.seed for part in of_processes for p in part) == sorted(p.seed for p in batch)
            assert all(plan in batch for part in of_processes for plan in part)


def test_too_few_images_for_processes_as_one():
    with pytest.raises(UserError, match="2 training images are too few for 3 processes"):
        PlanSampler(2, 2, LARGE, 3, 2, world_size=3, as_one=True)


@pytest.mark.parametrize("as_one", [False, True])
def test_another_number_of_processes_goes_on_with_the_epoch(as_one):
    """Two processes of three images stop in mid-epoch; three of two show the rest of its images, each once."""
    before = [PlanSampler(48, 3, LARGE, 5, 0, rank=r, world_size=2, as_one=as_one) for r in range(2)]
    first = [list(part) for part in before]
    states = [part.state_dict() for part in before]
    second = [list(part) for part in before]
    after = [PlanSampler(48, 2, LARGE, 5, 0, rank=r, world_size=3, as_one=as_one) for r in range(3)]
    for part in after:
        part.load_state_dicts(states, skip=5)
    rest = [list(part) for part in after]
    shown = Counter(p.index for part in second for batch in part[:5] for p in batch)
    shown += Counter(p.index for part in rest for batch in part for p in batch)
    assert len(rest[0]) == 3 and shown == Counter(range(48))
    seeds = [p.seed for part in [*first, *rest] for batch in part for p in batch]
    if not as_one:  # else each process has made the plans of all
        assert len(set(seeds)) == len(seeds)
    else:
        assert [sorted(p.seed for part in rest for p in part[b]) for b in range(3)] == [
            sorted(p.seed for part in second for p in part[b + 5]) for b in range(3)
        ]


def test_one_process_alone_goes_on_to_the_bit():
    sampler, other = (PlanSampler(20, 3, LARGE, 5, 2, rank=1, world_size=2) for _ in range(2))
    list(sampler)
    other.load_state_dicts([PlanSampler(20, 3, LARGE, 5, 2, world_size=2).state_dict(), sampler.state_dict()])
    assert list(other) == list(sampler)
