"""mmdet's own Runner, config and data: the same losses with the patch, and one evaluation for both sides' weights."""

import json

import pytest
from needs import openmmlab

openmmlab("mmdet")

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
    from rtmdet_fast.evaluate import evaluate

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
