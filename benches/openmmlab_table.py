"""The table of mmcv's compiled ops in docs/mmdet.md, from what the stand-in has and how mmcv's tests went.

python -m benches.openmmlab_judge mmcv --source ../mmcv --out cpu.json
python -m benches.openmmlab_judge mmcv --source ../mmcv --fake-gpu --out gpu.json
python -m benches.openmmlab_table cpu.json gpu.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import rtmdet_fast.compat.mmcv_ext as ext

PAGE = Path(__file__).parents[1] / "docs/mmdet.md"
START, END = "<!-- written by python -m benches.openmmlab_table -->\n", "<!-- end of what it writes -->\n"
KERNELS, TORCHVISION, PYTORCH = "our kernels", "torchvision, else PyTorch", "PyTorch"
OPS = {  # the name in mmcv.ops: its ops in mmcv._ext, what these stand on, mmcv's tests of it
    "nms": (["nms"], KERNELS, "nms"),
    "soft_nms": (["softnms"], "our NumPy", "nms"),
    "nms_match": (["nms_match"], PYTORCH, "nms"),
    "nms_rotated": (["nms_rotated"], KERNELS, "nms_rotated"),
    "nms_quadri": (["nms_quadri"], PYTORCH, "nms_quadri"),
    "bbox_overlaps": (["bbox_overlaps"], PYTORCH, "bbox"),
    "box_iou_rotated": (["box_iou_rotated"], KERNELS, "box_iou_rotated"),
    "box_iou_quadri": (["box_iou_quadri"], PYTORCH, "box_iou_quadri"),
    "diff_iou_rotated_2d": (["diff_iou_rotated_sort_vertices_forward"], PYTORCH, "diff_iou_rotated"),
    "MultiScaleDeformableAttention": (["ms_deform_attn"], KERNELS, "ms_deformable_attn"),
    "roi_align": (["roi_align"], TORCHVISION, "roi_align"),
    "roi_pool": (["roi_pool"], PYTORCH, "roi_pool"),
    "roi_align_rotated": (["roi_align_rotated"], PYTORCH, "roi_align_rotated"),
    "riroi_align_rotated": (["riroi_align_rotated"], PYTORCH, "riroi_align_rotated"),
    "rotated_feature_align": (["rotated_feature_align"], PYTORCH, "rotated_feature_align"),
    "border_align": (["border_align"], PYTORCH, "border_align"),
    "prroi_pool": (["prroi_pool", "prroi_pool_coor_backward"], PYTORCH, "prroi_pool"),
    "deform_conv2d": (
        ["deform_conv_forward", "deform_conv_backward_input", "deform_conv_backward_parameters"],
        TORCHVISION,
        "deform_conv",
    ),
    "modulated_deform_conv2d": (["modulated_deform_conv"], TORCHVISION, "modulated_deform_conv"),
    "sigmoid_focal_loss": (["sigmoid_focal_loss"], PYTORCH, "focal_loss"),
    "softmax_focal_loss": (["softmax_focal_loss"], PYTORCH, "focal_loss"),
    "points_in_polygons": (["points_in_polygons_forward"], PYTORCH, "points_in_polygons"),
    "min_area_polygons": (["min_area_polygons"], PYTORCH, "min_area_polygons"),
    "convex_iou": (["convex_iou"], PYTORCH, "convex_iou"),
    "convex_giou": (["convex_giou"], PYTORCH, "convex_iou"),
    "carafe": (["carafe", "carafe_naive"], PYTORCH, "carafe"),
    "masked_conv2d": (["masked_im2col_forward", "masked_col2im_forward"], PYTORCH, "masked_conv2d"),
    "active_rotated_filter": (["active_rotated_filter"], PYTORCH, "active_rotated_filter"),
    "psa_mask": (["psamask"], PYTORCH, "psa_mask"),
}
NOT_DIFFERENTIABLE = "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cpu", type=Path, help="outcomes of mmcv's tests")
    parser.add_argument("gpu", type=Path, help="those with --fake-gpu")
    arguments = parser.parse_args()
    outcomes = [json.loads(path.read_text()) for path in (arguments.cpu, arguments.gpu)]
    lines = [
        "| `mmcv.ops` | stands on | forward | backward | CPU | CUDA | mmcv's tests that pass | and those for GPUs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (_, stands_on, tests) in OPS.items():
        backward = any("backward" in op for op in exported(name))
        backward = "yes" if backward or name in ("diff_iou_rotated_2d", "convex_giou") else NOT_DIFFERENTIABLE
        lines.append(f"| `{name}` | {stands_on} | yes | {backward} | yes | not run | {counts(tests, *outcomes)} |")
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(START)
    PAGE.write_text(f"{head}{START}\n" + "\n".join(lines) + f"\n\n{END}" + rest.split(END)[1], encoding="utf-8")


def exported(name: str) -> list[str]:
    """The ops of `mmcv._ext` behind one of mmcv.ops; KeyError of one that the stand-in lacks."""
    found = []
    for op in OPS[name][0]:
        parts = [op, f"{op}_forward", f"{op}_backward"]
        there = [part for part in parts if part in ext.__all__]
        if not there:
            raise KeyError(op)
        found += there
    return found


def counts(tests: str, cpu: dict[str, dict[str, str]], gpu: dict[str, dict[str, str]]) -> str:
    """Passed of run on the CPU; and of those that only ran with the CPU taken for a GPU."""
    prefix = f"tests/test_ops/test_{tests}.py::"
    here = {test: outcome["outcome"] for test, outcome in cpu.items() if test.startswith(prefix)}
    ran = {test for test, outcome in here.items() if outcome != "skipped"}
    there = {t: o["outcome"] for t, o in gpu.items() if t.startswith(prefix) and t not in ran}
    passed = [sum(outcome == "passed" for outcome in part.values()) for part in (here, there)]
    more = sum(outcome != "skipped" for outcome in there.values())
    return " | ".join(f"{n} of {of}" if of else "none" for n, of in zip(passed, (len(ran), more), strict=True))


if __name__ == "__main__":
    main()
