"""Measures what can run here: `python -m benches.run`; `--table` only writes README.md from the results.

It needs no pytest; `pytest benches --benchmark-only` measures the same cases in the same way (test_cases.py).
Results go to results/<device>.json after every case, so that what was measured before a cut stays.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benches import harness, table
from benches.harness import Case
from rtmdet_fast.kernels import _dispatch

FOLDER = Path(__file__).resolve().parent
OPS = (  # in order of importance
    "assign",
    "rotated_iou",
    "nms",
    "dynamic_mask",
    "deformable_attention",
    "dwconv_bn_silu",
    "bn_silu",
    "quality_focal_loss",
    "letterbox",
    "forward",
    "rtdetr",
    "engines",
    "predict",
    "training",
    "postprocess",
    "matcher",
    "layers",
    "pipeline",
)
PINNED = {"MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_MMAP_THRESHOLD_": str(2**34)}
PACKAGES = ("torch", "triton", "numpy", "torchvision", "mmcv", "mmdet", "opencv-python")


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.table:
        table.write(FOLDER)
        return
    if args.malloc != "as-is" and malloc_kind() != args.malloc:
        # malloc reads its settings when a process starts
        rest = sys.argv[1:] if argv is None else list(argv)
        environment = {key: value for key, value in os.environ.items() if key not in PINNED}
        environment |= PINNED if args.malloc == "pinned" else {}
        os.execve(sys.executable, [sys.executable, "-m", "benches.run", *rest], environment)
    if _dispatch.BACKEND != "auto":
        sys.exit("unset RTMDET_FAST_KERNELS: the benches choose the implementation themselves")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    end = time.monotonic() + args.time_limit
    if device.type == "cuda" and args.malloc == "pinned":
        print("on a GPU malloc makes no difference: nothing to measure")
        return
    out = args.out or committed(device)
    cases = [case for case in cases_of(args.ops, device) if args.only in case.name]
    only = cases if args.only else None
    measure_all(cases, Results(device, out, args.ops, quick=args.quick, only=only), end=end)
    if device.type == "cpu" and args.malloc == "as-is" and malloc_kind() == "default" and "assign" in args.ops:
        # most of the published assigner's time on a CPU goes into memory that malloc returns and fetches again
        command = [sys.executable, "-m", "benches.run", "--malloc", "pinned", "--ops", "assign", "--out", str(out)]
        command += ["--time-limit", str(max(end - time.monotonic(), 1)), "--only", args.only] + ["--quick"] * args.quick
        subprocess.run(command, check=True)
    if args.out is None:
        table.write(FOLDER)


def cases_of(ops: Sequence[str], device: torch.device) -> list[Case]:
    return [case for op in ops for case in importlib.import_module(f"benches.bench_{op}").cases(device)]


class Results:
    """What is measured on a device, in a file that is complete after every case.

    Of an older file in the same environment, what it says of other ops and the other malloc setting stays; and of
    other cases than `only`, where that is given.
    """

    def __init__(
        self,
        device: torch.device,
        path: Path,
        ops: Sequence[str],
        *,
        quick: bool = False,
        only: Sequence[Case] | None = None,
    ):
        cuda = device.type == "cuda"
        if cuda:
            torch.backends.cudnn.benchmark = True
        self.device, self.path = device, path
        self.record: dict[str, Any] = {"device": describe(device), "versions": versions(), "quick": quick}
        old = json.loads(path.read_text()) if path.exists() else {}
        same = all(old.get(key) == self.record[key] for key in self.record)
        known = old.get("copy_gb_s") if same and only is not None else None
        self.record["copy_gb_s"] = (known or harness.copy_bandwidth(device)) if cuda else None
        # of `benches.gpu`
        self.record |= {key: old[key] for key in ("call", "tests", "verdicts", "sweep") if same and key in old}
        pinned = bool(self.key_suffix)
        anew = None if only is None else {self.key(case) for case in only}
        for part in ("not_measured", "cases"):
            entries = old[part] if same else {}
            self.record[part] = {
                key: entry
                for key, entry in entries.items()
                if (key.split(":")[0] not in ops or key.endswith("not trimming") != pinned)
                or (anew is not None and key not in anew)
            }

    @property
    def key_suffix(self) -> str:
        return ", malloc not trimming" if malloc_kind() == "pinned" else ""

    def key(self, case: Case) -> str:
        return f"{case.op}: {case.name}{self.key_suffix}"

    def measure(self, case: Case) -> tuple[dict[str, Any] | None, dict[str, dict[str, list[float]]]]:
        """The case's entry, None if it could not be measured at all, and its samples."""
        cuda, quick = self.device.type == "cuda", self.record["quick"]
        budget: dict[str, Any] = (
            dict(seconds=0.2, least=3, most=10) if quick else dict(seconds=1.0 if cuda else 5.0, least=case.least)
        )
        try:
            entry = harness.measure(case, self.device, **budget)
        except Exception as error:  # the inputs or the float64 result: the other cases still count
            self.not_measured(case, f"{type(error).__name__}: {error}"[:300])
            return None, {}
        samples = entry.pop("samples")
        self.record["cases"][self.key(case)] = entry
        self.write()
        print(f"{self.key(case)}\n{summary(entry)}", flush=True)
        if cuda:
            torch.cuda.empty_cache()
        return entry, samples

    def not_measured(self, case: Case, why: str) -> None:
        self.record["not_measured"][self.key(case)] = why
        self.write()
        print(f"{self.key(case)}: not measured, {why}", flush=True)

    def write(self) -> None:
        write_json(self.path, self.record)


def measure_all(cases: Sequence[Case], results: Results, *, end: float) -> None:
    """Measures, the headline cases first (in a quick run only those), until `time.monotonic()` is past `end`."""
    for case in sorted(cases, key=lambda case: not case.headline):
        if time.monotonic() > end:
            results.not_measured(case, "the time limit came first")
        elif case.headline or not results.record["quick"]:
            results.measure(case)
            if results.device.type == "cuda":
                torch.cuda.synchronize()  # raises where a kernel went astray: nothing runs in this process any more


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Whoever reads `path` finds the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)


def summary(entry: dict[str, Any]) -> str:
    lines = []
    for name, contender in entry["contenders"].items():
        text = contender.get("why") or contender["parity"]
        if contender["status"] == "timed":
            times = ", ".join(f"{contender[c]['median']:.4g} ms {c}" for c in ("call", "graph") if c in contender)
            text = f"{times}, {table.megabytes(contender['memory'])} extra, {text}"
        if name in entry["ratios"]:
            text = f"x{entry['ratios'][name]['time']:.2f} " + text
        lines.append(f"    {name}: {contender['status']}, {text}")
    return "\n".join(lines)


def malloc_kind() -> str:
    found = harness.malloc_settings()
    return "pinned" if found == PINNED else "other" if any(found.values()) else "default"


def describe(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "memory_gb": round(properties.total_memory / 1e9),
            "multiprocessors": properties.multi_processor_count,
            "cudnn_benchmark": True,
        }
    return {"type": "cpu", "name": processor(), "cores": cores(), "threads": torch.get_num_threads()}


def slug(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {cores()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def committed(device: torch.device) -> Path:
    """The file in the repository for devices of this kind."""
    return FOLDER / "results" / f"{slug(device)}.json"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def versions() -> dict[str, str]:
    here = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    return here | {package: version(package) for package in PACKAGES}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benches.run", description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT; the others' stay")
    parser.add_argument("--quick", action="store_true", help="few rounds of the headline cases")
    parser.add_argument("--out", type=Path, help="JSON to write instead of results/<device>.json; README.md stays")
    parser.add_argument("--time-limit", type=float, default=1800, metavar="S", help="start no case after S seconds")
    parser.add_argument("--table", action="store_true", help="measure nothing, write README.md")
    parser.add_argument(
        "--malloc",
        choices=("as-is", "default", "pinned"),
        default="as-is",
        help="glibc's settings for this run; pinned: freed memory is kept. On a CPU, as-is measures assign with both",
    )
    return parser


if __name__ == "__main__":
    main()
