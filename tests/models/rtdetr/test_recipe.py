"""The published training figures, and which parameter has which rate and decay, of all models."""

import json

import pytest
import torch

from rtmdet_fast.errors import UserError
from rtmdet_fast.models.rtdetr.model import RTDETR
from rtmdet_fast.models.rtdetr.recipe import LR, training_recipe
from rtmdet_fast.training.schedule import ema_share

MODELS = {f"rtdetr_{size}": (size, 1) for size in ("r18", "r34", "r50m", "r50", "r101")}
MODELS |= {f"rtdetrv2_{size}": (size, 2) for size in ("r18", "r34", "r50m", "r50", "r101")}
MODELS |= {f"rtdetrv2_hgnetv2_{size}": (size, 2) for size in ("l", "x", "h")}


@pytest.mark.parametrize("name", MODELS)
def test_the_published_groups(shared, name):
    published = json.loads((shared / "reference/rtdetr/keys/param_groups.json").read_text())
    assert published.keys() == MODELS.keys()
    expected = {
        parameter: (group["lr"], group["weight_decay"])
        for group in published[name]["groups"]
        for parameter in group["names"]
    }
    with torch.device("meta"):
        model = RTDETR(*MODELS[name])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names.pop(id(parameter)): (pytest.approx(LR * group["lr_factor"], rel=1e-12), group["weight_decay"])
        for group in training_recipe(*MODELS[name]).parameter_groups(model)
        for parameter in group["params"]
    }
    assert found == expected
    assert set(names.values()) == set(published[name]["frozen"])


@pytest.mark.parametrize(
    ("size", "version", "figures"),
    [
        ("r18", 1, (72, 0, 0, True)),
        ("r101", 1, (72, 0, 0, True)),
        ("r18", 2, (120, 3, 2000, False)),
        ("r34", 2, (120, 3, 2000, True)),
        ("r50m", 2, (84, 3, 2000, True)),
        ("r50", 2, (72, 1, 2000, True)),
        ("h", 2, (72, 1, 2000, True)),
    ],
)
def test_the_published_figures(size, version, figures):
    recipe = training_recipe(size, version)
    assert (recipe.epochs, recipe.plain_epochs, recipe.warmup, recipe.multi_scale) == figures


def test_discrete_sampling_is_a_shorter_training():
    for size, figures in {"r18": (36, 3), "r34": (12, 2), "r50m": (36, 3), "r50": (12, 2)}.items():
        recipe, base = training_recipe(size, 2, "discrete"), training_recipe(size, 2)
        assert (recipe.epochs, recipe.plain_epochs) == figures
        assert (recipe.backbone_lr, recipe.undecayed, recipe.multi_scale) == (
            base.backbone_lr,
            base.undecayed,
            base.multi_scale,
        )


def test_the_published_average_is_that_of_the_trainer():
    for n in (1, 2, 1000, 50000):
        d = 0.9999 * (1 - 2.718281828459045 ** (-n / 2000))
        assert 1 - ema_share(n - 1, 1e-4) == pytest.approx(d, rel=1e-12)


def test_a_size_that_is_not_there():
    with pytest.raises(UserError, match="no RT-DETR version 1 of size 'h'"):
        training_recipe("h", 1)
