"""The tables of docs/mmdet.md: mmcv's ops, how OpenMMLab's tests went, and its detectors.

    python -m benches.openmmlab_judge mmcv --source ../mmcv --out cpu.json
    python -m benches.openmmlab_judge mmcv --source ../mmcv --fake-gpu --out gpu.json
    python -m benches.openmmlab_judge mmdet --source ../mmdetection --out mmdet.json
    python -m benches.openmmlab_demos mmdet > demos.jsonl
    python -m benches.openmmlab_table cpu.json gpu.json mmdet.json demos.jsonl

Writes those tables that the files are for. Runs of parts of a suite (`--only`) with the same settings are one run.
"""

from __future__ import annotations

import argparse
import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rtmdet_fast.compat.mmcv_ext as ext
from benches.openmmlab_judge import SUITES, reason

PAGE = Path(__file__).parents[1] / "docs/mmdet.md"
START, END = "<!-- {} written by python -m benches.openmmlab_table -->\n", "<!-- end of what it writes -->\n"
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
    parser.add_argument("files", nargs="+", type=Path, help="what benches.openmmlab_judge and openmmlab_demos wrote")
    arguments = parser.parse_args()
    judged: list[dict[str, Any]] = []
    demos: list[dict[str, Any]] = []
    for path in arguments.files:
        if path.suffix == ".jsonl":
            demos += map(json.loads, path.read_text().splitlines())
        else:
            run = json.loads(path.read_text())
            same = (other for other in judged if all(other[key] == run[key] for key in run if key != "tests"))
            if (whole := next(same, None)) is None:
                judged.append(run)
            else:
                whole["tests"] |= run["tests"]
    ran = {run["fake_gpu"]: run["tests"] for run in judged if run["suite"] == "mmcv" and not run["without"]}
    if len(ran) == 2:
        write("ops", ops(ran[False], ran[True]))
    if judged:
        write("suites", suites(judged))
    if demos:
        write("models", models(demos))


def write(table: str, lines: Iterator[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    start = START.format(table)
    head, rest = text.split(start)
    PAGE.write_text(f"{head}{start}\n" + "\n".join(lines) + f"\n\n{END}" + rest.split(END, 1)[1], encoding="utf-8")


def ops(cpu: dict[str, dict[str, str]], gpu: dict[str, dict[str, str]]) -> Iterator[str]:
    yield "| `mmcv.ops` | stands on | forward | backward | CPU | CUDA | mmcv's tests that pass | and those for GPUs |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, (_, stands_on, tests) in OPS.items():
        backward = any("backward" in op for op in exported(name))
        told = "yes" if backward or name in ("diff_iou_rotated_2d", "convex_giou") else NOT_DIFFERENTIABLE
        yield f"| `{name}` | {stands_on} | yes | {told} | yes | not run | {counts(tests, cpu, gpu)} |"


def suites(judged: list[dict[str, Any]]) -> Iterator[str]:
    """A row a run; below, why tests cannot pass."""
    yield "| tests of | run | passed | cannot pass | fail otherwise | skipped |\n|---|---|---|---|---|---|"
    why: dict[str, collections.Counter[str]] = {suite: collections.Counter() for suite in SUITES}
    for run in sorted(judged, key=lambda run: ([*SUITES].index(run["suite"]), *map(run.get, ("without", "patch")))):
        outcomes = collections.Counter(outcome["outcome"] for outcome in run["tests"].values())
        failed = [test for test, outcome in run["tests"].items() if outcome["outcome"] in ("failed", "error")]
        known = [told for test in failed if (told := reason(run["suite"], test))]
        words = ["without the stand-in" if run["without"] else "over the stand-in"]
        words += ["with `patch()`"] * run["patch"] + ["those for GPUs on the CPU, too"] * run["fake_gpu"]
        if not run["without"]:
            why[run["suite"]] |= collections.Counter(known)
        listed = "" if run["without"] else len(known)
        cells = (outcomes["passed"], listed, len(failed) - (listed or 0), outcomes["skipped"])
        yield f"| {run['suite']} | {', '.join(words)} | {' | '.join(map(str, cells))} |"
    for suite, reasons in why.items():
        if reasons:
            yield f"\nOf {suite}'s cannot pass:\n"
            yield from (f"- {count}: {told}" for told, count in reasons.most_common())


def models(demos: list[dict[str, Any]]) -> Iterator[str]:
    yield "| | model | sum of the losses | parameters with a gradient | detections in two images | seconds |"
    yield "|---|---|---|---|---|---|"
    for found in demos:
        if "failed" in found:
            cells = [f"fails: {found['failed']}", "", ""]
        else:
            counts = ", ".join(map(str, found["detections"]))
            cells = [f"{found['loss']:.4g}", f"{found['parameters with gradient']}", counts]
        yield f"| {found['library']} | {found['model']} | {' | '.join(cells)} | {found['seconds']:.0f} |"


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
