"""Learning rate, weight decay groups and weight averaging against the reference's numbers."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from rtmdet_fast import RTMDet
from rtmdet_fast.training.recipe import rtmdet_recipe
from rtmdet_fast.training.schedule import ModelEMA, ema_share, learning_rate_factor, parameter_groups


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
        ema.update()
        assert ema.model.weight.item() == pytest.approx(average, abs=1e-6)
        assert ema.model.running_mean.item() == pytest.approx(average, abs=1e-6)
        assert ema.model.num_batches_tracked.item() == value


def test_shared_convolutions_are_averaged_once():
    model = RTMDet("nano", num_classes=1)
    shared_model = RTMDet("tiny", num_classes=1)
    for m in (model, shared_model):
        ema = ModelEMA(m, share)
        ema.update()
        with torch.no_grad():
            for p in m.parameters():
                p.add_(1)
        before = {k: v.clone() for k, v in ema.model.state_dict().items()}
        ema.update()
        weight = (1 - 2e-4) * torch.exp(torch.tensor(-2 / 2000)) + 2e-4
        for key, value in ema.model.named_parameters():
            torch.testing.assert_close(value - before[key], torch.full_like(value, weight), rtol=0, atol=1e-5)


def test_modules_are_walked_over_once(monkeypatch):
    model = RTMDet("nano", num_classes=1)
    ema = ModelEMA(model, share)

    def walked(*_, **__):
        raise AssertionError("an update walks over the modules")

    for method in ("named_modules", "named_parameters", "named_buffers"):
        monkeypatch.setattr(nn.Module, method, walked)
    ema.update()


def test_weight_decay_is_on_convolution_weights_only():
    model = RTMDet("tiny", num_classes=2)
    decayed, exempt = parameter_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05 and exempt["weight_decay"] == 0
    kind = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    assert all(isinstance(kind[id(p)], nn.Conv2d) for p in decayed["params"])
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(names[id(p)].endswith("bias") or isinstance(kind[id(p)], nn.BatchNorm2d) for p in exempt["params"])
    assert len(decayed["params"]) + len(exempt["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(("task", "published"), [("det", 137_000), ("ins", 137_000), ("rotated", 40_000)])
def test_a_run_as_long_as_the_published_one_is_averaged_as_published(task, published):
    default = rtmdet_recipe(None, None, task, None).ema_share
    for total in (published, 3 * published):
        assert [default(step, total, None) for step in (0, 1, 500, 10**5)] == [
            default(step, total, 2e-4) for step in (0, 1, 500, 10**5)
        ]


def weights_at_the_end(share, total):
    """Of the model after each step in the average at the end of a run."""
    shares = np.array([share(step, total) for step in range(total)])
    return shares * np.append(np.cumprod(1 - shares[:0:-1])[::-1], 1.0)


def mean_age(weights):
    """In steps, of what was averaged."""
    return (weights * (len(weights) - np.arange(len(weights)))).sum()


def test_a_shorter_run_is_averaged_by_the_same_schedule_compressed():
    """What an average holds of the first tenth, and how old it is, are those of the published run at its end."""
    default = rtmdet_recipe(None, None, "det", None).ema_share
    found = {total: weights_at_the_end(lambda *at: default(*at, None), total) for total in (1370, 20_000, 137_000)}
    for total, weights in found.items():
        assert weights.sum() == pytest.approx(1)
        assert mean_age(weights) / total == pytest.approx(5000 / 137_000, rel=0.02)
        assert weights[: total // 10].sum() < 1e-6
    assert [default(step, 20, None) for step in range(20)] == [1.0] * 20


def test_the_published_average_lags_in_runs_between_and_averages_nothing_in_short_ones():
    """Figures of docs/train.md."""
    default = rtmdet_recipe(None, None, "det", None).ema_share
    ages = {total: mean_age(weights_at_the_end(lambda *at: default(*at, 2e-4), total)) for total in (1370, 20_000)}
    assert ages[1370] == pytest.approx(2, abs=0.1) and ages[20_000] / 20_000 == pytest.approx(0.13, abs=0.005)


def test_a_momentum_that_is_given_stays_what_it_was():
    for step in (1, 10, 2000):
        assert rtmdet_recipe(None, None, "det", None).ema_share(step, 100, 2e-4) == ema_share(step, 2e-4, 2000)
