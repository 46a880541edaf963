"""mmdet's own Runner, config and data: the same losses with the patch, and one evaluation for both sides' weights."""

import json
from pathlib import Path

import pytest
import torch
from needs import openmmlab

openmmlab("mmdet")

import mmdet
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData

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
