"""A training step (normalisation, forward, loss, backward, AdamW, weight averaging), alone and with its data."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benches.harness import Absent, Case, Contender, relative_error
from benches.models import (
    EMA_MOMENTUM,
    LEARNING_RATE,
    WEIGHT_DECAY,
    drawn,
    forever,
    gradients,
    mmdet_model,
    objects,
    ours,
    pictures,
    plain,
    resized,
)
from rtmdet_fast import accelerate
from rtmdet_fast.inference.preprocess import normalize
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.training.schedule import ModelEMA, ema_share, parameter_groups

CLASSES, DRAWN_CLASSES = 80, 5
# Of the losses, and of all gradients together: rounding may turn a match. Through some sixty layers of random weights
# bfloat16 leaves little of a gradient (a cosine of 0.5 between eager's and float64's): where a step is timed under
# autocast, the losses are its own and the gradients those of the same step in float32.
TOLERANCE = {torch.float32: (1e-3, 5e-2), torch.bfloat16: (5e-2, 5e-2)}


def cases(device: torch.device) -> list[Case]:
    if device.type == "cpu":
        return [
            _step(device, "tiny", 8, 256, 20),
            _step(device, "s", 8, 256, 20),
            _step(device, "tiny", 8, 256, 200),
            _iteration(device, "tiny", 8, 256),
        ]
    return [
        _step(device, "tiny", 32, 640, 20, torch.bfloat16),
        _step(device, "s", 32, 640, 20, torch.bfloat16),
        _step(device, "l", 16, 640, 20, torch.bfloat16, headline=False),
        _step(device, "tiny", 32, 640, 200, torch.bfloat16, headline=False, compiled=True),
    ]


def _step(
    device: torch.device,
    size: str,
    batch: int,
    side: int,
    count: int,
    dtype: torch.dtype = torch.float32,
    headline: bool = True,
    compiled: bool = False,
) -> Case:
    """`dtype` bfloat16: under autocast. `compiled`: beside torch.compile, too, which takes minutes of a GPU's time."""
    cuda = device.type == "cuda"

    def inputs(seed: int) -> tuple[Tensor, ...]:
        return pictures(batch, side, device, seed), *objects(batch, count, CLASSES, side, device, seed)[:3]

    def built(make: Callable[..., Any], **options: Any) -> Any:
        step = make(size, CLASSES, device, dtype, **options)
        if dtype != torch.float32 and not options.get("compiled"):
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
                exact = make(size, CLASSES, device, torch.float32, **options)
                step.exact = checked(exact(*inputs(0)))[1]
        return step

    own, theirs = partial(built, Step), partial(built, TheirStep, side=side)

    def torch_compile() -> Step:
        if not compiled:
            raise Absent("measured in one case on a GPU only: compiling takes its time")
        torch.compiler.reset()
        return own(backend=plain, compiled=True)

    contenders = [Contender(name="triton" if cuda else "reference", build=own, result=checked)]
    if cuda:
        one_graph = partial(RecordedStep, size, CLASSES, device, dtype)
        contenders.append(Contender(name="triton, one CUDA graph", build=one_graph, result=checked))
        contenders.append(Contender(name="eager", build=partial(own, backend=plain), result=checked))
    contenders += [
        Contender(
            name="eager, assigning per image",
            build=partial(own, backend=partial(plain, per_image=True)),
            result=checked,
        ),
        Contender(name="torch.compile", build=torch_compile, result=checked),
        Contender(name="mmdet", build=theirs, result=checked),
    ]
    if cuda:
        contenders.append(
            Contender(
                name="mmdet, accelerated",
                build=partial(theirs, accelerated=True),
                result=checked,
            )
        )
    return Case(
        op="training",
        name=f"step: RTMDet-{size}, {batch} x 3 x {side} x {side}, {count} ground truths each, "
        + ("autocast to bfloat16" if dtype == torch.bfloat16 else "float32"),
        shapes={"images": [batch, 3, side, side], "gt_boxes": [batch, count, 4]},
        inputs=inputs,
        expected=lambda *inputs: checked(Step(size, CLASSES, device, torch.float64)(*inputs)),
        compare=lambda result, expected: compare(result, expected, TOLERANCE[dtype]),
        contenders=contenders,
        least=15 if count < 100 else 5,
        headline=headline,
    )


def _iteration(device: torch.device, size: str, batch: int, side: int) -> Case:
    """With loading and augmentation in the same process; each contender draws its own batches."""

    def compare_own(result: Any, _: Any) -> str:
        inputs, found = result
        expected = checked(Step(size, DRAWN_CLASSES, device, torch.float64)(*inputs))
        return compare(found, expected, TOLERANCE[torch.float32]) + " on its own batch"

    def own() -> Callable[[], Any]:
        step, batches = Step(size, DRAWN_CLASSES, device, torch.float32), iter(our_batches(size, batch, side))

        def run() -> Any:
            data = next(batches)
            return step, data, step(*data)

        return run

    def mmdet() -> Callable[[], Any]:
        step = TheirStep(size, DRAWN_CLASSES, device, torch.float32, side=side)
        batches = iter(their_batches(step.config, batch, side))

        def run() -> Any:
            data = next(batches)
            return step, data, step.step(data)

        return run

    return Case(
        op="training",
        name=f"iteration with its data (drawn shapes): RTMDet-{size}, {batch} x 3 x {side} x {side}, float32",
        shapes={"images": [batch, 3, side, side]},
        inputs=lambda seed: (),
        expected=lambda: None,
        compare=compare_own,
        least=40,  # batches differ in their work
        contenders=[
            Contender(name="reference", build=own, result=lambda out: (out[1], checked(out[2]))),
            Contender(name="mmdet", build=mmdet, result=lambda out: (out[0].tensors(out[1]), checked(out[2]))),
        ],
    )


class Step:
    """One training step of ours as `train.py` does it; gradients stay until the next."""

    exact: Tensor | None = None
    """Gradients of the first step in float32, where it is not in float32 itself."""

    def __init__(
        self,
        size: str,
        classes: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        backend: Callable[..., Any] = lambda function: function,
        compiled: bool = False,
    ):
        self.model = ours(size, classes, device, torch.float64 if dtype == torch.float64 else torch.float32).train()
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, WEIGHT_DECAY), lr=LEARNING_RATE, fused=True)
        self.ema = ModelEMA(self.model, lambda step: ema_share(step, EMA_MOMENTUM))
        self.loss = backend(torch.compile(self.model, dynamic=False) if compiled else self.model)
        self.device, self.dtype = device, dtype

    def __call__(self, images: Tensor, *targets: Tensor) -> tuple[Any, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        x = normalize(images.contiguous(memory_format=torch.channels_last))
        if self.dtype == torch.float64:
            x, targets = x.double(), (targets[0].double(), *targets[1:])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            losses = self.loss(x, Targets(*targets))
        sum(losses.values()).backward()
        self.optimizer.step()
        self.ema.update()
        return self, torch.stack([loss.detach() for loss in losses.values()])


class RecordedStep(Step):
    """The same as one CUDA graph, from the fourth step on; no gradients are left of it."""

    def __init__(self, size: str, classes: int, device: torch.device, dtype: torch.dtype):
        from rtmdet_fast.training.step import GraphStep  # which asks for OpenCV

        super().__init__(size, classes, device, dtype)
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        amp = dtype if dtype == torch.bfloat16 else None
        self.step = GraphStep(self.model, self.optimizer, scaler, self.ema, amp=amp)

    def __call__(self, images: Tensor, *targets: Tensor) -> tuple[Any, Tensor]:
        from rtmdet_fast.data.augment import Batch

        losses, _ = self.step.backward(Batch(images.contiguous(memory_format=torch.channels_last), *targets))
        self.step.update()
        return self, torch.stack([*losses.values()])


class TheirStep:
    """One of mmdet's, with its data preprocessor, optimiser wrapper and averaging; gradients stay until the next."""

    exact: Tensor | None = None

    def __init__(
        self,
        size: str,
        classes: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        side: int,
        accelerated: bool = False,
    ):
        self.model, self.config = mmdet_model(size, classes, device, image_size=side)
        from mmdet.models.layers import ExpMomentumEMA  # type: ignore[import-not-found]
        from mmengine.optim import build_optim_wrapper  # type: ignore[import-not-found]

        self.model.train()
        if accelerated:
            accelerate(self.model)
        self.dtype = dtype
        settings = copy.deepcopy(self.config.optim_wrapper)
        settings["optimizer"].update(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        if dtype != torch.float32:
            settings.update(type="AmpOptimWrapper", dtype="bfloat16")
        self.wrapper = build_optim_wrapper(self.model, settings)
        self.zero = self.wrapper.zero_grad
        self.wrapper.zero_grad = lambda **_: None  # done before the next step instead: gradients are looked at
        self.ema = ExpMomentumEMA(self.model, momentum=EMA_MOMENTUM, update_buffers=True)

    def __call__(self, images: Tensor, boxes: Tensor, labels: Tensor, counts: Tensor) -> tuple[Any, Tensor]:
        from mmdet.structures import DetDataSample  # type: ignore[import-not-found]
        from mmengine.structures import InstanceData  # type: ignore[import-not-found]

        side = images.shape[2]
        samples = []
        for box, label in zip(boxes, labels, strict=True):
            sample = DetDataSample(metainfo=dict(img_shape=(side, side), pad_shape=(side, side)))
            sample.gt_instances = InstanceData(bboxes=box, labels=label)
            samples.append(sample)
        return self.step(dict(inputs=list(images), data_samples=samples))

    def step(self, data: dict[str, Any]) -> tuple[Any, Tensor]:
        self.zero()
        log: Any = self.model.train_step(data, self.wrapper)  # type: ignore[operator]
        self.ema.update_parameters(self.model)
        return self, torch.stack([log["loss_cls"].detach(), log["loss_bbox"].detach()])

    def tensors(self, data: dict[str, Any]) -> tuple[Tensor, ...]:
        """Images and padded ground truths of one of its batches."""
        found = [sample.gt_instances for sample in data["data_samples"]]
        boxes = [getattr(instances.bboxes, "tensor", instances.bboxes) for instances in found]
        pad = torch.nn.utils.rnn.pad_sequence
        counts = torch.tensor([len(box) for box in boxes])
        labels = pad([instances.labels for instances in found], batch_first=True, padding_value=-1)
        return torch.stack(data["inputs"]), pad(boxes, batch_first=True), labels, counts


def checked(output: tuple[Any, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Losses and all gradients of a step; None for the gradients of a step under autocast that has no exact ones."""
    step, losses = output
    if step.dtype == torch.bfloat16:
        return losses, step.exact
    return losses, gradients(step.model)


def compare(result: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Any], tolerance: tuple[float, float]) -> str:
    losses = relative_error(result[:1], expected[:1], tolerance[0])
    if result[1] is None:
        return f"losses: {losses}, gradients not compared"
    return f"losses: {losses}, gradients: {relative_error([result[1]], [expected[1]], tolerance[1])}"


def our_batches(size: str, batch: int, side: int) -> Iterator[tuple[Tensor, ...]]:
    paths = drawn(200, side)
    from rtmdet_fast.data.augment import Augmenter, collate
    from rtmdet_fast.data.coco import CocoDataset
    from rtmdet_fast.data.plan import PlanSampler
    from rtmdet_fast.data.recipes import recipe_for

    data, recipe = CocoDataset(paths.train_ann, paths.train_images, training=True), recipe_for(size, side)
    sampler = PlanSampler(len(data), batch, recipe, 0, 0)
    loader = torch.utils.data.DataLoader(Augmenter(data, recipe), batch_sampler=sampler, collate_fn=collate)
    for found in forever(loader):
        yield found.images, found.gt_boxes, found.gt_labels, found.gt_counts


def their_batches(config: Any, batch: int, side: int) -> Iterator[dict[str, Any]]:
    from mmengine.runner import Runner  # type: ignore[import-not-found]

    paths = drawn(200, side)
    random.seed(0)
    np.random.seed(0)
    from rtmdet_fast.data.shapes import CLASSES as NAMES

    loader = Runner.build_dataloader(
        dict(
            batch_size=batch,
            num_workers=0,
            sampler=dict(type="DefaultSampler", shuffle=True),
            drop_last=True,
            collate_fn=dict(type="pseudo_collate"),
            dataset=dict(
                type="CocoDataset",
                ann_file=str(paths.train_ann),
                data_prefix=dict(img=str(paths.train_images)),
                metainfo=dict(classes=NAMES),
                filter_cfg=dict(filter_empty_gt=True, min_size=8),
                pipeline=resized([dict(step) for step in config.train_pipeline], side),
            ),
        ),
        seed=0,
    )
    yield from forever(loader)
