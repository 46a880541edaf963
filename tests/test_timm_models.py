"""The comparison of timm's models sees what changes."""

import pytest
import torch
from torch import nn

from benches import timm_models
from rtmdet_fast import accelerate


def small(name: str, device: str) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 32),
        nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.SiLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model.pretrained_cfg = {"input_size": (3, 96, 96)}
    return model


def test_what_is_fused_is_equal(monkeypatch):
    monkeypatch.setattr(timm_models, "build", small)
    assert timm_models.compare("small") == {"size": 64} | dict.fromkeys(
        ("training", "gradients", "statistics", "inference"), 0.0
    )


def scaled(model: nn.Module) -> None:
    accelerate(model)
    model[1][2].register_forward_hook(lambda module, args, output: output * 1.01)


def frozen(model: nn.Module) -> None:
    model[1][1].momentum = 0.0


@pytest.mark.parametrize("change, seen", [(scaled, "training inference gradients"), (frozen, "statistics inference")])
def test_what_differs_is_seen(monkeypatch, change, seen):
    monkeypatch.setattr(timm_models, "build", small)
    monkeypatch.setattr(timm_models, "accelerate", change)
    found = timm_models.compare("small")
    assert {what for what, value in found.items() if what != "size" and value > 1e-4} == set(seen.split())


def test_a_model_that_cannot_be_run_says_why(monkeypatch):
    def refuse(name: str, device: str) -> nn.Module:
        raise RuntimeError("needs what is not here")

    monkeypatch.setattr(timm_models, "build", refuse)
    failed = timm_models.compare("small")
    assert failed == {"failed": "RuntimeError: needs what is not here"}
    row = {"family": "small", "parameters": 1, "batch norms": 1, "fused": {timm_models.EPILOGUE: 1}}
    page = timm_models.page({"models": {"small": row | {"compared": failed}}, "made with": {"torch": "2"}})
    assert "- `small`: RuntimeError: needs what is not here" in page and "| small | 1 of 1 | 1 |" in page
    assert not torch.is_inference_mode_enabled()
