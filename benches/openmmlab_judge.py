"""mmcv's, mmdet's and mmrotate's own tests over this project's stand-ins: what passes, with them and without.

    python -m benches.openmmlab_judge mmcv --source ../mmcv --out mmcv.json

`--source` is a clone of their repository at the tag of the installed version, of which `tests` and `configs` are read.
`--without` leaves mmcv-lite as it is, `--patch` runs mmdet's heads with `rtmdet_fast.compat.mmdet.patch()` as well.
`--gpu`, on a machine with one, runs the tests alone that ask for a GPU; `--fake-gpu` runs them with the others, on the
CPU, with "cuda" taken for it. Tests that cannot pass stand in CANNOT, with the reason; the command fails if another one
does, or if all that one of its lines names pass.

Needs an environment of `make test-openmmlab` with `parameterized`, and for mmdet with lap, motmetrics, scikit-image and
scikit-learn; nothing of theirs is kept here.
"""

from __future__ import annotations

import argparse
import collections
import collections.abc
import importlib.metadata
import inspect
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

SUITES = {"mmcv": "tests/test_ops", "mmdet": "tests/test_models", "mmrotate": "tests/test_models"}
_SPACE = (
    "assign_score_withk|ball_query|furthest_point_sample|gather_points|group_points|iou3d|knn|"
    "roiaware_pool3d|roipoint_pool3d|scatter_points|spconv|three_interpolate|three_nn|voxelization"
)
CANNOT: dict[str, dict[str, str]] = {
    "mmcv": {
        rf"test_ops/test_({_SPACE})\.py": "points in space: out of scope",
        r"test_ops/test_(bezier_align|contour_expand|pixel_group)\.py": "text in images: out of scope",
        r"test_ops/test_(correlation|tin_shift)\.py": "video: out of scope",
        r"test_ops/test_deform_roi_pool\.py": "no published detector's: out of scope",
        r"test_filtered_lrelu\.py$": "asks CUDA's version while it is collected, with --fake-gpu",
        r"::test_box_iou_quadri": "expects 1.0000 of two quadrilaterals whose IoU is 7/9 (see `_polygons`)",
        r"test_onnx\.py": "asks for torch.onnx's exporter of TorchScript: fails over a compiled mmcv too",
        r"::test_convex_giou": "at corners that coincide the derivative depends on the side; mmcv takes another one",
        r"::test_(deform|md)conv_half\[cuda": "asks for autocast on CUDA, which a CPU taken for a GPU has not",
    },
    "mmdet": {
        r"test_reid/|test_mot/test_(deep|strong)_sort|test_trackers/test_(strong_)?sort_tracker": "asks for mmpretrain",
        r"test_detectors/test_glip\.py": "asks for transformers and the weights of BERT",
        r"test_kd_single_stage\.py.*_ld_": "downloads the weights of the model that it learns from",
    },
    "mmrotate": {},
}
"""Of each suite, regular expressions of tests, and why these do not pass."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--source", type=Path, required=True, help="a clone of the repository")
    parser.add_argument("--out", type=Path, help="JSON of the outcome of each test, for benches.openmmlab_table")
    parser.add_argument("--without", action="store_true", help="mmcv-lite as it is, to compare")
    parser.add_argument("--patch", action="store_true", help="with rtmdet_fast.compat.mmdet.patch()")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--fake-gpu", action="store_true", help="tests for GPUs too, on the CPU")
    where.add_argument("--gpu", action="store_true", help="tests for GPUs alone, on one")
    parser.add_argument("--only", nargs="*", default=[], help="files or tests, from the suite's folder on")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("suite", "without", "patch", "fake_gpu", "gpu")}
    environment = {
        **os.environ,
        "JUDGE": json.dumps(settings),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    with tempfile.TemporaryDirectory() as folder:  # without their package, which would be taken for the installed one
        for name in ("tests", "configs"):
            if (arguments.source / name).is_dir():
                (Path(folder) / name).symlink_to((arguments.source / name).resolve())
        outcomes = Path(folder) / "outcomes.json"
        environment["JUDGE_OUTCOMES"] = str(outcomes)
        tests = [f"{SUITES[arguments.suite]}/{name}" for name in arguments.only] or [SUITES[arguments.suite]]
        options = [
            "-q",
            "-p",
            "benches.openmmlab_judge",
            "-p",
            "no:cacheprovider",
            "--tb=line",
            "--continue-on-collection-errors",
            "-W",
            "ignore",
        ]
        if arguments.fake_gpu:
            options += ["-k", "not gradient_numerical and not gradcheck"]  # thousands of forward passes
        subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=folder, env=environment, check=False)
        found = json.loads(outcomes.read_text())
    if arguments.out:
        arguments.out.write_text(json.dumps({**settings, "with": versions(), "tests": found}, indent=1))
    counts = collections.Counter(outcome["outcome"] for outcome in found.values())
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    if not arguments.without:
        sys.exit(_surprises(found, CANNOT[arguments.suite], arguments.fake_gpu))


def versions() -> dict[str, str]:
    """Of what there is in this environment."""
    found = {"Python": platform.python_version()}
    for name in ("torch", "torchvision", "numpy", "setuptools", "mmcv", "mmcv-lite", "mmdet", "mmrotate"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name).partition("+")[0]
    return found


def reason(suite: str, test: str) -> str | None:
    """Why a test of theirs cannot pass; None if that is not known."""
    return next((why for pattern, why in CANNOT[suite].items() if re.search(pattern, test)), None)


def _surprises(found: dict[str, dict[str, str]], cannot: dict[str, str], all_ran: bool) -> str | None:
    """What fails and is not listed, and what is listed and passes, if tests for GPUs ran: else many just return."""
    told = []
    for test, outcome in found.items():
        listed = any(re.search(pattern, test) for pattern in cannot)
        if outcome["outcome"] in ("failed", "error") and not listed:
            told.append(f"{test}: {outcome.get('why', '')}")
    for pattern in cannot:
        outcomes = {outcome["outcome"] for test, outcome in found.items() if re.search(pattern, test)}
        if all_ran and "passed" in outcomes and not outcomes & {"failed", "error"}:
            told.append(f"{pattern} passes: strike it from CANNOT")
    return "\n".join(["", *told]) if told else None


# What follows is a plugin of pytest, in the process that runs their tests.

_outcomes: dict[str, dict[str, str]] = {}


def pytest_configure() -> None:
    if "JUDGE" not in os.environ:
        return
    settings = json.loads(os.environ["JUDGE"])
    if not hasattr(collections, "Sequence"):
        collections.Sequence = collections.abc.Sequence  # type: ignore[attr-defined]  # for e2cnn
    if settings["fake_gpu"]:
        _take_cuda_for_the_cpu()
    if not settings["without"]:
        import rtmdet_fast.compat.mmcv_ext  # noqa: F401
    if settings["suite"] != "mmcv" and not settings["without"]:
        _prepare(settings["suite"])
    if settings["patch"]:
        from rtmdet_fast.compat.mmdet import patch

        patch()


def pytest_collection_modifyitems(config, items) -> None:
    """With `--gpu` those that name CUDA: most are skipped without a GPU, but some return at once there, and pass."""
    if not json.loads(os.environ.get("JUDGE", "{}")).get("gpu"):
        return
    sources = [inspect.getsource(item.cls or item.function) for item in items]  # of a class, with what its tests share
    ask = [item for item, source in zip(items, sources, strict=True) if asks_for_a_gpu(item.name, source)]
    config.hook.pytest_deselected(items=[item for item in items if item not in ask])
    items[:] = ask


def asks_for_a_gpu(name: str, source: str) -> bool:
    """Whether a test, with its decorators, does; of the same test for several devices not that for the CPU."""
    return "cuda" in source.lower() and not re.search(r"(?<![a-z])cpu(?![a-z])", name)


def pytest_collectreport(report) -> None:
    if report.failed:
        _outcomes[report.nodeid] = {"outcome": "error", "why": _last_line(report)}


def pytest_runtest_logreport(report) -> None:
    if report.when == "call" or report.outcome != "passed":
        found = {"outcome": report.outcome if report.when == "call" or report.skipped else "error"}
        if report.failed:
            found["why"] = _last_line(report)
        elif report.skipped:
            found["why"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        _outcomes[report.nodeid] = found


def pytest_sessionfinish() -> None:
    if "JUDGE_OUTCOMES" in os.environ:
        Path(os.environ["JUDGE_OUTCOMES"]).write_text(json.dumps(_outcomes))


def _last_line(report) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).strip().splitlines()[-1 if crash is None else 0][:300]


def _prepare(suite: str) -> None:
    """Their helpers look for the configs beside the package; and no weights are downloaded."""
    import importlib

    helpers = importlib.import_module(f"{suite}.testing._utils")
    helpers._get_config_directory = lambda: str(Path("configs").resolve())
    weight_init = importlib.import_module("mmengine.model.weight_init")
    weight_init.PretrainedInit.__call__ = lambda self, module: None  # nothing is downloaded: weights stay random


def _take_cuda_for_the_cpu() -> None:
    import torch
    from torch.overrides import TorchFunctionMode

    def on_cpu(x):
        if isinstance(x, torch.device) and x.type == "cuda":
            return torch.device("cpu")
        return "cpu" if isinstance(x, str) and re.fullmatch(r"cuda(:\d+)?", x) else x

    class CudaIsTheCpu(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.cuda:
                return args[0]
            return func(*map(on_cpu, args), **{key: on_cpu(value) for key, value in (kwargs or {}).items()})

    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_device = lambda: 0
    CudaIsTheCpu().__enter__()


if __name__ == "__main__":
    main()
