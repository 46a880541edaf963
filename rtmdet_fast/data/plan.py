"""Which images a training run shows, in which order and company: plans of indices and seeds, no pixels.

The reference keeps decoded images in the caches of its CachedMosaic and CachedMixUp, so that what a run has seen is
lost with the process. Here the caches hold plans: the data of a run is a pure function of (seed, number of loader
workers), and a resumed run shows the very pixels the unbroken one would have shown.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from rtmdet_fast.data.recipes import AugmentRecipe
from rtmdet_fast.errors import UserError


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """One training sample: everything that decides its pixels and boxes."""

    index: int
    """Index into the dataset."""
    seed: int
    """Of every random choice within the sample; also its identity in the caches."""
    mosaic_cache: tuple[int, ...] = ()
    """Dataset indices in the mosaic cache once `index` was pushed, which is the last; empty in stage 2."""
    mixup_cache: tuple[SamplePlan, ...] = ()
    """Plans whose augmented images are in the mixup cache, this one the last; their own `mixup_cache` is empty."""
    stage2: bool = False
    """Whether it belongs to the last epochs, which go without strong augmentation."""


@dataclass(slots=True)
class _Stream:
    """The caches of one loader worker."""

    mosaic: list[int] = field(default_factory=list)
    mixup: list[SamplePlan] = field(default_factory=list)


def repeat_factors(labels_by_image: Sequence[np.ndarray], threshold: float) -> np.ndarray:
    """How often an epoch is to show each image [N] float64, by its rarest class: max(1, sqrt(threshold / f)).

    f is the share of the images that the class occurs in. (LVIS: A Dataset for Large Vocabulary Instance Segmentation,
    Gupta et al. 2019, appendix B.)
    """
    present = [np.unique(labels) for labels in labels_by_image]
    shares = np.bincount(np.concatenate([np.zeros(0, np.int64), *present])) / max(len(present), 1)
    factors = np.sqrt(threshold / np.maximum(shares, 1e-12))
    return np.array([max(1.0, factors[labels].max(initial=0.0)) for labels in present])


class PlanSampler(Sampler[list[SamplePlan]]):
    """A batch sampler: every iteration is one epoch in a new random order, as lists of plans.

    The DataLoader hands batch b to worker b % num_workers, and each worker has caches of its own, as in the
    reference. Keep the workers alive between epochs (persistent_workers), or each epoch decodes its caches anew.
    """

    def __init__(
        self,
        dataset_length: int,
        batch_size: int,
        recipe: AugmentRecipe | None,
        seed: int,
        num_workers: int,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        repeats: np.ndarray | None = None,
        as_one: bool = False,
    ) -> None:
        """A `recipe` of None is one without mosaic and mixup: the plans have no caches in either stage.

        `drop_last` leaves out an incomplete batch, unless it is the only one.

        Each of `world_size` processes shows a part of its own of every epoch; `rank` counts them from 0. Each has
        caches of its own, as in the reference; with `as_one` they show together, step by step, what one process with
        `batch_size` times `world_size` images would: the same pixels in the same steps.

        repeats: how often an epoch shows each image, [dataset_length], 1 or more; once where not given. Of a fraction
            an epoch shows the image once more or not, at random and as often as it says.
        """
        if dataset_length < 1 or batch_size < 1:
            raise UserError(f"an epoch needs images and a batch size of 1 or more, got {dataset_length}, {batch_size}")
        self.dataset_length, self.batch_size, self.drop_last = dataset_length, batch_size, drop_last
        self.recipe, self.rank, self.world_size, self.as_one = recipe, rank, world_size, as_one
        self.repeats = repeats
        self.epoch_length = dataset_length if repeats is None else int(repeats.sum())
        """Images that an epoch shows, in all processes together."""
        if as_one and self.epoch_length < world_size:
            raise UserError(f"{self.epoch_length} training images are too few for {world_size} processes as one")
        self._order = np.random.default_rng((seed, 0))  # the same in every process
        self._rng = np.random.default_rng((seed, 1, 0 if as_one else rank))
        self._streams = [_Stream() for _ in range(max(num_workers, 1))]
        self._stage2 = False
        self._skip = 0
        self.ahead: deque[list[int]] = deque()
        """Dataset indices of the batches of this epoch that were handed out, the oldest first. A loader fetches some
        ahead, in this order: whoever takes a batch from it takes its entry from here."""

    def __len__(self) -> int:
        # All processes take the same number of steps, or the last would wait for the others: as one they leave out a
        # batch of fewer images than processes.
        if self.as_one:
            whole, rest = divmod(self.epoch_length, self.batch_size * self.world_size)
            rest //= self.world_size
        else:
            whole, rest = divmod(max(self.epoch_length // self.world_size, 1), self.batch_size)
        return whole + (rest > 0 and (not self.drop_last or whole == 0))

    def __iter__(self) -> Iterator[list[SamplePlan]]:
        order = self._order.permutation(self.dataset_length)
        if self.repeats is not None:
            order = self._repeated(order)
        batch_size, mine = self.batch_size * self.world_size, slice(self.rank, None, self.world_size)
        if not self.as_one:
            order = np.roll(order, -self.rank)[:: self.world_size]
            batch_size, mine = self.batch_size, slice(None)
        skip, self._skip = self._skip, 0
        self.ahead.clear()
        for b in range(len(self)):
            stream = self._streams[b % len(self._streams)]
            indices = order[b * batch_size : (b + 1) * batch_size].tolist()
            seeds = self._rng.integers(2**63, size=len(indices)).tolist()
            plans = [self._plan(stream, *sample) for sample in zip(indices, seeds, strict=True)]
            if b >= skip:
                self.ahead.append([plan.index for plan in plans[mine]])
                yield plans[mine]

    def set_stage2(self, enabled: bool) -> None:
        """From the next epoch on: with True no strong augmentation; either way the caches start empty."""
        if enabled != self._stage2:
            self._stage2 = enabled
            self._streams = [_Stream() for _ in self._streams]

    def state_dict(self) -> dict[str, Any]:
        """All that the epochs to come depend on, of JSON types; to be taken between two epochs."""
        return {
            "dataset_length": self.dataset_length,
            "order": self._order.bit_generator.state,
            "rng": self._rng.bit_generator.state,
            "stage2": self._stage2,
            "mosaic": [list(s.mosaic) for s in self._streams],
            "mixup": [[[p.index, p.seed, list(p.mosaic_cache)] for p in s.mixup] for s in self._streams],
        }

    def load_state_dict(self, state: dict[str, Any], skip: int = 0) -> None:
        """Continues where `state` was taken, without the first `skip` batches of the next epoch.

        UserError where the dataset or the number of workers differs.
        """
        if state["dataset_length"] != self.dataset_length:
            raise UserError(
                f"cannot resume: the run was on {state['dataset_length']} training images, now there are "
                f"{self.dataset_length}"
            )
        if len(state["mosaic"]) != len(self._streams):
            raise UserError(
                f"cannot resume to the bit: the run had {len(state['mosaic'])} loader streams, now there are "
                f"{len(self._streams)}; use the same number of workers"
            )
        self._order.bit_generator.state = state["order"]
        self._rng.bit_generator.state = state["rng"]
        self._stage2 = state["stage2"]
        self._streams = [
            _Stream(list(mosaic), [SamplePlan(index, seed, tuple(cache)) for index, seed, cache in mixup])
            for mosaic, mixup in zip(state["mosaic"], state["mixup"], strict=True)
        ]
        self._skip = skip

    def load_state_dicts(self, states: Sequence[dict[str, Any]], skip: int = 0) -> None:
        """Continues where each process of a run took its state, of whatever number they were.

        Of another number than now, and not as one, the order of the images goes on, so that an epoch shows each once
        still; random numbers are others, and the caches start empty. UserError as of `load_state_dict`.
        """
        state = states[self.rank % len(states)]
        if len(states) == self.world_size or self.as_one:
            return self.load_state_dict(state, skip)
        fresh: dict[str, list[list]] = {part: [[] for _ in self._streams] for part in ("mosaic", "mixup")}
        self.load_state_dict({**state, **fresh}, skip)
        jumps = self.rank // len(states)  # no two processes draw the same numbers
        self._rng = np.random.Generator(self._rng.bit_generator.jumped(jumps))  # type: ignore[attr-defined]

    def _repeated(self, order: np.ndarray) -> np.ndarray:
        """`order` with every image as often as it is to be shown, in a new random order."""
        # one draw decides for all images: of their sum, rounded down, no fraction is lost or gained
        ends = np.floor(np.cumsum(self.repeats[order]) + self._order.random()).astype(int)  # type: ignore[index]
        counts = np.diff(ends, prepend=0)
        return self._order.permutation(np.repeat(order, counts))[: self.epoch_length]

    def _plan(self, stream: _Stream, index: int, seed: int) -> SamplePlan:
        if self._stage2:
            return SamplePlan(index, seed, stage2=True)
        if self.recipe is None:
            return SamplePlan(index, seed)
        self._push(stream.mosaic, index, self.recipe.mosaic_cache, self.recipe.random_pop)
        plan = SamplePlan(index, seed, tuple(stream.mosaic))
        self._push(stream.mixup, plan, self.recipe.mixup_cache, self.recipe.random_pop)
        return replace(plan, mixup_cache=tuple(stream.mixup))

    def _push(self, cache: list[Any], item: Any, limit: int, random_pop: bool) -> None:
        cache.append(item)
        if len(cache) > limit:  # the item just pushed stays, and stays last
            cache.pop(int(self._rng.integers(len(cache) - 1)) if random_pop else 0)
