"""`accelerate` on every model of timm that has a BatchNorm: what it fuses, what it leaves and why, same outputs.

    python -m benches.timm_models --out benches/timm_models.json

Each model is made without weights, so that only reading it costs; where something is fused and there are at most
`--parameters` million parameters, it is made again with random ones, and runs on two small random images in training
and in inference, before `accelerate` and after it. Fails where an output differs. Needs timm, which needs torchvision.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from tqdm import tqdm

from rtmdet_fast import accelerate

TOLERANCE = 1e-5  # of the greatest output; on a CPU the fused layers are the original's to the bit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benches/timm_models.json"))
    parser.add_argument("--parameters", type=float, default=8, help="millions up to which a model runs")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no further model runs")
    parser.add_argument("--only", default="", help="names with wildcards")
    arguments = parser.parse_args()
    start = time.perf_counter()
    found: dict[str, dict[str, Any]] = {}
    for name in tqdm(timm.list_models(arguments.only), desc="models"):
        try:
            entry = read(name)
            if entry is None:
                continue
            small = entry["parameters"] <= arguments.parameters * 1e6
            if entry["fused"] and small and time.perf_counter() - start < arguments.seconds:
                entry["difference"] = difference(name)
        except Exception as error:  # the others run all the same
            entry = {"failed": f"{type(error).__name__}: {error}"[:200]}
        found[name] = entry
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in found.items())
    arguments.out.write_text(f"{{\n{text}\n}}\n")
    ran = [entry for entry in found.values() if "difference" in entry]
    fused = sum(bool(entry.get("fused")) for entry in found.values())
    print(f"{len(found)} models with BatchNorm, {fused} with something to fuse, {len(ran)} run before and after")
    wrong = [name for name, entry in found.items() if "failed" in entry or entry.get("difference", 0) > TOLERANCE]
    if wrong:
        sys.exit(f"failed, or other outputs: {', '.join(wrong)}")


def read(name: str) -> dict[str, Any] | None:
    """What `accelerate` makes of a model; None of one without BatchNorm."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    if not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
        return None
    report = accelerate(model)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "fused": dict(collections.Counter(report.replaced.values())),
        "left": dict(collections.Counter(report.left.values())),
    }


def difference(name: str) -> float:
    """Greatest difference of an accelerated model's outputs, in training and inference, to the greatest output."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10)
    settings = model.pretrained_cfg
    fixed = settings.get("fixed_input_size")
    side = settings["input_size"][-1] if fixed else max(96, *settings.get("min_input_size", (3, 0, 0))[1:])
    images = torch.randn(2, settings["input_size"][0], side, side)
    outputs = []
    for fuse in (False, True):
        one = copy.deepcopy(model)
        if fuse:
            accelerate(one)
        for training in (True, False):
            torch.manual_seed(1)  # of dropout
            with torch.no_grad():
                output = one.train(training)(images)
            outputs.append(output[0] if isinstance(output, tuple) else output)
    scale = max(float(output.abs().max()) for output in outputs[:2])
    return max(float((a - b).abs().max()) for a, b in zip(outputs[:2], outputs[2:], strict=True)) / max(scale, 1e-12)


if __name__ == "__main__":
    main()
