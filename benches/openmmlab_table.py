"""The tables of docs/mmdet.md: mmcv's ops, how OpenMMLab's tests went, and its detectors.

    python -m benches.openmmlab_judge mmcv --source ../mmcv --out cpu.json
    python -m benches.openmmlab_judge mmcv --source ../mmcv --fake-gpu --out gpu.json
    python -m benches.openmmlab_judge mmdet --source ../mmdetection --out mmdet.json
    python -m benches.openmmlab_demos mmdet > demos.jsonl
    python -m benches.openmmlab_table cpu.json gpu.json mmdet.json demos.jsonl

Adds what the files tell to benches/openmmlab_results.json, and writes the tables from that. Runs of parts of a suite
(`--only`) with the same settings and versions are one run, in which the newest outcome of a test stands.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rtmdet_fast.compat.mmcv_ext as ext
from benches.openmmlab_judge import SUITES, reason

PAGE = Path(__file__).parents[1] / "docs/mmdet.md"
TESTS = Path(__file__).parents[1] / "tests/compat"
"""Which run on a CPU."""
RESULTS = Path(__file__).with_name("openmmlab_results.json")
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
    "chamfer_distance": (["chamfer_distance"], PYTORCH, "chamfer_distance"),
    "carafe": (["carafe", "carafe_naive"], PYTORCH, "carafe"),
    "masked_conv2d": (["masked_im2col_forward", "masked_col2im_forward"], PYTORCH, "masked_conv2d"),
    "active_rotated_filter": (["active_rotated_filter"], PYTORCH, "active_rotated_filter"),
    "psa_mask": (["psamask"], PYTORCH, "psa_mask"),
}
DIFFERENTIABLE = {"diff_iou_rotated_2d", "convex_giou"}
"""By PyTorch's derivative of what mmcv makes of the op, and by a gradient that comes with the value."""
Run = dict[str, Any]
"""What the judge wrote: which suite, how and with what, and `tests`, the outcome of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="what benches.openmmlab_judge and openmmlab_demos wrote")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"runs": [], "models": []}
    for path in arguments.files:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            add_models(results["models"], list(map(json.loads, text.splitlines())))
        else:
            add_run(results["runs"], json.loads(text))
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


def add_run(runs: list[Run], run: Run) -> None:
    """Adds a run, or its tests to those of the run with the same settings and versions, in their place."""
    tests = {test: outcome["outcome"] for test, outcome in run["tests"].items()}  # what they print may name folders
    run = {"gpu": False, "with": {}, **run, "tests": tests}
    same = (other for other in runs if all(other[key] == run[key] for key in run if key != "tests"))
    if (whole := next(same, None)) is not None:
        runs.remove(whole)
        run["tests"] = whole["tests"] | tests
    run["tests"] = dict(sorted(run["tests"].items()))
    runs.append(run)


def add_models(models: list[dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """Adds models, or puts them in the place of what they did before."""
    known = {(model["library"], model["model"]): at for at, model in enumerate(models)}
    for model in found:
        if (at := known.get((model["library"], model["model"]))) is None:
            models.append(model)
        else:
            models[at] = model


def page(text: str, results: dict[str, Any]) -> str:
    """The page with the tables of these results; `text` is the page with those of others."""
    for table, lines in (("ops", ops), ("suites", suites), ("models", models)):
        start = START.format(table)
        head, rest = text.split(start)
        text = f"{head}{start}\n" + "\n".join(lines(results)) + f"\n\n{END}" + rest.split(END, 1)[1]
    return text


def ops(results: dict[str, Any]) -> Iterator[str]:
    yield "| `mmcv.ops` | stands on | forward | backward | CPU | CUDA | mmcv's tests that pass | and those for GPUs |"
    yield "|---|---|---|---|---|---|---|---|"
    runs = [run for run in results["runs"] if run["suite"] == "mmcv" and not run["without"]]
    cpu, fake_gpu, gpu = (  # the newest of each
        next((run["tests"] for run in reversed(runs) if (run["fake_gpu"], run["gpu"]) == how), {})
        for how in ((False, False), (True, False), (False, True))
    )
    called = "".join(path.read_text(encoding="utf-8") for path in TESTS.glob("*.py"))
    for name, (of_mmcv, stands_on, tests) in OPS.items():
        parts = exported(name)
        forward = any("backward" not in op for op in parts)
        backward = any("backward" in op for op in parts) or name in DIFFERENTIABLE
        tested = all(re.search(rf"\b{op}", called) for op in of_mmcv)
        cells = [*("yes" if told else "none" for told in (forward, backward)), "yes" if tested else "not tested"]
        counted = passed(tests, gpu)
        cells.append(f"mmcv's tests: {counted}" if counted else "not run")
        ran = {test for test, outcome in cpu.items() if outcome != "skipped"}
        more = {test: outcome for test, outcome in fake_gpu.items() if test not in ran}
        for run, part in ((cpu, cpu), (fake_gpu, more)):
            cells.append((passed(tests, part) or "none") if run else "not run")
        yield f"| `{name}` | {stands_on} | {' | '.join(cells)} |"


def suites(results: dict[str, Any]) -> Iterator[str]:
    """A row a run; below, why tests cannot pass."""
    yield "| tests of | run | passed | cannot pass | fail otherwise | skipped | with |\n|---|---|---|---|---|---|---|"
    why: dict[str, collections.Counter[str]] = {suite: collections.Counter() for suite in SUITES}
    settings = ("without", "patch", "fake_gpu", "gpu")
    for run in sorted(results["runs"], key=lambda run: ([*SUITES].index(run["suite"]), *map(run.get, settings))):
        outcomes = collections.Counter(run["tests"].values())
        failed = [test for test, outcome in run["tests"].items() if outcome in ("failed", "error")]
        known = [told for test in failed if (told := reason(run["suite"], test))]
        words = ["without the stand-in" if run["without"] else "over the stand-in"]
        words += ["with `patch()`"] * run["patch"] + ["those for GPUs on the CPU, too"] * run["fake_gpu"]
        words += ["those for GPUs, on one"] * run["gpu"]
        if not run["without"]:
            why[run["suite"]] |= collections.Counter(known)
        listed = "" if run["without"] else len(known)
        versions = ", ".join(f"{name} {version}" for name, version in run["with"].items())
        cells = (outcomes["passed"], listed, len(failed) - (listed or 0), outcomes["skipped"], versions)
        yield f"| {run['suite']} | {', '.join(words)} | {' | '.join(map(str, cells))} |"
    for suite, reasons in why.items():
        if reasons:
            yield f"\nOf {suite}'s cannot pass:\n"
            yield from (f"- {count}: {told}" for told, count in reasons.most_common())


def models(results: dict[str, Any]) -> Iterator[str]:
    yield "| | model | sum of the losses | parameters with a gradient | detections in two images | seconds |"
    yield "|---|---|---|---|---|---|"
    for found in results["models"]:
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


def passed(tests: str, outcomes: dict[str, str]) -> str:
    """How many of mmcv's tests of an op passed, and of how many that ran; nothing where none did."""
    found = [outcome for test, outcome in outcomes.items() if test.startswith(f"tests/test_ops/test_{tests}.py::")]
    ran = len(found) - found.count("skipped")
    return f"{found.count('passed')} of {ran}" if ran else ""


if __name__ == "__main__":
    main()
