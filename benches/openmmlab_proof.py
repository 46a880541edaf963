"""mmdet's own Runner and config with and without `rtmdet_fast.compat.mmdet`: same losses, same AP, less time.

    python -m benches.openmmlab_proof losses|rotated|train|crowded|checkpoint --data ../shared/data

`losses`, `rotated`: the losses of the first 20 iterations of RTMDet-tiny on bccd, of rotated RTMDet-tiny on hit_uav.
`train`: AP after `--epochs` epochs on bccd, by the settings of bccd_reference.json, from `--weights` if given.
`crowded`: seconds per iteration on drawn scenes of `--ground-truths` boxes, patch on and off by turns in one process.
`checkpoint`: AP of `--weights` on bccd by mmdet and by this project.
Each prints one line of JSON. Data are loaded in the main process.
"""

from __future__ import annotations

import rtmdet_fast.compat.mmcv_ext  # noqa: F401 (has to stand before mmdet)

# isort: split
import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mmdet
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.runner import Runner

from rtmdet_fast.compat import mmdet as compat

BCCD_CLASSES = ("WBC", "RBC", "Platelets")
HIT_UAV_CLASSES = ("Person", "Car", "Bicycle", "OtherVehicle")


class Enough(Exception):
    """Ends a run after the iterations asked for."""


class Record(Hook):
    """Losses and seconds of each iteration; `turns` switches the patch every so many of them."""

    def __init__(self, iterations: int | None = None, turns: int | None = None):
        self.iterations, self.turns = iterations, turns
        self.losses: list[dict[str, float]] = []
        self.seconds: list[float] = []
        self.metrics: dict[str, float] = {}

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.turns:
            (compat.patch if len(self.seconds) // self.turns % 2 else compat.unpatch)()
        self.start = time.perf_counter()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.losses.append({name: float(value) for name, value in outputs.items() if "loss" in name})
        if len(self.losses) == self.iterations:
            raise Enough

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.metrics = dict(metrics or {})


def run(config: Config, hook: Record, patch: bool) -> Record:
    """Trains under the hook, with the patch or without."""
    config = Config(config._cfg_dict.to_dict())  # the Runner changes what it is given
    config.experiment_name = f"proof_{time.monotonic_ns()}"
    runner = Runner.from_cfg(config)
    runner.register_hook(hook, priority="VERY_LOW")
    with compat.patched() if patch else nullcontext():
        try:
            runner.train()
        except Enough:
            pass
        finally:
            if hook.turns:
                compat.unpatch()
    return hook


def first_losses(config: Config, iterations: int = 20) -> list[tuple[dict[str, float], dict[str, float]]]:
    """The losses of every iteration, without the patch and with it."""
    off, on = (run(config, Record(iterations), patch).losses for patch in (False, True))
    return list(zip(off, on, strict=True))


def difference(losses: list[tuple[dict[str, float], dict[str, float]]]) -> float:
    """The largest relative difference, at a scale of at least 1."""
    return max(abs(off[name] - on[name]) / max(abs(off[name]), 1) for off, on in losses for name in off)


def bccd(data: Path, out: Path, *, size: int = 256, batch_size: int = 8, epochs: int = 48, seed: int = 0) -> Config:
    """mmdet's RTMDet-tiny config with the settings of bccd_reference.json; a sixth of the epochs is stage 2."""
    config = _base(mmdet, "rtmdet/rtmdet_tiny_8xb32-300e_coco.py", out, epochs, seed)
    config.merge_from_dict({"model.bbox_head.num_classes": 3})
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.update(
            data_root=str(data) + "/", data_prefix=dict(img="images/"), metainfo=dict(classes=BCCD_CLASSES)
        )
        loader.dataset.ann_file = "train.json" if loader is config.train_dataloader else "val.json"
    config.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True, min_size=8)
    config.train_dataloader.update(batch_size=batch_size, drop_last=True)
    config.val_evaluator.update(ann_file=str(data / "val.json"), format_only=False)
    return _resized(config, 640, size)


def hit_uav(data: Path, out: Path, *, size: int = 384, batch_size: int = 8, epochs: int = 30, seed: int = 0) -> Config:
    """mmrotate's rotated RTMDet-tiny config with the settings of hit_uav_reference.json."""
    import mmrotate
    from mmrotate.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    images = out / "images"  # mmrotate 1.0.0rc1 looks for .png; OpenCV reads what is in it
    images.mkdir(parents=True, exist_ok=True)
    for image in (data / "train/images").iterdir():
        link = images / f"{image.stem}.png"
        if not link.exists():
            link.symlink_to(image)
    config = _base(mmrotate, "rotated_rtmdet/rotated_rtmdet_tiny-3x-dota.py", out, epochs, seed)
    config.merge_from_dict({"model.bbox_head.num_classes": 4})
    config.train_dataloader.update(batch_size=batch_size, drop_last=True)
    config.train_dataloader.dataset.update(
        data_root="",
        ann_file=str(data / "train/labelTxt"),
        data_prefix=dict(img_path=str(images)),
        metainfo=dict(classes=HIT_UAV_CLASSES),
    )
    for part in ("val_dataloader", "val_evaluator", "val_cfg"):
        config[part] = None
    return _resized(config, 1024, size)


def crowd(out: Path, *, size: int, batch_size: int, count: int) -> Config:
    """bccd's config on 16 drawn scenes of `count` boxes of 80 classes, without mosaic, mixup and random sizes."""
    import cv2

    random = np.random.default_rng(0)
    images: list[dict] = []
    annotations: list[dict] = []
    (out / "images").mkdir(parents=True, exist_ok=True)
    for i in range(16):
        picture = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        images.append(dict(id=i, file_name=f"{i}.png", width=size, height=size))
        for width, height in random.integers(8, size // 8, (count, 2)).tolist():
            x, y = random.integers(0, [size - width, size - height]).tolist()
            cv2.rectangle(picture, (x, y), (x + width, y + height), random.integers(0, 256, 3).tolist(), -1)
            box = dict(bbox=[x, y, width, height], area=width * height, category_id=int(random.integers(80)))
            annotations.append(dict(id=len(annotations) + 1, image_id=i, iscrowd=0, **box))
        cv2.imwrite(str(out / "images" / f"{i}.png"), picture)
    categories = [dict(id=i, name=str(i)) for i in range(80)]
    file = dict(images=images, annotations=annotations, categories=categories)
    for name in ("train.json", "val.json"):
        (out / name).write_text(json.dumps(file))
    config = bccd(out, out / "run", size=size, batch_size=batch_size)
    config.merge_from_dict({"model.bbox_head.num_classes": 80})
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.metainfo = dict(classes=tuple(str(i) for i in range(80)))
    keep = ("LoadImageFromFile", "LoadAnnotations", "RandomFlip", "PackDetInputs")
    config.train_dataloader.dataset.pipeline = [
        step for step in config.train_dataloader.dataset.pipeline if step["type"] in keep
    ]
    return config


def _base(package: Any, name: str, out: Path, epochs: int, seed: int) -> Config:
    config = Config.fromfile(Path(package.__file__).parent / ".mim/configs" / name)
    config.work_dir = str(out)
    config.randomness = dict(seed=seed)
    config.model.backbone.init_cfg = None
    for part in (config.model.backbone, config.model.neck, config.model.bbox_head):
        part.norm_cfg = dict(type="BN")
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    for part in ("test_dataloader", "test_evaluator", "test_cfg"):
        config[part] = None
    config.train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=epochs, val_interval=epochs)
    config.optim_wrapper.optimizer.lr = 1e-3
    warmup, cosine = config.param_scheduler
    warmup.end = 100
    cosine.update(begin=epochs // 2, end=epochs, T_max=epochs - epochs // 2, eta_min=5e-5)
    config.default_hooks.update(logger=dict(type="LoggerHook", interval=1000), checkpoint=dict(type="CheckpointHook"))
    config.default_hooks.checkpoint.interval = 10**6
    for hook in config.custom_hooks:
        if hook.type == "EMAHook":
            hook.momentum = 0.0016
        if hook.type == "PipelineSwitchHook":
            hook.switch_epoch = epochs - epochs // 6
    config.visualizer = dict(type="mmdet.DetLocalVisualizer", vis_backends=[], name=f"visualizer_{time.monotonic_ns()}")
    config.log_level = "WARNING"
    return config


def _resized(config: Config, old: int, new: int) -> Config:
    """With every length of `old` and `2 old` pixels in the pipelines made `new` and `2 new`."""

    def change(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(change(item) for item in value)
        if isinstance(value, dict):
            return ConfigDict({key: change(item) for key, item in value.items()})
        return {old: new, 2 * old: 2 * new}.get(value, value) if isinstance(value, int) else value

    config.train_dataloader = change(config.train_dataloader)
    config.custom_hooks = change(config.custom_hooks)
    if config.val_dataloader:
        config.val_dataloader = change(config.val_dataloader)
    return config


def evaluate_with_mmdet(weights: Path, data: Path, out: Path, size: int = 256) -> dict[str, float]:
    """COCO figures of a checkpoint (of ours or mmengine's) by mmdet's test loop."""
    config = bccd(data, out, size=size)
    config.test_dataloader, config.test_evaluator = config.val_dataloader, config.val_evaluator
    config.test_cfg = dict(type="TestLoop")
    config.custom_hooks = []  # the weights in the file are the averaged ones
    config.experiment_name = f"proof_{time.monotonic_ns()}"
    runner = Runner.from_cfg(config)
    state = torch.load(weights, map_location="cpu", weights_only=False)
    missing, unexpected = runner.model.load_state_dict(state["state_dict"], strict=False)
    if missing or set(unexpected) - {"data_preprocessor.mean", "data_preprocessor.std"}:
        raise RuntimeError(f"{weights} does not fit: missing {missing}, unexpected {unexpected}")
    return runner.test()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("losses", "rotated", "train", "crowded", "checkpoint"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with bccd and hit_uav")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patch", choices=("on", "off"), default="on", help="of train")
    parser.add_argument("--ground-truths", type=int, default=200)
    parser.add_argument("--iterations", type=int, default=22, help="of crowded; the first two are left out")
    parser.add_argument("--batch-size", type=int, default=4, help="of crowded")
    parser.add_argument("--size", type=int, default=320, help="side in pixels of the drawn scenes")
    parser.add_argument("--weights", type=Path, help="of checkpoint and train")
    args = parser.parse_args()
    if not args.data.is_dir():
        parser.error(f"{args.data} is not there: pass --data")
    with tempfile.TemporaryDirectory() as out:
        result = COMMANDS[args.what](args, Path(out))
    print(json.dumps({"what": args.what, "threads": torch.get_num_threads(), **result}))


def _losses(args: argparse.Namespace, out: Path) -> dict:
    losses = first_losses(bccd(args.data / "bccd", out, seed=args.seed))
    return {"iterations": len(losses), "difference": difference(losses), "first": losses[0][0], "last": losses[-1]}


def _rotated(args: argparse.Namespace, out: Path) -> dict:
    losses = first_losses(hit_uav(args.data / "hit_uav", out, seed=args.seed))
    return {"iterations": len(losses), "difference": difference(losses), "first": losses[0][0], "last": losses[-1]}


def _train(args: argparse.Namespace, out: Path) -> dict:
    config = bccd(args.data / "bccd", out, epochs=args.epochs, seed=args.seed)
    config.load_from = args.weights and str(args.weights)
    record = run(config, Record(), args.patch == "on")
    seconds = statistics.median(record.seconds)
    return {"patch": args.patch, "epochs": args.epochs, "seed": args.seed, "seconds": seconds, **record.metrics}


def _crowded(args: argparse.Namespace, out: Path) -> dict:
    config = crowd(out, size=args.size, batch_size=args.batch_size, count=args.ground_truths)
    record = run(config, Record(args.iterations, turns=1), False)
    result: dict[str, Any] = {"ground_truths": args.ground_truths, "size": args.size, "batch_size": args.batch_size}
    for name, odd in (("off", 0), ("on", 1)):
        seconds = [t for i, t in enumerate(record.seconds) if i % 2 == odd and i >= 2]
        result[name] = [round(q, 4) for q in statistics.quantiles(seconds, n=4)]  # with the median in the middle
    result["faster"] = round(result["off"][1] / result["on"][1], 2)
    return result


def _checkpoint(args: argparse.Namespace, out: Path) -> dict:
    from rtmdet_fast import RTMDet
    from rtmdet_fast.data.coco import CocoDataset
    from rtmdet_fast.evaluation.evaluate import evaluate

    data = args.data / "bccd"
    theirs = evaluate_with_mmdet(args.weights, data, out)
    ours = evaluate(
        RTMDet.from_pretrained(str(args.weights)), CocoDataset(data / "val.json", data / "images"), image_size=256
    )
    return {"weights": args.weights.name, "mmdet": theirs, "ours": ours.metrics}


COMMANDS: dict[str, Callable[[argparse.Namespace, Path], dict]] = {
    "losses": _losses,
    "rotated": _rotated,
    "train": _train,
    "crowded": _crowded,
    "checkpoint": _checkpoint,
}

if __name__ == "__main__":
    main()
