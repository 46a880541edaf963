"""Everything on a machine with a GPU, in one go and one file: `python -m benches.gpu`.

Needs torch, triton and numpy. First the kernels' parity tests (where pytest and hypothesis can be imported; both can be
carried along: `pip install --target carried pytest hypothesis`, then PYTHONPATH=carried), else the float64 verdict on
every kernel case; then the benches of kernels, forward passes, training steps, post-processing and layers. The file is
complete after every step: a run that is cut off leaves what it had. `--dry-run` does the same on a CPU, quickly.

Each file of tests and each kernel has a process of its own: what hangs, or leaves a CUDA context that nothing runs in
any more, takes nothing else with it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benches import harness, run, table

KERNELS = (
    "assign",
    "rotated_iou",
    "nms",
    "dynamic_mask",
    "deformable_attention",
    "dwconv_bn_silu",
    "bn_silu",
    "quality_focal_loss",
    "letterbox",
)
OPS = (*KERNELS, "forward", "rtdetr", "engines", "training", "postprocess", "matcher", "layers")
TESTS = (
    "assign", "nms", "rotated_iou", "bn_silu", "dwconv_bn_silu", "dynamic_mask", "deformable_attention",
    "quality_focal_loss", "letterbox", "training_with_kernels",
)  # fmt: skip
SHARE_OF_TESTS = 0.4  # of the time, at most
LATE = "the time limit came first"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.gpu", description=__doc__)
    parser.add_argument("--time-limit", type=float, default=520, metavar="S", help="seconds in all (default 520)")
    parser.add_argument("--out", type=Path, help="JSON to write instead of results/<device>.json")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, few rounds: does it run at all?")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)  # what a process of its own does
    args = parser.parse_args(argv)
    if not (torch.cuda.is_available() or args.dry_run):
        sys.exit("there is no CUDA device here; --dry-run goes through the same steps on a CPU")
    start = time.monotonic()
    device = torch.device("cpu" if args.dry_run else "cuda")
    path = args.out or (Path("runs/dry-run.json") if args.dry_run else run.committed(device))
    tested = all(importlib.util.find_spec(name) for name in ("pytest", "hypothesis"))
    results = run.Results(device, path, args.ops, quick=args.dry_run)
    if args.part:
        measure_part(results, args.ops, start + args.time_limit, verify=not tested)
        return
    results.record["verdicts"] = {}
    results.record["tests"] = {"why_not": "pytest or hypothesis is not installed"}
    if tested:
        names = TESTS[-2:] if args.dry_run else TESTS
        results.record["tests"] = run_tests(SHARE_OF_TESTS * args.time_limit, names)
    results.write()
    parts = [[op] for op in args.ops if op in KERNELS] + [[op for op in args.ops if op not in KERNELS]]
    measure_parts([part for part in parts if part], results, start + args.time_limit)
    if args.out is None and not args.dry_run:
        table.write(run.FOLDER)
    print(f"{time.monotonic() - start:.0f} s, {path}")
    sys.exit(0 if sound(results.record) else 1)


def measure_parts(parts: Sequence[Sequence[str]], results: run.Results, end: float) -> None:
    """Measures each of the lists of ops in a process, which gets up to twice its share of the time until `end`."""
    for i, ops in enumerate(parts):
        left = max(end - time.monotonic(), 1)
        limit = min(left, 2 * left / (len(parts) - i))
        command = [
            sys.executable,
            "-m",
            "benches.gpu",
            "--part",
            "--out",
            str(results.path),
            "--time-limit",
            str(limit),
        ]
        command += ["--dry-run"] * (results.device.type == "cpu") + ["--ops", *ops]
        why = LATE
        try:
            if code := subprocess.run(command, cwd=run.FOLDER.parent, timeout=limit).returncode:
                why = f"the process that measured {', '.join(ops)} ended with exit code {code}"
        except subprocess.TimeoutExpired:
            pass
        results.record = json.loads(results.path.read_text())
        known = results.record["cases"].keys() | results.record["not_measured"].keys()
        for case in run.cases_of(ops, results.device):
            if results.key(case) not in known and (case.headline or not results.record["quick"]):
                results.not_measured(case, why)


def measure_part(results: run.Results, ops: Sequence[str], end: float, *, verify: bool) -> None:
    cases = run.cases_of(ops, results.device)
    for case in cases:
        if verify and case.op in KERNELS:
            verdict = harness.verify(case, results.device)
            results.record.setdefault("verdicts", {})[results.key(case)] = verdict
            print(f"{results.key(case)}: {verdict}", flush=True)
            results.write()
    run.measure_all(cases, results, end=end)


def run_tests(seconds: float, names: tuple[str, ...]) -> dict[str, Any]:
    """The parity tests, file by file, each cut off after twice its share of the time; what was passed counts."""
    start = time.monotonic()
    outcomes: dict[str, list[str]] = {"PASSED": [], "SKIPPED": [], "FAILED": [], "ERROR": []}
    codes: dict[str, int | None] = {}
    tail = []
    for i, name in enumerate(names):
        command = [sys.executable, "-u", "-m", "pytest", f"tests/kernels/test_{name}.py", "-v", "--tb=short"]
        command += ["-W", "default"]  # warnings of whatever versions are here are no verdict on the kernels
        # what only compiles is the same on every machine, and would take most of the time
        command += ["-p", "no:cacheprovider", "-k", "not (lowering or traces or exports)"]
        left = max(seconds - (time.monotonic() - start), 1)
        limit = min(left, 2 * left / (len(names) - i))
        try:
            done = subprocess.run(
                command, cwd=run.FOLDER.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit
            )
            output, codes[name] = done.stdout, done.returncode
        except subprocess.TimeoutExpired as error:
            output, codes[name] = error.stdout or b"", None
        lines = output.decode(errors="replace").splitlines()
        for line in lines:
            if found := re.match(r"(tests/\S+::.+?) (PASSED|SKIPPED|FAILED|ERROR)\b", line):
                outcomes[found[2]].append(found[1])
        tail += lines[-30:] if codes[name] != 0 else lines[-1:]
    failed = outcomes["FAILED"] + outcomes["ERROR"]
    print(f"tests: {len(outcomes['PASSED'])} passed, {len(failed)} failed, exit codes {codes}", flush=True)
    return {
        "exit_codes": codes,  # null: cut off
        "passed": len(outcomes["PASSED"]),
        "skipped": len(outcomes["SKIPPED"]),
        "failed": failed,
        "seconds": round(time.monotonic() - start, 1),
        "tail": tail,
    }


def sound(record: dict[str, Any]) -> bool:
    """Nothing that was looked at is wrong or failed."""
    verdicts = list(record.get("verdicts", {}).values())
    ours = [case["contenders"][case["ours"]]["status"] for case in record["cases"].values()]
    return (
        all(code in (0, None) for code in record["tests"].get("exit_codes", {}).values())
        and not record["tests"].get("failed")
        and not any(verdict.startswith(("wrong", "failed")) for verdict in verdicts)
        and not {"wrong", "failed"} & set(ours)
        and not any("exit code" in why for why in record["not_measured"].values())
    )


if __name__ == "__main__":
    main()
