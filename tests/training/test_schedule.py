"""Learning rate, weight decay groups and weight averaging against the reference's numbers."""

import json

import pytest
import torch
from torch import nn

from rtmdet_fast import RTMDet
from rtmdet_fast.training.recipe import rtmdet_recipe
from rtmdet_fast.training.schedule import ModelEMA, learning_rate_factor, parameter_groups


def share(step):
    return rtmdet_recipe(None, None, "det", None).ema_share(step, 1000, 2e-4)


@pytest.mark.parametrize(
    ("key", "base", "total"),
    [
        ("lr_rtmdet_tiny_300_epochs_of_100_iterations", 4e-3, 30000),
        ("lr_rotated_36_epochs_of_100_iterations", 2.5e-4, 3600),
    ],
)
def test_learning_rate_of_the_reference(shared, key, base, total):
    expected = json.loads((shared / "reference/schedule.json").read_text())[key]
    for iteration, rate in expected.items():
        assert base * learning_rate_factor(int(iteration), total) == pytest.approx(rate, rel=1e-9)


def test_average_of_the_reference(shared):
    """A value that steps 1, 2, 3, 4, 5."""
    expected = json.loads((shared / "reference/schedule.json").read_text())["ema"]
    model = nn.BatchNorm1d(1)
    ema = ModelEMA(model, share)
    for value, average in zip((1.0, 2.0, 3.0, 4.0, 5.0), expected, strict=True):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(value)
            model.num_batches_tracked.fill_(int(value))
        ema.update(model)
        assert ema.model.weight.item() == pytest.approx(average, abs=1e-6)
        assert ema.model.running_mean.item() == pytest.approx(average, abs=1e-6)
        assert ema.model.num_batches_tracked.item() == value


def test_shared_convolutions_are_averaged_once():
    model = RTMDet("nano", num_classes=1)
    shared_model = RTMDet("tiny", num_classes=1)
    for m in (model, shared_model):
        ema = ModelEMA(m, share)
        ema.update(m)
        with torch.no_grad():
            for p in m.parameters():
                p.add_(1)
        before = {k: v.clone() for k, v in ema.model.state_dict().items()}
        ema.update(m)
        weight = (1 - 2e-4) * torch.exp(torch.tensor(-2 / 2000)) + 2e-4
        for key, value in ema.model.named_parameters():
            torch.testing.assert_close(value - before[key], torch.full_like(value, weight), rtol=0, atol=1e-5)


def test_weight_decay_is_on_convolution_weights_only():
    model = RTMDet("tiny", num_classes=2)
    decayed, exempt = parameter_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05 and exempt["weight_decay"] == 0
    kind = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    assert all(isinstance(kind[id(p)], nn.Conv2d) for p in decayed["params"])
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(names[id(p)].endswith("bias") or isinstance(kind[id(p)], nn.BatchNorm2d) for p in exempt["params"])
    assert len(decayed["params"]) + len(exempt["params"]) == len(list(model.parameters()))
