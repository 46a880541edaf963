"""Dividing images into those to train on and those to validate on, by the classes that they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from rtmdet_fast.errors import UserError

NOTHING = -1  # stands for the class of images without objects


def partition(labels: Sequence[Sequence[int]], groups: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """Which images [n] bool are to train on; the others are to validate on.

    Iterative stratification (Sechidis, Tsoumakas, Vlahavas: On the stratification of multi-label data, 2011): the
    images of the rarest class are dealt out first, each to the side that lacks it most. Images without objects count as
    a class. A class that two groups or more hold is on both sides wherever one move can bring that about, and one of a
    single group is to be trained on.

    Args:
        labels: of each image the classes of its objects, in any order and number.
        groups: [n] int; images of one number stay together.
        share: of the images to train on, in (0, 1).
        seed: decides, with the images and their order, the result.

    Raises UserError where there are fewer than two groups, or each is the only one of some class.
    """
    _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    if len(first) < 2:
        raise UserError("--split needs two different images at least")
    held: list[set[int]] = [set() for _ in first]
    for group, found in zip(group_of.tolist(), labels, strict=True):
        held[group].update(found)
    held = [found or {NOTHING} for found in held]
    weights = np.bincount(group_of).tolist()
    order = np.random.default_rng(seed).permutation(len(held)).tolist()
    members: dict[int, list[int]] = {}
    for group in order:
        for label in held[group]:
            members.setdefault(label, []).append(group)

    # wanted[side]: images, in all and of each class; side 1 is to train on
    wanted = [len(group_of) * (1 - share), len(group_of) * share]
    wanted_of = [
        {label: _portion(label, [weights[g] for g in of], share, side) for label, of in members.items()}
        for side in (0, 1)
    ]
    sides: dict[int, int] = {}
    left = {label: len(of) for label, of in members.items()}
    while left:
        rarest = min(left, key=lambda label: (left[label], label))
        for group in members[rarest]:
            if group in sides:
                continue
            side = max((1, 0), key=lambda side: (wanted_of[side][rarest], wanted[side]))
            sides[group] = side
            wanted[side] -= weights[group]
            for label in held[group]:
                wanted_of[side][label] -= weights[group]
                if label in left:
                    left[label] -= 1
        del left[rarest]
    _repair(sides, held, members, weights)
    if all(sides.values()):
        raise UserError("--split leaves no image to validate on: each one has the only objects of some class")
    return np.array([sides[group] for group in range(len(held))], bool)[group_of]


def _portion(label: int, weights: list[int], share: float, side: int) -> float:
    """How many images of a class a side is to have: one at least where there are two groups of them."""
    total = sum(weights)
    least = 1 if len(weights) > 1 and label != NOTHING else 0
    to_train = min(max(total * share, least), total - least)
    if len(weights) == 1 and label != NOTHING:
        to_train = total
    return to_train if side else total - to_train


def _repair(sides: dict[int, int], held: list[set[int]], members: dict[int, list[int]], weights: list[int]) -> None:
    """Moves a group to a side that lacks one of its classes, where no class is thereby missed on the other side."""
    count = [Counter(label for group, s in sides.items() if s == side for label in held[group]) for side in (0, 1)]
    for side in (1, 0):  # a class that is never trained on is worse than one that is never validated
        for label in sorted(members, key=lambda label: (len(members[label]), label)):
            if label == NOTHING or count[side][label] or len(members[label]) < 2 - side:
                continue
            free = [g for g in members[label] if side or all(count[1][other] > 1 for other in held[g] - {NOTHING})]
            if not free:
                continue
            # one that takes no class away from the other side, and then a small one
            group = min(free, key=lambda g: (any(count[1 - side][o] < 2 for o in held[g] - {NOTHING}), weights[g]))
            sides[group] = side
            count[side].update(held[group])
            count[1 - side].subtract(held[group])
