"""A step on tensors that stay where they are, which on a GPU is one CUDA graph, against the plain one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rtmdet_fast import RTDETR, RTMDet
from rtmdet_fast.data.augment import Batch
from rtmdet_fast.errors import UserError
from rtmdet_fast.kernels._dispatch import AVAILABLE
from rtmdet_fast.models.rtmdet.model import HEADS
from rtmdet_fast.training import step as step_module
from rtmdet_fast.training import train as train_module
from rtmdet_fast.training.config import resolve
from rtmdet_fast.training.schedule import ModelEMA, parameter_groups
from rtmdet_fast.training.step import GraphStep, Step, is_graph
from rtmdet_fast.training.train import train


def made(kind: type[Step], task: str, device: str = "cpu") -> Step:
    torch.manual_seed(0)
    model = RTMDet("nano", task, num_classes=3)
    for predictor in model.bbox_head.rtm_reg:
        nn.init.ones_(predictor.bias)  # boxes that are not empty
    model.to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-3, fused=True)
    ema = ModelEMA(model, lambda step: 1.0 if step == 0 else 0.1)
    return kind(model, optimizer, torch.amp.GradScaler(device, enabled=False), ema)


def drawn(task: str, objects: tuple[int, ...], seed: int, side: int = 64) -> Batch:
    """Images with as many objects each, in front of a light or a dark ground by turns."""
    rng = np.random.default_rng(seed)
    count, most = len(objects), max(*objects, 1)
    dark = 100 * (seed % 2)
    images = torch.from_numpy(rng.integers(dark, dark + 100, (count, side, side, 3), np.uint8)).permute(0, 3, 1, 2)
    start = torch.from_numpy(rng.uniform(0, side - 30, (count, most, 2)).astype(np.float32))
    size = torch.from_numpy(rng.uniform(8, 30, (count, most, 2)).astype(np.float32))
    boxes = torch.cat((start, start + size), -1)
    if task == "rotated":
        boxes = torch.cat((start + 15, size, start[..., :1] / 20), -1)
    labels = torch.from_numpy(rng.integers(0, 3, (count, most)))
    more = ()
    if task == "ins":
        at = torch.arange(side // 4) * 4 + 2
        inside = (at >= start[..., None]) & (at < (start + size)[..., None])
        more = (start + size / 2, (inside[:, :, 1, :, None] & inside[:, :, 0, None]).to(torch.uint8))
    return Batch(images, boxes, labels, torch.tensor(objects), *more)


def batches(task: str, count: int) -> list[Batch]:
    """Of few objects, many and none, twice in ten of more than there are places for; the last with smaller images."""
    objects = [(2, 1), (3, 9), (1, 4), (0, 2), (0, 0), (15, 12), (4, 4), (25, 1), (2, 2), (1, 1)]
    return [drawn(task, objects[i % 10], i, 64 if i < count - 2 else 32) for i in range(count)]


def taken(step: Step, batches: list[Batch]) -> list[dict[str, torch.Tensor]]:
    losses = []
    for i, batch in enumerate(batches):
        step.set_rate(1e-3 / (1 + i))
        found, loss = step.backward(step.take(batch, batch.images.shape[2]))
        step.update()
        losses.append({**found, "loss": loss})
    return losses


@pytest.mark.parametrize("count", [10, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", HEADS)
def test_it_is_the_plain_step_to_the_bit(task, count, monkeypatch):
    monkeypatch.setattr(step_module, "SIZES", (4, 16))
    plain, fixed = made(Step, task), made(GraphStep, task)
    expected, losses = (taken(step, batches(task, count)) for step in (plain, fixed))
    assert fixed.eager == 2 * count // 10 and [(key[2], key[-1]) for key in fixed._places] == [
        (64, 4),
        (64, 16),
        (32, 4),
    ]
    for found, truth in zip(losses, expected, strict=True):
        assert list(found) == list(truth)
        for name, value in truth.items():  # sums of more zeros, in another order
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
    for one, other in zip(fixed.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(fixed.optimizer.state.values(), plain.optimizer.state.values(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert fixed.ema.step == plain.ema.step == count
    for one, other in zip(fixed.ema.model.state_dict().values(), plain.ema.model.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_what_is_handed_out_stays_as_it_was():
    step = made(GraphStep, "det")
    first, second = (drawn("det", (2, 2), seed) for seed in (0, 1))
    (losses, loss), _ = (step.backward(step.take(batch, 64)) for batch in (first, first))
    kept = {name: value.clone() for name, value in losses.items()}, loss.clone()
    step.backward(step.take(second, 64))
    assert all(torch.equal(losses[name], kept[0][name]) for name in losses) and torch.equal(loss, kept[1])


def test_no_more_sizes_than_there_is_memory_for(monkeypatch):
    monkeypatch.setattr(step_module, "MAX_GRAPHS", 1)
    step = made(GraphStep, "det")
    taken(step, [drawn("det", (1, 1), 0), drawn("det", (9, 1), 1), drawn("det", (1, 2), 2)])
    assert len(step._places) == 1 and step.eager == 1


@pytest.mark.skipif(not AVAILABLE, reason="without Triton no kernel is chosen")
@pytest.mark.parametrize(
    "task",
    [
        "ins",
        *(
            pytest.param(task, marks=pytest.mark.slow)
            for task in ("det", "rotated", "det:simota", "det:task_aligned", "ins:atss")
        ),
    ],
)
def test_nothing_of_a_step_makes_the_host_wait_or_has_a_size_by_the_values(task):
    script = Path(__file__).parents[1] / "fake_gpu.py"
    environment = {**os.environ, "RTMDET_FAST_KERNELS": "torch"}
    done = subprocess.run(
        [sys.executable, script, "step", task], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.stdout.strip() == "fine", done.stderr


def test_which_runs_it_is_for(config, monkeypatch):
    settings = resolve(replace(config, graph="auto"))
    detector, detr = RTMDet("nano", num_classes=1), RTDETR("r18", num_classes=1, num_decoder_layers=1)
    assert not is_graph(settings, detector)  # on a CPU
    monkeypatch.setattr(step_module, "GRAPHED", {"cpu"})
    assert is_graph(settings, detector)
    assert not is_graph(resolve(config), detector)  # unless asked for
    assert not is_graph(settings, detr)  # whose matching is the host's
    for change in (dict(graph="off"), dict(accumulate=2), dict(compile=True)):
        assert not is_graph(replace(settings, **change), detector)
    with pytest.raises(UserError, match="--graph 'on' is unknown; choose auto or off"):
        resolve(replace(config, graph="on"))


def test_a_run_is_the_plain_one_and_goes_on_as_either(config, monkeypatch, tmp_path):
    config = replace(config, epochs=2, stage2_epochs=0, val=None, val_images=None, graph="auto")
    steps = []

    class Noted(GraphStep):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            steps.append(self)

    monkeypatch.setattr(train_module, "GraphStep", Noted)
    train(replace(config, out=tmp_path / "plain"))
    assert not steps
    monkeypatch.setattr(step_module, "GRAPHED", {"cpu"})

    class Enough(train_module.Callback):
        def on_epoch(self, progress):
            progress.stop()

    train(config, callbacks=[Enough()])
    train(replace(config, resume=True))
    assert len(steps) == 2 and all(step._places and not step.eager for step in steps)
    expected, found = (
        torch.load(folder / "last.pth", weights_only=True)["training"] for folder in (tmp_path / "plain", config.out)
    )
    assert found["iteration"] == expected["iteration"] > 5
    for part in ("model", "ema"):
        for name, value in expected[part].items():
            torch.testing.assert_close(found[part][name], value, rtol=1e-6, atol=1e-6 * (part == "ema"))
    train(replace(config, graph="off", epochs=2, resume=True))


@pytest.mark.parametrize(("processes", "before"), [(1, [3, 6]), (2, [11])])
def test_when_a_step_is_recorded(processes, before, monkeypatch):
    """At a size's fourth step, and of several processes once they have taken eleven of any size."""
    monkeypatch.setattr(step_module, "process_count", lambda: processes)
    step, at = made(GraphStep, "det"), []

    def record(places):
        at.append(step._taken)
        places.graph = type("Graph", (), {"replay": lambda self: None})()

    step._recording = True
    monkeypatch.setattr(step, "_record", record)
    for objects in [1] * 4 + [9] * 4 + [2] * 5:
        step.backward(step.take(drawn("det", (objects, 1), 0), 64))
    assert at == before


def test_a_nan_stops_a_run(config, monkeypatch):
    monkeypatch.setattr(step_module, "GRAPHED", {"cpu"})
    normalize = RTMDet.normalize
    calls = iter(range(100))
    monkeypatch.setattr(
        RTMDet, "normalize", staticmethod(lambda x: normalize(x) * (torch.nan if next(calls) == 2 else 1))
    )
    with pytest.raises(UserError, match="the loss is nan near iteration"):
        train(replace(config, graph="auto"))
    batch = torch.load(config.out / "nan_batch.pt", weights_only=True)
    assert len(batch["images"]) == len(batch["files"]) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("task", HEADS)
def test_a_replay_is_the_step_uncaptured(task, amp, monkeypatch):
    """Batches of two sizes by turns, dark and light: a replay is of its own batch, and of the weights as they are."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    captured, uncaptured = (made(GraphStep, task, "cuda") for _ in range(2))
    for step in (captured, uncaptured):
        step.amp, step.scaler = amp, torch.amp.GradScaler("cuda", enabled=amp == torch.float16)
    uncaptured._recording = False
    turns = [drawn(task, ((2, 1), (3, 4))[i // 2 % 2], i) for i in range(24)]
    monkeypatch.setattr(step_module, "SIZES", (4, 16))
    expected, found = (taken(step, turns) for step in (uncaptured, captured))
    places = list(captured._places.values())
    assert captured._recording and len(places) == 2 and all(place.graph is not None for place in places)
    assert len({place.graph.pool() for place in places}) == 1
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        for name, value in other.items():
            torch.testing.assert_close(one[name], value, rtol=1e-3 * (i + 1), atol=1e-6)
    assert len({float(losses["loss"]) for losses in found}) == 24
    for one, other in zip(captured.ema.model.parameters(), captured.model.parameters(), strict=True):
        assert one.isfinite().all() and not torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_that_cannot_be_recorded_goes_on_without(monkeypatch):
    step = made(GraphStep, "det", "cuda")
    move = ModelEMA.move
    monkeypatch.setattr(ModelEMA, "move", lambda ema, share: (move(ema, share), share.item()))
    with pytest.warns(UserWarning, match="could not be recorded"):
        losses = taken(step, [drawn("det", (1, 1), i) for i in range(6)])
    assert not step._recording and all(value.isfinite() for value in losses[-1].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_that_takes_most_of_the_memory_is_not_recorded(monkeypatch):
    step = made(GraphStep, "det", "cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 10**9))
    with pytest.warns(UserWarning, match="could not be recorded.*0.0 GB of memory"):
        taken(step, [drawn("det", (1, 1), i) for i in range(6)])
    assert not step._recording
