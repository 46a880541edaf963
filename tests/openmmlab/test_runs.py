"""mmdet's own Runner, config and data: the same losses with the patch, and one evaluation for both sides' weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
from needs import openmmlab

openmmlab("mmdet")

import mmcv.ops
import mmdet
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData

import rtmdet_fast.compat.mmcv_ext as mmcv_ext
from benches import openmmlab_proof as proof


@pytest.fixture
def bccd(shared):
    folder = shared / "data/bccd"
    if not folder.is_dir():
        pytest.skip("../shared/data/bccd is not here")
    return folder


def test_losses_of_the_first_20_iterations(bccd, tmp_path):
    losses = proof.first_losses(proof.bccd(bccd, tmp_path, size=128, batch_size=4))
    assert len(losses) == 20
    assert all(off["loss_bbox"] > 0.01 for off, _ in losses)
    assert proof.difference(losses) < 1e-4


def test_a_reference_checkpoint_in_mmdet_and_here(bccd, shared, tmp_path):
    """On 16 images, to save time: the whole validation set is `python -m benches.openmmlab_proof checkpoint`."""
    from rtmdet_fast import RTMDet
    from rtmdet_fast.data.coco import CocoDataset
    from rtmdet_fast.evaluation.evaluate import evaluate

    weights = shared / "reference/mmdet_checkpoint_bccd_rtmdet_tiny.pth"
    truth = json.loads((bccd / "val.json").read_text())
    truth["images"] = truth["images"][:16]
    ids = {image["id"] for image in truth["images"]}
    truth["annotations"] = [entry for entry in truth["annotations"] if entry["image_id"] in ids]
    (tmp_path / "val.json").write_text(json.dumps(truth))
    (tmp_path / "train.json").write_text(json.dumps(truth))
    (tmp_path / "images").symlink_to(bccd / "images")
    theirs = proof.evaluate_with_mmdet(weights, tmp_path, tmp_path / "run")
    dataset = CocoDataset(tmp_path / "val.json", bccd / "images")
    ours = evaluate(RTMDet.from_pretrained(str(weights)), dataset, image_size=256, progress=False).metrics
    assert ours["AP"] > 0.3
    assert theirs["coco/bbox_mAP"] == pytest.approx(ours["AP"], abs=1e-3)
    assert theirs["coco/bbox_mAP_50"] == pytest.approx(ours["AP50"], abs=1e-3)


@pytest.mark.parametrize("name", ["rtmdet_tiny", "rtmdet-ins_tiny"])
def test_published_configs_train_and_predict(name):
    """Under mmcv-lite nothing but the stand-in's ops is called, with the patch and without it."""
    register_all_modules(init_default_scope=True)
    config = Config.fromfile(Path(mmdet.__file__).parent / f".mim/configs/rtmdet/{name}_8xb32-300e_coco.py").model
    config.backbone.init_cfg = None
    for part in (config.backbone, config.neck, config.bbox_head):
        part.norm_cfg = dict(type="BN")
    config.test_cfg.update(score_thr=0.0, nms_pre=200)
    config.data_preprocessor.batch_augments = None
    torch.manual_seed(0)
    model = MODELS.build(config)
    model.init_weights()
    gt = InstanceData(bboxes=torch.tensor([[10.0, 20, 90, 100], [30, 30, 60, 120]]), labels=torch.tensor([3, 70]))
    if "ins" in name:
        masks = torch.zeros(2, 128, 128)
        masks[0, 25:95, 15:85] = masks[1, 40:110, 35:55] = 1
        gt.masks = BitmapMasks(masks.byte().numpy(), 128, 128)
    sample = DetDataSample(
        gt_instances=gt, metainfo=dict(img_shape=(128, 128), ori_shape=(128, 128), scale_factor=(1, 1))
    )
    data = dict(inputs=[(torch.rand(3, 128, 128) * 255).byte()], data_samples=[sample])

    def losses() -> list[torch.Tensor]:
        batch = model.data_preprocessor(dict(inputs=data["inputs"], data_samples=[sample.clone()]), True)
        values = model(**batch, mode="loss").values()
        return [x.detach() for value in values for x in (value if isinstance(value, list) else [value])]

    expected = losses()
    with proof.compat.patched():
        torch.testing.assert_close(losses(), expected, rtol=1e-5, atol=1e-6)
    assert all(x > 0 for x in expected[:3]) and len(expected) == 6 + ("ins" in name)
    with torch.no_grad():
        found = model.test_step(data)[0].pred_instances
    assert len(found) == 100 if "ins" in name else len(found) > 100
    assert "masks" not in found or found.masks.shape == (100, 128, 128)


@pytest.mark.skipif(sys.modules["mmcv._ext"] is not mmcv_ext, reason="this mmcv is a compiled one")
@pytest.mark.parametrize(
    "name", ["deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco", "dino/dino-4scale_r50_8xb2-12e_coco"]
)
def test_deformable_detrs_train_and_predict(name, monkeypatch):
    """With mmcv's autograd function over the stand-in, which runs on GPUs; on a CPU mmcv takes another, the measure."""
    register_all_modules(init_default_scope=True)
    config = Config.fromfile(Path(mmdet.__file__).parent / f".mim/configs/{name}.py").model
    config.backbone.update(init_cfg=None, depth=18)
    config.neck.in_channels = [128, 256, 512]
    for part in (config.encoder, config.decoder):
        part.num_layers = 2
    config.num_queries = 30
    torch.manual_seed(0)
    model = MODELS.build(config)
    model.init_weights()
    for parameter_name, parameter in model.named_parameters():
        if "sampling_offsets.weight" in parameter_name or "attention_weights.weight" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    gt = InstanceData(bboxes=torch.tensor([[10.0, 20, 90, 100], [30, 30, 60, 120]]), labels=torch.tensor([3, 70]))
    shape = dict(img_shape=(128, 160), ori_shape=(128, 160), batch_input_shape=(128, 160), scale_factor=(1, 1))
    sample = DetDataSample(gt_instances=gt, metainfo=shape)
    data = dict(inputs=[(torch.rand(3, 128, 160) * 255).byte()], data_samples=[sample])

    def losses_and_gradients() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        torch.manual_seed(1)  # dropout, noise
        batch = model.data_preprocessor(dict(inputs=data["inputs"], data_samples=[sample.clone()]), True)
        values = list(model(**batch, mode="loss").values())
        model.zero_grad()
        sum(values).backward()
        return [x.detach() for x in values], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected, expected_gradients = losses_and_gradients()
    module, calls = mmcv.ops.multi_scale_deform_attn, []

    def on_a_gpu(value, shapes, locations, weights):
        calls.append(value.shape)
        starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
        return module.MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)

    monkeypatch.setattr(module, "multi_scale_deformable_attn_pytorch", on_a_gpu)
    found, gradients = losses_and_gradients()
    assert len(calls) == 4 and len(found) >= 6
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for parameter_name, gradient in expected_gradients.items():
        error = (gradients[parameter_name] - gradient).norm()
        assert error <= 1e-3 * gradient.norm() + 1e-5, parameter_name
    model.eval()
    with torch.no_grad():
        assert len(model.test_step(data)[0].pred_instances) > 0
