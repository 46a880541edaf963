"""Writes golden.npz, the numbers that test_golden.py holds the library to: `python tests/golden/make.py`.

Run it where numbers are meant to change, and say in the commit which and why: it prints what differs from the file
before, and by how much. One thread (OMP_NUM_THREADS=1), the versions that `make test` installs; OpenCV's is kept too.

Weights, inputs and scenes are drawn by NumPy, from a stream for each name; no generator of PyTorch and no picture
decoder has a part in them. What the models are is of no matter, only that every layer says something.
"""

from __future__ import annotations

import copy
import csv
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from rtmdet_fast import RTMDet, ops
from rtmdet_fast.data.shapes import CLASSES, draw_scene
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.training.config import TrainConfig
from rtmdet_fast.training.train import train

FILE = Path(__file__).with_name("golden.npz")
Numbers = dict[str, np.ndarray]

MODELS = (("nano", "det"), ("tiny", "det"), ("m", "det"), ("tiny", "ins"), ("tiny", "rotated"))
SIDE = 64  # of the pictures, in pixels
SCENE = 96  # of the drawn ones
STEPS = 30


def uniform(shape: tuple[int, ...], name: str, low: float = -1, high: float = 1) -> Tensor:
    """float32 [*shape], a function of the name."""
    values = np.random.default_rng(list(name.encode())).random(shape)
    return torch.from_numpy((low + (high - low) * values).astype(np.float32))


@cache
def drawn_model(size: str, task: str) -> RTMDet:
    """A model whose parameters are drawn by name, and whose running statistics are those of a few pictures."""
    model = RTMDet(size, task, class_names=CLASSES)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.copy_(uniform(value.shape, name) * math.sqrt(3 / value[0].numel()))
            elif name.endswith(".bn.weight"):
                value.copy_(uniform(value.shape, name, 0.5, 1.5))
            elif ".rtm_cls." in name:  # scores of a tenth
                value.copy_(uniform(value.shape, name, -3, -2))
            elif ".rtm_reg." in name:  # distances of a stride or two
                value.copy_(uniform(value.shape, name, 1, 2) - (1 if model.bbox_head.exponential else 0))
            else:
                value.copy_(uniform(value.shape, name) / 5)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        usual = norms[0].momentum
        for norm in norms:
            norm.momentum = 1.0
        model.train()(torch.stack([picture(f"statistics {i}", 2 * SIDE, 2 * SIDE) for i in range(8)]))
        for norm in norms:
            norm.momentum = usual
    return model.eval()


def picture(name: str, height: int = SIDE, width: int = SIDE) -> Tensor:
    """[3, height, width] in [-1.5, 1.5]: squares of eight pixels, and noise."""
    squares = uniform((3, height // 8, width // 8), f"{name} squares")
    return squares.repeat_interleave(8, 1).repeat_interleave(8, 2) + uniform((3, height, width), f"{name} noise") / 2


def targets(task: str) -> Targets:
    """Two pictures with three objects and two."""
    boxes = torch.tensor(
        [[[5.0, 3, 33, 41], [22, 19, 62, 60], [3, 44, 19, 63]], [[1, 2, 63, 50], [30, 33, 47, 49], [0, 0, 0, 0]]]
    )
    labels, counts = torch.tensor([[0, 3, 1], [4, 0, -1]]), torch.tensor([3, 2])
    centre, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    if task == "rotated":
        angle = torch.tensor([[0.3, -1.2, 0.0], [0.7, -0.5, 0.0]])[..., None]
        return Targets(torch.cat((centre, sides, angle), -1), labels, counts)
    if task == "det":
        return Targets(boxes, labels, counts)
    y, x = torch.meshgrid(*[torch.arange(2.0, SIDE, 4)] * 2, indexing="ij")
    radius = (sides / 2).clamp(min=1)[:, :, None, None]
    ellipse = ((torch.stack((x, y), -1) - centre[:, :, None, None]) / radius).square().sum(-1) < 1
    return Targets(boxes, labels, counts, centre + torch.tensor([1.5, -2.5]), ellipse.to(torch.uint8))


def streams() -> Numbers:
    """Where these differ NumPy draws other numbers for a seed, and everything else must differ too."""
    rng = np.random.default_rng([1, 2])
    return {
        "seed": np.array([rng.random(), rng.normal(), rng.exponential(), rng.uniform(-3, 3)]),
        "integers": np.concatenate([rng.integers(2**62, size=3), rng.permutation(9), [rng.poisson(2)]]),
    }


@torch.no_grad()
def network(size: str, task: str) -> Numbers:
    """What the convolutions give in eval mode, level by level."""
    output = drawn_model(size, task)(picture("network", SIDE, 2 * SIDE)[None])
    fields = {
        name: torch.cat([level.flatten() for level in levels]) if isinstance(levels, tuple) else levels
        for name, levels in output._asdict().items()
    }
    if "kernels" in fields:  # 169 channels
        fields["kernels"] = fields["kernels"][::23]
    return {name: value.numpy() for name, value in fields.items()}


def gradients(size: str, task: str) -> Numbers:
    """Losses of a step in training mode; norms of the gradient by parts of the model, some gradients in full; BN."""
    model = copy.deepcopy(drawn_model(size, task)).train()
    losses = model(torch.stack([picture("first"), picture("second")]), targets(task))
    sum(losses.values()).backward()
    found = {name: value.detach().numpy() for name, value in losses.items()}
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        parts.setdefault(".".join(name.split(".")[:2]), []).append(parameter.grad.flatten())
    found["norms"] = np.array([torch.cat(part).double().norm().item() for part in parts.values()])
    for name in ("backbone.stem.0.conv.weight", "backbone.stem.0.bn.weight", "neck.reduce_layers.0.bn.bias"):
        found[name] = model.get_parameter(name).grad.numpy()
    for kind, predictor in model.bbox_head.named_children():
        if kind.startswith("rtm_"):
            found[f"{kind}.bias"] = torch.stack([level.bias.grad for level in predictor]).numpy()
    norm = model.backbone.stem[0].bn
    return found | {"running_mean": norm.running_mean.numpy(), "running_var": norm.running_var.numpy()}


def predictions(size: str, task: str) -> Numbers:
    """Detections of a picture as it is, of one that is resized, and (rotated boxes) of one cut into windows."""
    model = drawn_model(size, task)
    found: Numbers = {}
    for name, height, width, options in (
        ("whole", SIDE, 3 * SIDE // 2, {}),
        ("resized", 2 * SIDE, 5 * SIDE // 2, {}),
        ("tiled", 2 * SIDE, 3 * SIDE, {"patch_size": 3 * SIDE // 2}),
    ):
        if "patch_size" in options and task == "ins":
            continue
        pixels = (picture(name, height, width) * 57 + 114).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        result = model.predict(pixels, image_size=3 * SIDE // 2, score_threshold=0.15, max_detections=30, **options)
        found |= {f"{name} {key}": getattr(result, key).numpy() for key in ("boxes", "scores", "labels")}
        if task == "ins":
            found[f"{name} masks"] = np.packbits(result.masks.numpy(), axis=-1)
    return found


def boxes_of(name: str, count: int, *, rotated: bool = False) -> Tensor:
    """[count, 4 or 5] in the pixels of a picture, of all sizes."""
    centre = uniform((count, 2), f"{name} centres", 0, SIDE)
    sides = 2 ** uniform((count, 2), f"{name} sides", 2, 5.5)
    if rotated:
        return torch.cat((centre, sides, uniform((count, 1), f"{name} angles", -math.pi, math.pi)), 1)
    return torch.cat((centre - sides / 2, centre + sides / 2), 1)


def assignments() -> Numbers:
    """Who is assigned to whom, by each of the assigners, and by mask centres."""
    y, x, stride = (
        torch.cat([values.flatten() for values in part])
        for part in zip(*(_grid(stride) for stride in (8, 16, 32)), strict=True)
    )
    priors = torch.stack((x, y, stride, stride), 1)
    found: Numbers = {}
    for rotated in (False, True):
        kind = "rotated" if rotated else "boxes"
        truth = torch.stack([boxes_of(f"assign {kind} truth {i}", 6, rotated=rotated) for i in range(2)])
        # each prior says a ground truth's box, moved by a quarter of a side at most
        own = torch.from_numpy(np.random.default_rng(3).integers(6, size=(2, len(priors))))
        boxes = truth.gather(1, own[..., None].expand(-1, -1, truth.shape[-1]))
        shift = (boxes[..., 2:4] if rotated else boxes[..., 2:] - boxes[..., :2]) / 4
        boxes[..., :2] += shift * uniform(shift.shape, f"assign {kind} shift")
        logits = uniform((2, len(priors), 4), f"assign {kind} logits", -4, 2)
        labels, counts = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 3, 2, 1, 0, 0]]), torch.tensor([6, 4])
        rest = (priors, truth, labels, counts)
        found |= _named(f"{kind} soft label", ops.dynamic_soft_label_assign(boxes, logits, *rest))
        if not rotated:
            centres = (truth[..., :2] + truth[..., 2:]) / 2 + uniform((2, 6, 2), "assign mask centres", -6, 6)
            found |= _named("masks soft label", ops.dynamic_soft_label_assign(boxes, logits, *rest, centres))
            found |= _named("boxes simota", ops.simota_assign(boxes, logits.sigmoid(), *rest))
            found |= _named("boxes task aligned", ops.task_aligned_assign(boxes, logits.sigmoid(), *rest))
    return found


def _grid(stride: int) -> tuple[Tensor, Tensor, Tensor]:
    y, x = torch.meshgrid(*[torch.arange(0.0, SIDE, stride)] * 2, indexing="ij")
    return y, x, torch.full_like(x, stride)


def _named(name: str, assigned: tuple[Tensor, ...]) -> Numbers:
    fields = zip(("indices", "iou", "labels", "metric"), assigned, strict=False)
    return {f"{name} {field}": value.numpy() for field, value in fields}


def suppression() -> Numbers:
    """What NMS keeps, in order."""
    scores, labels = uniform((200,), "nms scores", 0, 1), torch.arange(200) % 3
    boxes, turned = (boxes_of("nms", 200, rotated=rotated) for rotated in (False, True))
    padded = [torch.stack((x, x.flip(0))) for x in (boxes, scores, labels)]
    keep, counts = ops.batched_nms_padded(*padded, 0.2, 100)
    found = {
        "nms": ops.nms(boxes, scores, 0.3)[1],
        "batched nms": ops.batched_nms(boxes, scores, labels, {"type": "nms", "iou_threshold": 0.1})[1],
        "padded": keep,
        "padded counts": counts,
        "rotated": ops.nms_rotated(turned, scores, 0.2)[1],
        "rotated by label": ops.nms_rotated(turned, scores, 0.1, labels)[1],
    }
    return {name: value.numpy() for name, value in found.items()}


def rotated_iou() -> Numbers:
    one, two = (boxes_of(f"iou {name}", 24, rotated=True) for name in ("one", "two"))
    two[:12, :2] = one[:12, :2] + uniform((12, 2), "iou near", -3, 3)
    found = {"pairs": ops.box_iou_rotated(one, two), "over first": ops.box_iou_rotated(one, two, "iof")}
    one, two = (boxes[:12].requires_grad_() for boxes in (one, two))
    for mode in ("linear", "square", "log"):
        found[mode] = ops.rotated_iou_loss(one, two, mode, "none")
        found[f"{mode} by first"], found[f"{mode} by second"] = torch.autograd.grad(found[mode].sum(), (one, two))
    return {name: value.detach().numpy() for name, value in found.items()}


def scenes() -> Numbers:
    """What is drawn, in means of 8 x 8 pixels and annotations."""
    found: Numbers = {}
    for i in range(4):
        image, objects = draw_scene(np.random.default_rng(i), SCENE)
        found[f"{i} means"] = _means(torch.from_numpy(image).permute(2, 0, 1)).numpy()
        found[f"{i} labels"] = np.array([o["category_id"] for o in objects])
        found[f"{i} pixels"] = np.array([[*o["bbox"], o["area"]] for o in objects])
        found[f"{i} rotated"] = np.array([o["rbox"] for o in objects])
    return found


def _means(images: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(images.float(), 8)


def training(task: str) -> Numbers:
    """Thirty steps of the trainer on drawn scenes, with all of its augmentation: each loss of each step."""
    batches: list[tuple[Tensor, Targets]] = []
    losses: list[list[float]] = []
    forward = RTMDet.forward

    def recorded(self: RTMDet, images: Tensor, truth: Targets | None = None) -> Any:
        output = forward(self, images, truth)
        if truth is not None:
            batches.append((images, truth))
            losses.append([value.item() for value in output.values()])
        return output

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(RTMDet, "forward", recorded):
        config = write_scenes(Path(folder), task)
        train(config)
        state = torch.load(config.out / "last.pth", weights_only=True)["training"]
        with (config.out / "metrics.csv").open() as file:
            rates = [float(row["lr"]) for row in csv.DictReader(file) if row["lr"]]
    groups = state["optimizer"]["param_groups"]
    found = {
        "losses": np.array(losses),
        "rates": np.array(rates),
        "optimizer": np.array([[g["lr"], g["weight_decay"], *g["betas"], g["eps"], len(g["params"])] for g in groups]),
    }
    for step in (0, STEPS - 1):  # with mosaic and mixup, and without
        images, truth = batches[step]
        found |= {
            f"step {step} means": _means(images).numpy(),
            f"step {step} boxes": truth.boxes.numpy(),
            f"step {step} labels": truth.labels.numpy(),
        }
        if truth.masks is not None and truth.centers is not None:
            found |= {
                f"step {step} centres": truth.centers.numpy(),
                f"step {step} masks": truth.masks.sum((2, 3)).numpy(),
            }
    for name in ("model", "ema"):
        weights = (value.double().norm().item() for key, value in state[name].items() if key.endswith(".conv.weight"))
        found[f"{name} norms"] = np.array(list(weights))[::4]
    return found


def write_scenes(folder: Path, task: str) -> TrainConfig:
    """Drawn scenes as PNG with their annotations, weights to start from, and the run to be made of them."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    rng = np.random.default_rng(7)
    while len(images) < 4 * STEPS // 3:
        scene, objects = draw_scene(rng, SCENE)
        if not objects:  # which training leaves out
            continue
        name = f"{len(images)}.png"
        cv2.imwrite(str(folder / name), scene)
        images.append({"id": len(images), "file_name": name, "width": SCENE, "height": SCENE})
        for o in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": images[-1]["id"], "iscrowd": 0, **o})
    categories = [{"id": c + 1, "name": name} for c, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "train.json").write_text(json.dumps(content))
    drawn_model("tiny", task).save(folder / "init.pth")
    return TrainConfig(
        train=folder / "train.json",
        train_images=folder,
        out=folder / "run",
        size="tiny",
        task=task,
        init=str(folder / "init.pth"),
        epochs=3,
        stage2_epochs=1,
        batch_size=4,
        image_size=SIDE,
        lr=None if task == "rotated" else 5e-4,  # that of none given hangs on the length of the run, as does
        ema_momentum=2e-4,
        num_workers=0,
        device="cpu",
        progress=False,
        report=False,
    )


def sections() -> Iterator[tuple[str, Callable[[], Numbers]]]:
    yield "streams", streams
    for size, task in MODELS:
        for function in (network, gradients, predictions):
            yield f"{function.__name__} {task} {size}", partial(function, size, task)
    yield from {"assignments": assignments, "nms": suppression, "rotated iou": rotated_iou, "scenes": scenes}.items()
    for task in ("det", "ins", "rotated"):
        yield f"training {task}", partial(training, task)


def deviation(found: np.ndarray, expected: np.ndarray, *, each: bool = False) -> float:
    """The greatest difference, as a share of the greatest value expected, or of `each` value; inf for other shapes."""
    if found.shape != expected.shape:
        return math.inf
    if not expected.size:
        return 0.0
    difference, scale = abs(found.astype(float) - expected.astype(float)), abs(expected.astype(float))
    scale = np.maximum(scale if each else scale.max(), 1e-12)
    return float((difference / scale).max())


def main() -> None:
    found = {f"{name}/{key}": value for name, section in sections() for key, value in section().items()}
    old = dict(np.load(FILE)) if FILE.exists() else {}
    old.pop("opencv", None)
    for key in found.keys() | old.keys():
        if key not in found or key not in old:
            print(f"{key}: {'new' if key in found else 'gone'}")
        elif drift := deviation(found[key], old[key]):
            print(f"{key}: {drift:.1e}")
    np.savez_compressed(FILE, opencv=cv2.__version__, **found)
    print(f"{len(found)} entries, {FILE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
