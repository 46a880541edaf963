"""How the published models were trained, where sizes and versions differ; what they share is the trainer's."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from rtmdet_fast.errors import UserError
from rtmdet_fast.models.rtdetr.decoder import Sampling

LR = 1e-4
"""At 16 images per step of all processes, of all but the backbone."""
# Parameters without weight decay, by their names. Those of version 1 do not tell that `input_proj.0.1` and
# `enc_output.1` are norms, whose weights are decayed; version 2 renamed them.
NORMS_AND_BIASES = r"norm|^(encoder|decoder)\..*bias$"
BUT_OF_THE_BACKBONE = r"^(encoder|decoder)\..*(norm|bias$)"
NORMS_BUT_OF_THE_BACKBONE = r"^(encoder|decoder)\..*norm"


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """The published figures of one model; the defaults are version 2's."""

    epochs: int = 72
    plain_epochs: int = 1
    """Of `epochs` the last ones, without distortion of colours, zoom-out, crop and change of the image size."""
    warmup: int = 2000
    """Steps, from 1 / 2000 of the learning rate up; it stays where it gets to."""
    multi_scale: bool = True
    """Whether batches have image sizes of their own."""
    backbone_lr: float = 1e-5
    undecayed: str | None = NORMS_BUT_OF_THE_BACKBONE
    """Pattern somewhere in the names of parameters without weight decay; None where all have it."""

    def parameter_groups(self, model: nn.Module, weight_decay: float = 1e-4) -> list[dict[str, Any]]:
        """Groups of AdamW, each with an `lr_factor` on its rate; frozen parameters are in none."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                factor = self.backbone_lr / LR if name.startswith("backbone.") else 1.0
                exempt = self.undecayed is not None and re.search(self.undecayed, name) is not None
                groups.setdefault((factor, 0.0 if exempt else weight_decay), []).append(parameter)
        return [
            {"params": parameters, "lr_factor": factor, "weight_decay": decay}
            for (factor, decay), parameters in groups.items()
        ]


def training_recipe(size: str, version: int, sampling: Sampling = "bilinear") -> TrainingRecipe:
    """The published recipe; of version 1's l and x, which were trained elsewhere, what version 2 has for them."""
    if version == 1:
        recipe = {
            "r18": V1,
            "r34": V1,
            "r50m": V1_BOTTLENECKS,
            "r50": V1_BOTTLENECKS,
            "r101": replace(V1, backbone_lr=1e-6, undecayed=None),
            "l": replace(V1_BOTTLENECKS, backbone_lr=5e-6),
            "x": replace(V1_BOTTLENECKS, backbone_lr=1e-6),
        }
    else:
        recipe = {
            "r18": TrainingRecipe(epochs=120, plain_epochs=3, multi_scale=False, backbone_lr=1e-4, undecayed="norm|bn"),
            "r34": TrainingRecipe(epochs=120, plain_epochs=3, backbone_lr=5e-5, undecayed=NORMS_AND_BIASES),
            "r50m": TrainingRecipe(epochs=84, plain_epochs=3),
            "r50": TrainingRecipe(),
            "r101": TrainingRecipe(backbone_lr=1e-6),
            "l": TrainingRecipe(backbone_lr=5e-6),
            "x": TrainingRecipe(backbone_lr=1e-6),
            "h": TrainingRecipe(backbone_lr=5e-6),
        }
    if size not in recipe:
        raise UserError(f"there is no RT-DETR version {version} of size {size!r}; choose one of {', '.join(recipe)}")
    # of a model that was trained with bilinear sampling
    epochs = {"r18": (36, 3), "r34": (12, 2), "r50m": (36, 3), "r50": (12, 2)}.get(size)
    if sampling == "discrete" and version == 2 and epochs is not None:
        return replace(recipe[size], epochs=epochs[0], plain_epochs=epochs[1])
    return recipe[size]


V1 = TrainingRecipe(plain_epochs=0, warmup=0, undecayed=NORMS_AND_BIASES)
V1_BOTTLENECKS = replace(V1, undecayed=BUT_OF_THE_BACKBONE)
