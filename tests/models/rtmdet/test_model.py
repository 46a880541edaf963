"""The model against the published one: keys, outputs, losses, gradients, assignments, detections."""

import json

import pytest
import torch

from rtmdet_fast import RTMDet, UserError
from rtmdet_fast.kernels.assign import dynamic_soft_label_assign
from rtmdet_fast.models.detector import Targets
from rtmdet_fast.models.rtmdet.model import SIZES


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(scope="module")
def reference(shared):
    return torch.load(shared / "reference/rtmdet_tiny.pt", weights_only=True)


@pytest.fixture
def model(reference):
    model = RTMDet("tiny")
    model.load_state_dict(reference["state_dict"], strict=True)
    return model.eval()


@pytest.mark.parametrize("size", ["tiny", "s", "m", "l", "x"])
def test_state_dict_is_the_published_one(shared, size):
    published = json.loads((shared / f"reference/keys/rtmdet_{size}.json").read_text())
    with torch.device("meta"):
        model = RTMDet(size)
    state = model.state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == published["keys"]
    assert sum(p.numel() for p in model.parameters()) == published["info"]["params"]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, aliases in published["aliases"].items():
        assert all(parameters[alias] is parameters[key] for alias in aliases)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-5, 0.1)}
    assert len(norms) == published["info"]["bn"]["n"]


def test_nano_has_the_published_number_of_parameters():
    model = RTMDet("nano", num_classes=1)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 0.99
    assert model.image_size == 320


def test_features_and_head_outputs(model, reference):
    with torch.no_grad():
        features = model.neck(model.backbone(reference["input"]))
        output = model(reference["input"])
    for ours, theirs in zip(features, reference["neck"], strict=True):
        assert relative_error(ours, theirs) < 1e-4
    for ours, theirs in zip(output, reference["head"], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert relative_error(a, b) < 1e-4


@pytest.mark.parametrize("rescale", [False, True])
def test_predictions(model, reference, rescale):
    expected = reference["predict_rescale" if rescale else "predict"]
    with torch.no_grad():
        (found,) = model.bbox_head.detect(
            model(reference["input"]),
            (416, 416),
            model.bbox_head.test_settings,
        )
    boxes = found.boxes / 0.8 if rescale else found.boxes
    assert len(found.labels) == len(expected["labels"]) == 300
    # Neighbours whose scores differ in the last bit may change places with the number of threads.
    same = (
        (found.labels[:, None] == expected["labels"])
        & ((found.scores[:, None] - expected["scores"]).abs() < 1e-4)
        & ((boxes[:, None] - expected["bboxes"]).abs() < 1e-2).all(-1)
    )
    row, column = same.nonzero(as_tuple=True)
    assert torch.equal(row, torch.arange(300)) and torch.equal(column.sort().values, torch.arange(300))
    assert (row - column).abs().max() <= 1


def test_losses_and_gradients(model, reference):
    train = reference["train"]
    gts = train["gts"]
    targets = Targets(
        torch.nn.utils.rnn.pad_sequence([gt["bboxes"] for gt in gts], batch_first=True),
        torch.nn.utils.rnn.pad_sequence([gt["labels"] for gt in gts], batch_first=True, padding_value=-1),
        torch.tensor([len(gt["labels"]) for gt in gts]),
    )
    model.train()
    losses = model(train["input"], targets)
    for name in ("loss_cls", "loss_bbox"):
        torch.testing.assert_close(losses[name], sum(train["losses"][name]), rtol=1e-4, atol=0)
    total = sum(losses.values())
    torch.testing.assert_close(total, train["total"], rtol=1e-4, atol=0)
    total.backward()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == train["grad_norms"].keys()
    for name, norm in train["grad_norms"].items():
        gradient = parameters[name].grad
        ours = 0.0 if gradient is None else gradient.norm().item()
        assert ours == pytest.approx(norm, rel=1e-3, abs=1e-6), name
    for key, value in train["bn_running_mean_after"].items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-4, atol=1e-6)


def test_assignments(reference):
    train = reference["train"]
    for gt, expected in zip(train["gts"], train["assign"], strict=True):
        pred = expected["pred"]
        assigned, iou, labels = dynamic_soft_label_assign(
            pred["bboxes"][None],
            pred["scores"][None],
            pred["priors"],
            gt["bboxes"][None],
            gt["labels"][None],
            torch.tensor([len(gt["labels"])]),
        )
        assert torch.equal(assigned[0] + 1, expected["gt_inds"])
        matched = expected["gt_inds"] > 0
        torch.testing.assert_close(iou[0][matched], expected["max_overlaps"][matched])
        assert torch.equal(labels[0][matched], expected["labels"][matched])


def test_batch_without_any_object_has_a_finite_loss_and_gradient():
    model = RTMDet("nano", num_classes=2)
    empty = Targets(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    losses = model(torch.randn(2, 3, 64, 64), empty)
    assert losses["loss_bbox"].item() == 0 and losses["loss_cls"].item() > 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_every_size_runs_forward_and_backward(size):
    torch.manual_seed(0)  # of one model in thousands no box meets the object
    model = RTMDet(size, num_classes=3)
    targets = Targets(
        torch.tensor([[[8.0, 8, 40, 48]]] * 2), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2).long()
    )
    losses = model(torch.randn(2, 3, 64, 64), targets)
    sum(losses.values()).backward()
    assert losses["loss_bbox"].item() > 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# All of a compilation but the C++, which takes long.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_model_equals_the_eager_one(model, backend):
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        found = torch.compile(model, fullgraph=True, backend=backend)(images)
    for a, b in zip(expected, found, strict=True):
        for x, y in zip(a, b, strict=True):
            assert relative_error(y, x) < 1e-4


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (dict(size="huge"), "huge"),
        (dict(task="pose"), "pose"),
        (dict(num_classes=0), "num_classes"),
        (dict(num_classes=2, class_names=["a"]), "class names"),
    ],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(UserError, match=word):
        RTMDet(**arguments)
