"""docs/gpu.md from the results of `python -m benches.gpu`: `python -m benches.gpu page`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benches import run, sweep, table

PAGE = Path(__file__).resolve().parents[1] / "docs/gpu.md"
NOT = "not measured"
MODELS = ("predict", "forward", "training", "rtdetr", "postprocess", "layers")
# what only compiles is the same on every machine, and would take most of the time
OF_KERNELS = ("-m", "not slow", "-k", "not (lowering or traces or exports)")
OF_GPUS = ("-m", "gpu")
TESTS: dict[str, tuple[str, ...]] = {  # those that take longest first
    **{
        f"tests/kernels/test_{name}.py": OF_KERNELS
        for name in (
            "dwconv_bn_silu", "assign", "bn_silu", "dynamic_mask", "rotated_iou", "nms", "deformable_attention",
            "quality_focal_loss", "training_with_kernels", "letterbox",
        )
    },
    "tests/training/test_step.py": OF_GPUS,
    "tests/predictor/test_graphs.py": OF_GPUS,
}  # fmt: skip
INTRO = """# On a GPU

Written by `python -m benches.gpu page` from `benches/results/*-parity.json`, `*-kernels.json` and `*-models.json`; do
not edit. To measure, on a machine with a CUDA device, in three calls of eight minutes:

```
make gpu-parity
make gpu-kernels
make gpu-models
```

`make gpu` makes all three, `OUT=folder` puts the results elsewhere, and `make gpu ARGS=--dry-run` goes through them on
a CPU. They need torch, triton and numpy; the tests also pytest and hypothesis. Each file is complete after every step.

Times are medians in milliseconds; contenders of a row ran in turns, each after its result had been found right. "graph"
is a CUDA graph's replay, kernels alone; "call" a call between two synchronisations; "host" the part of it until the
call returned: where it is most of "call", the device waits for the host ([how](../benches/README.md)).

"""
LATENCIES = {
    "RTMDet-tiny": "0.98", "RTMDet-s": "1.22", "RTMDet-m": "1.62", "RTMDet-l": "2.44", "RTMDet-x": "3.10",
    "RT-DETR-r18": "4.6", "RT-DETR-r50": "9.2",
}  # fmt: skip
"""Goals in milliseconds, NMS included: the published ones of TensorRT, of RTMDet without NMS on an RTX 3090, of RT-DETR
on a T4."""
Records = dict[str, dict[str, Any]]
"""Of one device the records by the call that made them."""


def write() -> None:
    PAGE.write_text(page(results()))


def results() -> Records:
    """The committed records; of several devices those of the last by name."""
    found: Records = {}
    for path in sorted((run.FOLDER / "results").glob("*.json")):
        record = json.loads(path.read_text())
        if record["device"]["type"] == "cuda" and "call" in record:
            found[record["call"]] = record
    return found


def page(records: Records) -> str:
    return INTRO + "\n".join(_lines(records)).rstrip() + "\n"


def _lines(records: Records) -> Iterator[str]:
    for record in list(records.values())[:1]:
        yield f"{record['device']['name']}: {', '.join(f'{name} {v}' for name, v in record['versions'].items())}.\n"
    if any(record["quick"] for record in records.values()):
        yield "Of a quick run: not to be quoted.\n"
    yield from _goals(records)
    yield from _parity(records.get("parity"))
    yield from _kernels(records.get("kernels"))
    yield from _constants(records.get("kernels"))
    yield from _models(records.get("models"))


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _found(records: Records, call: str, op: str, *words: str) -> list[dict[str, Any]]:
    """Cases of an op whose names have all the words."""
    cases = records.get(call, {}).get("cases", {}).values()
    return [case for case in cases if case["op"] == op and all(word in case["case"] for word in words)]


def _faster(call: str, op: str, *words: str, peer: str) -> Callable[[Records], float | None]:
    """How many times as fast as a peer, by the geometric mean of the cases."""

    def measured(records: Records) -> float | None:
        ratios = [case["ratios"][peer]["time"] for case in _found(records, call, op, *words) if peer in case["ratios"]]
        return statistics.geometric_mean(ratios) if ratios else None

    return measured


def _of_copy(records: Records) -> float | None:
    shares = [
        case["contenders"][case["ours"]]["graph"]["gb_s"] / records["kernels"]["copy_gb_s"]
        for case in _found(records, "kernels", "dwconv_bn_silu", "inference", "channels_last")
        if "graph" in case["contenders"][case["ours"]]
    ]
    return statistics.geometric_mean(shares) if shares else None


def _assignment(records: Records) -> float | None:
    for case in _found(records, "kernels", "assign", "32 images", "100 ground truths"):
        entry = case["contenders"][case["ours"]]
        if not case["case"].startswith("ATSS") and entry["status"] == "timed":
            return _time(entry)
    return None


def _images(records: Records) -> float | None:
    """Images a second of the training step of tiny as one graph, over mmdet's."""
    for case in _found(records, "models", "training", "step: RTMDet-tiny, 32 ", "20 ground truths"):
        entries = case["contenders"]
        names = ("triton, one CUDA graph", "mmdet")
        if all(entries.get(name, {}).get("status") == "timed" for name in names):
            ours, theirs = (_time(entries[name]) for name in names)
            return theirs / ours
    return None


def _frame(model: str) -> Callable[[Records], float | None]:
    """Milliseconds from a frame in memory to its detections, by the predictor."""

    def measured(records: Records) -> float | None:
        for case in _found(records, "models", "predict", f"{model}, 1 frame in memory"):
            entry = case["contenders"][case["ours"]]
            if entry["status"] == "timed":
                return _time(entry)
        return None

    return measured


def _beside_the_best_mode(records: Records) -> float | None:
    """How many times as fast as torch.compile in the mode that is the fastest of each model."""
    least: dict[str, float] = {}
    for case in _found(records, "models", "predict", "beside torch.compile"):
        model = case["case"].split(",")[0]
        ratios = [entry["time"] for entry in case["ratios"].values()]
        least[model] = min([*ratios, least.get(model, float("inf"))])
    return statistics.geometric_mean(least.values()) if least else None


def _times(value: float) -> str:
    return f"{table.figures(value)}x"


def _milliseconds(value: float) -> str:
    return f"{table.figures(value)} ms"


GOALS: tuple[tuple[str, str, Callable[[Records], float | None], Callable[[float], str]], ...] = (
    (
        "Depth-wise 5 x 5 inference, channels_last, beside torch.compile",
        "1.5x",
        _faster("kernels", "dwconv_bn_silu", "inference", "channels_last", peer="torch.compile"),
        _times,
    ),
    ("... of a copy's speed", "60 %", _of_copy, lambda value: f"{value:.0%}".replace("%", " %")),
    (
        "Depth-wise 5 x 5 forward and backward, channels_last, beside torch.compile",
        "2x",
        _faster("kernels", "dwconv_bn_silu", "training", "channels_last", peer="torch.compile"),
        _times,
    ),
    ("Assignment of 32 x 100 ground truths", "under 1 ms", _assignment, _milliseconds),
    (
        "NMS beside torchvision's, image by image",
        "2x",
        _faster("kernels", "nms", "boxes", peer="torchvision, per image"),
        _times,
    ),
    (
        "Deformable attention beside the public Triton kernel (msda-triton)",
        "1.1x",
        _faster("kernels", "deformable_attention", peer="msda-triton"),
        _times,
    ),
    ("... beside grid_sample", "4x", _faster("kernels", "deformable_attention", peer="grid_sample"), _times),
    ("Training of RTMDet-tiny, images a second beside mmdet's", "2.5x", _images, _times),
    *(
        (f"{model}: a frame to its detections at 640 px, fp16", f"under {goal} ms", _frame(model), _milliseconds)
        for model, goal in LATENCIES.items()
    ),
    ("... of RTMDet beside torch.compile in its best mode", "1.3x", _beside_the_best_mode, _times),
)


def _goals(records: Records) -> Iterator[str]:
    yield "## Goals\n"
    rows = []
    for what, goal, measured, told in GOALS:
        value = measured(records)
        rows.append((what, goal, NOT if value is None else told(value)))
    yield from _rows(("what", "goal", "measured"), rows)


def _parity(record: dict[str, Any] | None) -> Iterator[str]:
    yield "## Parity\n"
    files = (record or {}).get("tests", {}).get("files", {})
    rows = []
    for name in TESTS:
        file = files.get(name)
        if file is None or file["status"] == "not run":
            rows.append((f"`{name}`", NOT, NOT, NOT))
        else:
            failed = ", ".join(f"`{one.split('::', 1)[-1]}`" for one in file["failed"]) or "none"
            rows.append((f"`{name}`", file["status"], str(file["passed"]), failed))
    yield from _rows(("file", "status", "passed", "failed"), rows)
    if verdicts := (record or {}).get("verdicts"):
        wrong = {key: verdict for key, verdict in verdicts.items() if not verdict.startswith("right")}
        yield f"Without pytest: {len(verdicts) - len(wrong)} of {len(verdicts)} cases were found right in float64.\n"
        for key, verdict in wrong.items():
            yield f"- {key}: {verdict}"
        yield ""


def _time(entry: dict[str, Any]) -> float:
    return float(entry["graph" if "graph" in entry else "call"]["median"])


def _cell(case: dict[str, Any] | None, name: str) -> str:
    """A contender's time and, where it is not ours, how many times as fast ours is."""
    entry = None if case is None else case["contenders"].get(name)
    if case is None or entry is None:
        return NOT if case is None else ""
    if entry["status"] != "timed":
        return f"{table.REASONS[entry['status']]}: {entry['why']}".replace("|", "\\|")
    told = table.figures(_time(entry)) + (" (graph)" if "graph" in entry else "")
    return told + (f", {table.factor(case['ratios'][name]['time'])}" if name in case["ratios"] else "")


def _host(case: dict[str, Any] | None, name: str) -> str:
    entry = {} if case is None else case["contenders"].get(name, {})
    if "host" not in entry:
        return NOT if case is None else ""
    return f"{table.figures(entry['host']['median'])} of {table.figures(entry['call']['median'])}"


def _known(record: dict[str, Any] | None, ops: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
    """Op, name and result of all cases of a GPU."""
    cases = (record or {}).get("cases", {})
    for op in ops:
        for case in run.cases_of([op], torch.device("cuda")):
            yield op, case.name, cases.get(f"{op}: {case.name}")


def _kernels(record: dict[str, Any] | None) -> Iterator[str]:
    yield "## Kernels\n"
    yield "After a peer's time: how many times as fast ours is. More is in the [benches](../benches/README.md).\n"
    copy = (record or {}).get("copy_gb_s")
    for op in table.KERNELS:
        yield f"### {table.OPS[op]}\n"
        rows = []
        for _, name, case in _known(record, [op]):
            ours = None if case is None else case["contenders"][case["ours"]]
            speed = (ours or {}).get("graph", {}).get("gb_s")
            share = f"{speed / copy:.0%}" if speed and copy else NOT if case is None else ""
            peers = [_cell(case, peer) for peer in ("triton", "reference", "eager", "torch.compile")]
            rows.append((name, *peers, share, _host(case, "triton")))
        yield from _rows(("case", "ours", "reference", "eager", "torch.compile", "of copy", "host of call"), rows)


def _constants(record: dict[str, Any] | None) -> Iterator[str]:
    yield "## Constants\n"
    yield (
        "Of each constant at the top of a kernel's file (`TUNING`): its value now, the value that would be fastest by\n"
        f"the geometric mean of the cases that read it, if by more than {sweep.GAIN:.0%}, and all times.\n"
    )
    rows = []
    for name, row in (record or {}).get("sweep", {}).items():
        now = sweep.shown(tuple(row["now"]) if isinstance(row["now"], list) else row["now"])
        best = sweep.suggestion(row)
        times = "; ".join(
            f"{key.split(': ', 1)[1]}: "
            + ", ".join(f"{value} → {table.figures(time)}" for value, time in case["times"].items())
            for key, case in row["cases"].items()
            if case["times"]
        )
        gain = "" if best is None or best[0] == now else f"{best[1] - 1:.0%}"
        rows.append((f"`{name}`", now, NOT if best is None else best[0], gain, times or NOT))
    if not rows:
        rows = [(NOT,) * 5]
    yield from _rows(("constant", "now", "fastest", "gain", "ms by value"), rows)


def _models(record: dict[str, Any] | None) -> Iterator[str]:
    yield "## Models\n"
    for op in MODELS:
        yield f"### {table.OPS[op]}\n"
        cases = list(_known(record, [op]))
        built = run.cases_of([op], torch.device("cuda"))
        names = dict.fromkeys(contender.name for case in built for contender in case.contenders)
        ours = built[0].contenders[0].name
        several = any(case.images for case in built)
        head = ["case", *names, "host of call", *(["images a second"] if several else [])]
        rows = []
        for _, name, case in cases:
            row = [name, *(_cell(case, peer) for peer in names), _host(case, ours)]
            if several:
                entry = None if case is None else case["contenders"][case["ours"]]
                timed = case is not None and entry is not None and entry["status"] == "timed" and case.get("images")
                row.append(
                    f"{case['images'] / entry['call']['median'] * 1e3:.0f}"  # type: ignore[index]
                    if timed
                    else NOT
                    if case is None
                    else ""
                )
            rows.append(row)
        yield from _rows(head, rows)
