"""The benches' own cases: the same work for every contender, and results that are judged."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from toy_cases import CPU, absent

from benches import (
    bench_deformable_attention,
    bench_postprocess,
    bench_predict,
    bench_rtdetr,
    bench_training,
    models,
    run,
)
from benches.harness import Absent, Parity


@pytest.mark.parametrize("op", run.OPS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_has_cases_with_names_of_their_own(op: str, device: str):
    cases = importlib.import_module(f"benches.bench_{op}").cases(torch.device(device))
    assert len({case.name for case in cases}) == len(cases) > 0
    assert all(case.op == op for case in cases)
    for case in cases:
        names = [contender.name for contender in case.contenders]
        assert names[0] == (
            "predictor"
            if (device, op) == ("cuda", "predict")
            else "triton"
            if device == "cuda" and op not in ("pipeline", "matcher", "engines")
            else "reference"
        )
        assert len(set(names)) == len(names) > 1


def test_a_training_step_in_plain_pytorch_is_the_same_step():
    """What a GPU machine has as peers; mmdet's is compared where it is installed, by the benches themselves."""
    inputs = (models.pictures(2, 64, CPU, 0), *models.objects(2, 5, 3, 64, CPU, 0))
    expected = bench_training.checked(bench_training.Step("nano", 3, CPU, torch.float64)(*inputs))
    for backend in (lambda step: step, models.plain, partial(models.plain, per_image=True)):
        step = bench_training.Step("nano", 3, CPU, torch.float32, backend=backend)
        found = bench_training.checked(step(*inputs))
        assert "losses: relative error" in bench_training.compare(found, expected, (1e-4, 1e-2))
        assert not torch.equal(step(*inputs)[1], found[0])  # it does step
    wrong = (found[0] * 1.01, found[1])
    with pytest.raises(Parity):
        bench_training.compare(wrong, expected, (1e-3, 1e-2))


def test_a_step_under_autocast_is_judged_by_its_losses_and_its_float32_gradients():
    case = bench_training._step(CPU, "nano", 2, 64, 3, torch.bfloat16)
    inputs = case.inputs(0)
    expected = case.expected(*inputs)
    contender = case.contenders[0]
    losses, found = contender.result(contender.build()(*inputs))
    assert (losses - expected[0]).abs().max() > 1e-3  # bfloat16: few pixels and objects, far off
    with pytest.raises(Parity):
        case.compare((losses, found), expected)
    assert "gradients: relative error" in case.compare((expected[0], found), expected)
    with pytest.raises(Parity):
        case.compare((expected[0], 1.1 * found), expected)
    assert case.compare((expected[0], None), expected).endswith("gradients not compared")


def test_post_processing_in_plain_pytorch_finds_the_same():
    (case,) = [case for case in bench_postprocess.cases(CPU) if case.name.startswith("1 image")]
    levels = case.inputs(0)
    expected = case.expected(*levels)
    assert len(expected[0]) == 300
    assert case.compare(bench_postprocess.eager(*levels), expected).startswith("0 of 300")
    with pytest.raises(Parity):
        case.compare([expected[0] + torch.tensor([1.0, 0, 0, 0, 0, 0])], expected)
    with pytest.raises(Parity):
        case.compare([expected[0][:0]], expected)


def test_a_step_with_its_loader_and_one_that_stays_in_its_place_are_judged_by_their_first():
    case = bench_training._iteration(CPU, "nano", 2, 64, iterations=2)
    assert case.images == 4
    ours = case.contenders[0]
    assert "on its own batch" in case.compare(ours.result(ours.build()()), None)
    inputs = (models.pictures(2, 64, CPU, 0), *models.objects(2, 5, 3, 64, CPU, 0)[:3])
    step = bench_training.RecordedStep("nano", 3, CPU, torch.float32)
    plain = bench_training.Step("nano", 3, CPU, torch.float32)
    for _ in range(2):
        torch.testing.assert_close(step(*inputs)[1], plain(*inputs)[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", [None, "default"])
def test_what_the_predictor_finds_is_judged(mode):
    case = bench_predict._frames(CPU, "det", "nano", 2, side=64, score_threshold=0.02, mode=mode)
    inputs = case.inputs(0)
    expected = case.expected(*inputs)
    for contender in case.contenders:
        assert "detections differ" in case.compare(contender.result(contender.build()(*inputs)), expected)
    with pytest.raises(Parity):
        case.compare(expected[::-1], expected)


def test_rtdetr_needs_no_transformers_for_its_weights(monkeypatch):
    monkeypatch.setattr(bench_rtdetr, "saved", absent)
    one, other = (bench_rtdetr.ours(CPU, torch.float32, layers).state_dict() for layers in (None, 1))
    assert all(map(torch.equal, one.values(), other.values()))


def test_the_published_code_is_absent_where_its_folder_is_not(monkeypatch, tmp_path):
    (case, *_) = bench_rtdetr.cases(CPU)
    (contender,) = (contender for contender in case.contenders if contender.name == "published")
    monkeypatch.delenv("RTDETR_PUBLISHED", raising=False)
    for folder in (None, tmp_path):
        if folder is not None:
            monkeypatch.setenv("RTDETR_PUBLISHED", str(folder))
        with pytest.raises(Absent, match="RTDETR_PUBLISHED names" if folder is None else "is no folder rtdetr_pytorch"):
            contender.build()


def test_the_public_kernel_is_asked_for_the_same(monkeypatch):
    """Its own fallback, in place of the kernel that no CPU runs."""

    def native(value, sizes, locations, weights, padding, align_corners):
        assert (padding, align_corners) == ("zeros", False)
        levels = value.split(sizes.prod(1).tolist(), 1)
        found = 0
        for level, (h, w), at, share in zip(
            levels, sizes.tolist(), locations.unbind(3), weights.unbind(3), strict=True
        ):
            image = level.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, (h, w))
            sampled = torch.nn.functional.grid_sample(
                image, 2 * at.transpose(1, 2).flatten(0, 1) - 1, align_corners=False
            )
            sampled = (sampled * share.transpose(1, 2).flatten(0, 1)[:, None]).sum(3)
            found = found + sampled.unflatten(0, value.shape[::2][:1] + value.shape[2:3]).permute(0, 3, 1, 2)
        return found

    module = SimpleNamespace(triton_multiscale_deformable_attention=native)
    monkeypatch.setitem(sys.modules, "msda_triton", SimpleNamespace(frontend=module))
    monkeypatch.setitem(sys.modules, "msda_triton.frontend", module)
    inputs = bench_deformable_attention._inputs(CPU, 1, torch.float32, 0)
    found, expected = bench_deformable_attention._msda_triton()(*inputs), bench_deformable_attention.standard(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
