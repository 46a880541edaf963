"""Everything on a machine with a GPU, in one go and one file: `python -m benches.gpu`.

Needs torch, triton and numpy. First the kernels' parity tests (where pytest and hypothesis can be imported; both can be
carried along: `pip install --target carried pytest hypothesis`, then PYTHONPATH=carried), else the float64 verdict on
every kernel case; then the benches of kernels, forward passes, training steps, post-processing and layers. The file is
complete after every step: a run that is cut off leaves what it had. `--dry-run` does the same on a CPU, quickly.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benches import harness, run, table
from benches.harness import Case

KERNELS = ("assign", "rotated_iou", "nms", "dynamic_mask", "dwconv_bn_silu", "bn_silu")
OPS = (*KERNELS, "forward", "training", "postprocess", "layers")
TESTS = ("assign", "nms", "rotated_iou", "bn_silu", "dwconv_bn_silu", "dynamic_mask", "training_with_kernels")
SHARE_OF_TESTS = 0.4  # of the time, at most


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.gpu", description=__doc__)
    parser.add_argument("--time-limit", type=float, default=520, metavar="S", help="seconds in all (default 520)")
    parser.add_argument("--out", type=Path, help="JSON to write instead of results/<device>.json")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, few rounds: does it run at all?")
    args = parser.parse_args(argv)
    if not (torch.cuda.is_available() or args.dry_run):
        sys.exit("there is no CUDA device here; --dry-run goes through the same steps on a CPU")
    start = time.monotonic()
    device = torch.device("cpu" if args.dry_run else "cuda")
    path = args.out or (Path("runs/dry-run.json") if args.dry_run else run.committed(device))
    results = run.Results(device, path, args.ops, quick=args.dry_run)
    until = start + SHARE_OF_TESTS * args.time_limit
    if all(importlib.util.find_spec(name) for name in ("pytest", "hypothesis")):
        results.record["tests"] = run_tests(until - time.monotonic(), TESTS[-2:] if args.dry_run else TESTS)
    else:
        results.record["tests"] = {"why_not": "pytest or hypothesis is not installed"}
        results.record["verdicts"] = {}
        for case in run.cases_of([op for op in args.ops if op in KERNELS], device):
            late = time.monotonic() > until
            verdict = "not looked at: the time limit came first" if late else harness.verify(case, device)
            results.record["verdicts"][results.key(case)] = verdict
            print(f"{results.key(case)}: {verdict}", flush=True)
            results.write()
    results.write()
    measure_until(start + args.time_limit, run.cases_of(args.ops, device), results)
    if args.out is None and not args.dry_run:
        table.write(run.FOLDER)
    print(f"{time.monotonic() - start:.0f} s, {path}")
    sys.exit(0 if sound(results.record) else 1)


class OutOfTime(BaseException):
    """No `Exception`, which the harness would take for a contender's failure."""


def measure_until(end: float, cases: Sequence[Case], results: run.Results) -> None:
    """Measures until `time.monotonic()` is `end`, when it gives up also what is being compiled or measured."""

    def out_of_time(*_: Any) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, max(end - time.monotonic(), 0.001))
    try:
        run.measure_all(cases, results, end=end)
    except OutOfTime:
        known = results.record["cases"].keys() | results.record["not_measured"].keys()
        for case in cases:
            if results.key(case) not in known and (case.headline or not results.record["quick"]):
                results.not_measured(case, "the time limit came first")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run_tests(seconds: float, names: tuple[str, ...]) -> dict[str, Any]:
    """The parity tests, cut off after `seconds`; what was passed until then counts."""
    files = [f"tests/test_{name}.py" for name in names]
    command = [sys.executable, "-u", "-m", "pytest", *files, "-v", "--tb=short", "-p", "no:cacheprovider"]
    # what only compiles is the same on every machine, and would take most of the time
    command += ["-k", "not (lowering or traces or exports)"]
    start = time.monotonic()
    root = run.FOLDER.parent
    try:
        done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds)
        output, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        output, code = error.stdout or b"", None
    lines = output.decode(errors="replace").splitlines()
    outcomes: dict[str, list[str]] = {"PASSED": [], "SKIPPED": [], "FAILED": [], "ERROR": []}
    for line in lines:
        if found := re.match(r"(tests/\S+::.+?) (PASSED|SKIPPED|FAILED|ERROR)\b", line):
            outcomes[found[2]].append(found[1])
    failed = outcomes["FAILED"] + outcomes["ERROR"]
    print(f"tests: {len(outcomes['PASSED'])} passed, {len(failed)} failed, exit code {code}", flush=True)
    return {
        "finished": code is not None,
        "exit_code": code,
        "passed": len(outcomes["PASSED"]),
        "skipped": len(outcomes["SKIPPED"]),
        "failed": failed,
        "seconds": round(time.monotonic() - start, 1),
        "tail": lines[-60:] if code != 0 else lines[-1:],
    }


def sound(record: dict[str, Any]) -> bool:
    """Nothing that was looked at is wrong or failed."""
    verdicts = list(record.get("verdicts", {}).values())
    ours = [case["contenders"][case["ours"]]["status"] for case in record["cases"].values()]
    return (
        record["tests"].get("exit_code") in (0, None)
        and not record["tests"].get("failed")
        and not any(verdict.startswith(("wrong", "failed")) for verdict in verdicts)
        and not {"wrong", "failed"} & set(ours)
    )


if __name__ == "__main__":
    main()
