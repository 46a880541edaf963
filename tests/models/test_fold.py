"""The folded form gives the model's outputs, and cannot be mistaken for a model to train."""

import pytest
import torch
from torch import nn

from rtmdet_fast import RTMDet, UserError
from rtmdet_fast.models.fold import fold_batch_norm
from rtmdet_fast.models.rtmdet.layers import ConvModule
from rtmdet_fast.models.rtmdet.model import HEADS, SIZES


def unlike_fresh(model: nn.Module) -> nn.Module:
    """With batch norms as training leaves them: no two channels alike."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
            ):
                tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))
    return model.eval()


def tensors(output) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else [t for part in output for t in tensors(part)]


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("size", SIZES)
def test_outputs_are_those_of_the_model(size, task):
    torch.manual_seed(0)
    model = unlike_fresh(RTMDet(size, task, num_classes=3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(2, 3, 64, 96)
    folded = model.fold()
    with torch.no_grad():
        expected, found = tensors(model(images)), tensors(folded(images))
    for a, b in zip(expected, found, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max() + 1e-7
    assert not any(isinstance(m, (nn.BatchNorm2d, ConvModule)) for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters()) and all(p.requires_grad for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_shared_convolutions_fold_into_one_for_each_level():
    model = unlike_fresh(RTMDet("tiny", num_classes=3))
    towers = [tower[0] for tower in model.bbox_head.cls_convs]
    assert towers[0].conv.weight is towers[1].conv.weight
    folded = [tower[0] for tower in model.fold().bbox_head.cls_convs]
    assert not torch.equal(folded[0].conv.weight, folded[1].conv.weight)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_one_convolution(groups, bias):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, (3, 5), (2, 1), (1, 2), groups=groups, bias=bias)
    bn = unlike_fresh(nn.BatchNorm2d(8, eps=0.1))
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(fold_batch_norm(conv, bn)(x), bn(conv(x)), rtol=1e-5, atol=1e-5)


def test_predictions_of_a_folded_model():
    torch.manual_seed(0)
    model = unlike_fresh(RTMDet("nano", class_names=["a", "b"]))
    for cls, reg in zip(model.bbox_head.rtm_cls, model.bbox_head.rtm_reg, strict=True):
        nn.init.zeros_(cls.bias)
        nn.init.ones_(reg.bias)
    image = torch.randint(0, 256, (70, 50, 3), dtype=torch.uint8).numpy()
    expected, found = (m.predict(image, image_size=64, score_threshold=0.1) for m in (model, model.fold()))
    assert len(expected) and found.labels.tolist() == expected.labels.tolist()
    torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)


def test_a_folded_model_is_for_inference_alone(tmp_path):
    folded = RTMDet("nano", num_classes=2).fold()
    with pytest.raises(UserError, match="cannot be trained"):
        folded.train()
    with pytest.raises(UserError, match="no losses"):
        folded(torch.zeros(1, 3, 64, 64), ())
    with pytest.raises(UserError, match="cannot be saved"):
        folded.save(tmp_path / "a.pth")
    assert not (tmp_path / "a.pth").exists()
    assert not folded.fold().training
