"""Everything on a machine with a GPU, in three calls of eight minutes: `python -m benches.gpu parity|kernels|models`.

Needs torch, triton and numpy; what else is to be looked at can be carried along (`pip install --target carried pytest
hypothesis pytest-xdist opencv-python-headless`, then PYTHONPATH=carried). Each call has a file of its own under `--out`
and is of use alone; the file is complete after every step, so that a run that is cut off leaves what it had.

parity: the kernels' tests, file by file, side by side; without pytest the float64 verdict on every case of a kernel.
kernels: first every headline case once, side by side, which compiles; then their times, those of other values of the
constants at the top of the kernels' files, and those of other shapes and of the contiguous layout.
models: predict, forward, training and RT-DETR, then other sizes, and last what torch.compile takes minutes for.

`--dry-run` goes through a call on a CPU, quickly. `python -m benches.gpu page` writes docs/gpu.md from the results.
What measures is a process of its own for each op: what hangs, or leaves a CUDA context that nothing runs in any more,
takes nothing else with it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benches import gpu_page, harness, run, sweep, table
from benches.gpu_page import MODELS, OF_GPUS, TESTS
from benches.harness import Case
from benches.table import KERNELS

OF_DRY_RUNS = {
    "tests/kernels/test_letterbox.py": ("-k", "normalisation or scales or graph"),
    "tests/training/test_step.py": OF_GPUS,
}
OF_KERNELS = {"check": 0.25, "headline": 0.6, "sweep": 0.85, "rest": 1.0}
"""Stages, and the share of the time until which each may last at most."""
OF_MODELS = {"headline": 0.6, "rest": 0.8, "late": 1.0}
LATE = "the time limit came first"
CUT_OFF = "cut off"


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.what == "page":
        gpu_page.write()
        return
    if not (torch.cuda.is_available() or args.dry_run):
        sys.exit("there is no CUDA device here; --dry-run goes through the same steps on a CPU")
    device = torch.device("cpu" if args.dry_run else "cuda")
    end = time.monotonic() + args.time_limit
    if args.part:
        measure_part(args.part, args, device, end)
        return
    start = time.monotonic()
    folder = args.out or (Path("runs/dry-run") if args.dry_run else run.FOLDER / "results")
    folder = folder.resolve()  # the processes that measure are started elsewhere
    path = folder / f"{run.slug(device)}-{args.what}.json"
    results = run.Results(device, path, run.OPS, quick=args.dry_run)
    results.record = {key: x for key, x in results.record.items() if key not in ("tests", "verdicts", "sweep")}
    results.record["call"] = args.what
    results.write()
    {"parity": parity, "kernels": kernels, "models": models}[args.what](results, start, args.time_limit)
    results.record["seconds"] = round(time.monotonic() - start)
    results.write()
    if args.out is None and not args.dry_run:
        table.write(run.FOLDER)
        gpu_page.write()
    print(f"{time.monotonic() - start:.0f} s, {path}")
    sys.exit(0 if sound(results.record) else 1)


def parity(results: run.Results, start: float, seconds: float) -> None:
    end = start + seconds
    if all(importlib.util.find_spec(name) for name in ("pytest", "hypothesis")):
        files = dict(OF_DRY_RUNS if results.record["quick"] else TESTS)
        if not importlib.util.find_spec("cv2"):
            files = {name: options for name, options in files.items() if options != OF_GPUS}
        run_tests(results, files, end)
        return
    results.record["tests"] = {"why_not": "pytest or hypothesis is not installed", "files": {}}
    jobs = {op: ("--part", "verify", "--ops", op) for op in KERNELS}
    judge(results, jobs, end)


def kernels(results: run.Results, start: float, seconds: float) -> None:
    quick = results.record["quick"]
    cases = [case for op in KERNELS for case in _cases(results, op) if case.headline]
    jobs = {
        results.key(case): ("--part", "check", "--ops", case.op, "--only", case.name)
        for case in (
            [case for case in cases if case.op == "nms"][:1] if quick else cases
        )  # a CPU's reads constants too
    }
    judge(results, jobs, start + OF_KERNELS["check"] * seconds)
    for stage in ("headline", "sweep", "rest"):
        measure_parts([(stage, [op]) for op in KERNELS], results, start + OF_KERNELS[stage] * seconds)


def models(results: run.Results, start: float, seconds: float) -> None:
    for stage, share in OF_MODELS.items():
        measure_parts([(stage, [op]) for op in MODELS], results, start + share * seconds)


def stage_of(case: Case) -> str:
    return "late" if case.late else "headline" if case.headline else "rest"


def _cases(results: run.Results, op: str) -> list[Case]:
    """None where the op needs what is not installed."""
    try:
        return run.cases_of([op], results.device)
    except ImportError as error:
        results.record["not_measured"][f"{op}: all"] = f"{error}"
        results.write()
        return []


def measure_parts(parts: Sequence[tuple[str, Sequence[str]]], results: run.Results, end: float) -> None:
    """Measures stages of ops, each in a process, which gets up to twice its share of the time until `end`."""
    wanted = {}
    for stage, ops in parts:
        found = [case for op in ops for case in _cases(results, op)]
        if stage == "sweep":
            found = [case for case in found if any(results.key(case) in row["cases"] for row in _rows(results))]
        else:
            found = [case for case in found if stage_of(case) == stage and (case.headline or not _quick(results))]
        if found:
            wanted[stage, tuple(ops)] = found
    for i, ((stage, ops), cases) in enumerate(wanted.items()):
        left = max(end - time.monotonic(), 1)
        limit = min(left, 2 * left / (len(wanted) - i))
        command = [*_command(results, limit), "--part", stage, "--ops", *ops]
        why = LATE
        try:
            if code := subprocess.run(command, cwd=run.FOLDER.parent, timeout=limit).returncode:
                why = f"the process that measured {', '.join(ops)} ended with exit code {code}"
        except subprocess.TimeoutExpired:
            pass
        results.record = json.loads(results.path.read_text())
        known = results.record["cases"].keys() | results.record["not_measured"].keys()
        for case in cases if stage != "sweep" else ():
            if results.key(case) not in known:
                results.not_measured(case, why)


def _rows(results: run.Results) -> list[dict[str, Any]]:
    return list(results.record.get("sweep", {}).values())


def _quick(results: run.Results) -> bool:
    return bool(results.record["quick"])


def _command(results: run.Results, limit: float) -> list[str]:
    command = [sys.executable, "-m", "benches.gpu", results.record["call"]]
    command += ["--out", str(results.path), "--time-limit", str(limit)]
    return command + ["--dry-run"] * _quick(results)


def measure_part(part: str, args: argparse.Namespace, device: torch.device, end: float) -> None:
    """What a process of its own does: `--out` is the file then."""
    cases = [case for case in run.cases_of(args.ops, device) if args.only in ("", case.name)]
    if part in ("verify", "check"):
        for case in cases:
            _tell("verdict", f"{case.op}: {case.name}", harness.verify(case, device))
        if part == "check":
            for case in cases:
                harness.compile_first(case)  # as one beside many
            for row in sweep.checked(sweep.swept(run.cases_of(args.ops, device)), cases, device, quick=args.dry_run):
                _tell("row", row)
        return
    if part == "sweep":
        results = run.Results(device, args.out, args.ops, quick=args.dry_run, only=())
        sweep.measure(cases, results, end)
        return
    cases = [case for case in cases if stage_of(case) == part]
    results = run.Results(device, args.out, args.ops, quick=args.dry_run, only=cases)
    run.measure_all(cases, results, end=end)


def _tell(*what: Any) -> None:
    print(TOLD + json.dumps(what), flush=True)


TOLD = "told: "
"""How a line begins that is meant for the process that reads it."""


def judge(results: run.Results, jobs: Mapping[str, Sequence[str]], end: float) -> None:
    """Runs processes side by side and keeps what they tell."""
    verdicts = results.record.setdefault("verdicts", {})
    rows = results.record.setdefault("sweep", {})

    def told(name: str, line: str) -> None:
        if not line.startswith(TOLD):
            return
        kind, *what = json.loads(line.removeprefix(TOLD))
        if kind == "verdict":
            verdicts[what[0]] = what[1]
            print(f"{what[0]}: {what[1]}", flush=True)
        else:
            sweep.keep(rows, what[0])
        results.write()

    def ended(name: str, code: int | None, seconds: float) -> None:
        if code != 0:
            verdicts[name] = CUT_OFF if code is None else f"failed: exit code {code}"
            results.write()

    # `--out` is not written to
    commands = {name: [*_command(results, end - time.monotonic()), *options] for name, options in jobs.items()}
    side_by_side(commands, max(run.cores() - 2, 2), end, told, ended)


def side_by_side(
    commands: Mapping[str, Sequence[str]],
    most: int,
    end: float,
    told: Callable[[str, str], None],
    ended: Callable[[str, int | None, float], None],
) -> None:
    """Runs commands, `most` at a time: tells of every line of output, and of every end its exit code and seconds.

    The code is None where a command was cut off at `end`, with all processes that it had started. What is told comes
    from one thread at a time.
    """
    lock = threading.Lock()

    def work(name: str) -> tuple[int | None, float]:
        begun = time.monotonic()
        if begun >= end:
            return None, 0.0
        process = subprocess.Popen(
            commands[name],
            cwd=run.FOLDER.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        running[name] = process
        cut = threading.Event()
        timer = threading.Timer(max(end - begun, 0), lambda: (cut.set(), _kill(process)))
        timer.daemon = True
        timer.start()
        assert process.stdout is not None
        try:
            with process.stdout:
                for line in process.stdout:
                    with lock:
                        told(name, line.rstrip("\n"))
            code = process.wait()
        finally:
            timer.cancel()
        return (None if cut.is_set() else code), time.monotonic() - begun

    running: dict[str, subprocess.Popen[str]] = {}
    with ThreadPoolExecutor(most) as pool:
        futures = {pool.submit(work, name): name for name in commands}
        try:
            for future in as_completed(futures):
                code, seconds = future.result()
                with lock:
                    ended(futures[future], code, seconds)
        finally:
            for future in futures:
                future.cancel()
            for process in running.values():
                _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def run_tests(results: run.Results, files: Mapping[str, Sequence[str]], end: float) -> None:
    """The parity tests, file by file and side by side; a file is sound where it ended, and nothing in it failed."""
    cores = run.cores()
    spread = importlib.util.find_spec("xdist") is not None and not os.environ.get("PYTEST_XDIST_WORKER")
    most = max(cores // 3, 2) if spread else max(cores, 2)
    found: dict[str, dict[str, Any]] = {name: {"status": "not run"} for name in files}
    record = {"files": found, "seconds": 0.0, "tail": []}
    results.record["tests"] = record
    results.write()
    outcomes: dict[str, dict[str, list[str]]] = {name: {} for name in files}
    tails: dict[str, list[str]] = {name: [] for name in files}
    begun = time.monotonic()

    def told(name: str, line: str) -> None:
        if outcome := re.search(r"(tests/\S+::.+?) (PASSED|SKIPPED|FAILED|ERROR)\b", line):
            outcomes[name].setdefault(outcome[2], []).append(outcome[1])
        elif outcome := re.search(r"\] (PASSED|SKIPPED|FAILED|ERROR) (tests/\S+::.+)", line):  # of xdist
            outcomes[name].setdefault(outcome[1], []).append(outcome[2].strip())
        tails[name] = [*tails[name][-29:], line]

    def ended(name: str, code: int | None, seconds: float) -> None:
        count = {kind: outcomes[name].get(kind, []) for kind in ("PASSED", "SKIPPED", "FAILED", "ERROR")}
        found[name] = {
            "status": CUT_OFF if code is None else "ended",
            "exit_code": code,
            "passed": len(count["PASSED"]),
            "skipped": len(count["SKIPPED"]),
            "failed": count["FAILED"] + count["ERROR"],
            "seconds": round(seconds, 1),
        }
        record["tail"] += tails[name] if code != 0 else tails[name][-1:]
        record["seconds"] = round(time.monotonic() - begun, 1)
        results.write()
        print(f"{name}: {found[name]}", flush=True)

    # the project's own options name no tests; warnings of whatever versions are here are no verdict on the kernels
    common = ["-o", "addopts=", "-v", "--tb=short", "-W", "default", "-p", "no:cacheprovider"]
    common += ["-n", str(max(cores // most, 1))] if spread else []
    commands = {
        name: [sys.executable, "-u", "-m", "pytest", name, *options, *common] for name, options in files.items()
    }
    side_by_side(commands, most, end, told, ended)


def sound(record: dict[str, Any]) -> bool:
    """Nothing that was looked at is wrong or failed, and no file of tests was left before its end."""
    files = record.get("tests", {}).get("files", {})
    ours = [case["contenders"][case["ours"]]["status"] for case in record["cases"].values()]
    bad = ("wrong", "failed", CUT_OFF) if record.get("call") == "parity" else ("wrong", "failed")
    return (
        all(
            file["status"] == "ended"
            and file["exit_code"] == 0
            and not file["failed"]
            and file["passed"] + file["skipped"] > 0
            for file in files.values()
        )
        and not any(verdict.startswith(bad) for verdict in record.get("verdicts", {}).values())
        and not {"wrong", "failed"} & set(ours)
        and not any("exit code" in why for why in record["not_measured"].values())
        and (record.get("call") != "parity" or bool(files or record.get("verdicts")))
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benches.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("parity", "kernels", "models", "page"))
    parser.add_argument("--time-limit", type=float, default=470, metavar="S", help="seconds in all (default 470)")
    parser.add_argument("--out", type=Path, help="folder for the results, instead of benches/results")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, few rounds: does it run at all?")
    # what a process of its own does
    hidden: Any = partial(parser.add_argument, help=argparse.SUPPRESS)
    hidden("--part", choices=("verify", "check", "headline", "sweep", "rest", "late"))
    hidden("--ops", nargs="+", choices=run.OPS, default=run.OPS)
    hidden("--only", default="")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing that was started outlives this process
    main()
