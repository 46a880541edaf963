"""Detectors of mmdet and mmrotate as their users run them, once each: losses, backward pass, prediction.

    python -m benches.openmmlab_demos mmdet
    python -m benches.openmmlab_demos mmrotate

Their own configs, without pretrained weights, on two random images of 128 pixels; ops by `rtmdet_fast.compat.mmcv_ext`.
Prints a line of JSON a model, and fails if one of them fails, has a loss or gradient that is not finite, or does not
reach its backbone. In the environments of `make test-openmmlab`.
"""

from __future__ import annotations

import rtmdet_fast.compat.mmcv_ext as ext

# isort: split
import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

SIZE = 128
LARGER = {"DINO": 256}  # its 900 queries are the best of as many pixels of its maps
MMDET = {
    "Faster R-CNN": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "Mask R-CNN": "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "Cascade R-CNN": "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py",
    "DCN": "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py",
    "DCNv2": "dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py",
    "RetinaNet": "retinanet/retinanet_r50_fpn_1x_coco.py",
    "FCOS": "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "ATSS": "atss/atss_r50_fpn_1x_coco.py",
    "TOOD": "tood/tood_r50_fpn_1x_coco.py",
    "DINO": "dino/dino-4scale_r50_8xb2-12e_coco.py",
    "Deformable DETR": "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    "CenterNet": "centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py",
    "RTMDet": "rtmdet/rtmdet_tiny_8xb32-300e_coco.py",
    "Guided anchoring": "guided_anchoring/ga-retinanet_r50-caffe_fpn_1x_coco.py",
    "CARAFE": "carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py",
}
MMROTATE = {
    "Oriented R-CNN": "oriented_rcnn/oriented-rcnn-le90_r50_fpn_1x_dota.py",
    "S2A-Net": "s2anet/s2anet-le135_r50_fpn_1x_dota.py",
    "ReDet": "redet/redet-le90_re50_refpn_1x_dota.py",
    "R3Det": "r3det/r3det-oc_r50_fpn_1x_dota.py",
    "Oriented RepPoints": "oriented_reppoints/oriented-reppoints-qbox_r50_fpn_1x_dota.py",
    "Gliding Vertex": "gliding_vertex/gliding-vertex-rbox_r50_fpn_1x_dota.py",
    "Rotated RTMDet": "rotated_rtmdet/rotated_rtmdet_tiny-3x-dota.py",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=("mmdet", "mmrotate"))
    parser.add_argument("--only", nargs="*", help="some of the models, by name")
    arguments = parser.parse_args()
    models = MMDET if arguments.library == "mmdet" else MMROTATE
    failed = []
    for name in arguments.only or models:
        start = time.perf_counter()
        try:
            found = run(arguments.library, models[name], LARGER.get(name, SIZE))
        except Exception as error:  # the next one runs all the same
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}"[:300]}
            failed.append(name)
        found = {"library": arguments.library, "model": name, **found}
        print(json.dumps({**found, "seconds": round(time.perf_counter() - start, 1)}), flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run(library: str, config: str, size: int) -> dict[str, Any]:
    """Losses, gradients and prediction of one model with random weights."""
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.logging import MessageHub, MMLogger

    assert sys.modules["mmcv._ext"] is ext, "this mmcv is a compiled one"
    MMLogger.get_instance("demos", log_level="ERROR")  # else init_weights tells of every parameter
    register_all_modules()
    package, registry = mmdet, MODELS
    if library == "mmrotate":
        import mmrotate
        from mmrotate.registry import MODELS as registry
        from mmrotate.utils import register_all_modules as register_rotated

        register_rotated()
        package = mmrotate
    cfg = Config.fromfile(str(Path(package.__file__).parent / ".mim/configs" / config))
    without_weights(cfg.model)
    torch.manual_seed(0)
    hub = MessageHub.get_instance(config)
    hub.update_info("iter", 0)
    hub.update_info("epoch", 0)
    model = registry.build(cfg.model)
    model.init_weights()
    shapes = [(3, size, size)] * 2
    masks = "mask_head" in cfg.model.get("roi_head", {})
    extra = dict(use_box_type=True) if library == "mmrotate" else dict(with_mask=masks)
    inputs = demo_mm_inputs(2, shapes, num_classes=2, **extra)
    if library == "mmrotate":
        rotate(inputs, "qbox" if "qbox" in config or "gliding" in config else "rbox")
    model.train()
    data = model.data_preprocessor(inputs, True)
    losses = model(**data, mode="loss")
    total, values = model.parse_losses(losses)
    total.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert torch.isfinite(total), values
    assert gradients and all(g.isfinite().all() for g in gradients), "gradients that are not finite"
    reached = any(p.grad is not None and p.grad.any() for p in model.backbone.parameters())
    assert reached, "the backbone has no gradient"
    model.eval()
    with torch.no_grad():
        pairs = zip(inputs["inputs"], inputs["data_samples"], strict=True)  # mmcv's masked_conv2d takes one image
        results = [model.test_step({"inputs": [image], "data_samples": [sample]})[0] for image, sample in pairs]
    counts = [len(result.pred_instances) for result in results]
    return {"loss": round(float(total), 4), "parameters with gradient": len(gradients), "detections": counts}


def without_weights(cfg: Any) -> None:
    """Strikes what would be downloaded from a config of a model."""
    if isinstance(cfg, dict):
        if isinstance(cfg.get("init_cfg"), dict) and cfg["init_cfg"].get("type") == "Pretrained":
            cfg["init_cfg"] = None
        if "pretrained" in cfg:
            cfg["pretrained"] = None
        for value in cfg.values():
            without_weights(value)
    elif isinstance(cfg, list | tuple):
        for value in cfg:
            without_weights(value)


def rotate(inputs: dict[str, Any], form: str) -> None:
    """Turns the random boxes of the samples, in place; `form` is the name of their class in mmrotate."""
    from mmrotate.structures.bbox import RotatedBoxes

    generator = torch.Generator().manual_seed(0)
    for sample in inputs["data_samples"]:
        for name in ("gt_instances", "ignored_instances"):
            if name in sample:
                boxes = getattr(sample, name).bboxes
                boxes = boxes.convert_to("rbox").tensor if hasattr(boxes, "convert_to") else boxes
                boxes = boxes + torch.tensor([0, 0, 4.0, 4, 0]) * (len(boxes) > 0)
                boxes[:, 4] = torch.rand(len(boxes), generator=generator) - 0.5
                getattr(sample, name).bboxes = RotatedBoxes(boxes).convert_to(form)


if __name__ == "__main__":
    main()
