"""README.md and its pictures from results/*.json."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benches import chart

OPS = {
    "assign": "Assignment",
    "rotated_iou": "Pairwise rotated IoU",
    "nms": "NMS",
    "dynamic_mask": "Dynamic masks",
    "deformable_attention": "Deformable attention",
    "dwconv_bn_silu": "Depth-wise convolution + BatchNorm + SiLU",
    "bn_silu": "BatchNorm + SiLU",
    "quality_focal_loss": "Quality focal loss",
    "letterbox": "Letterbox",
    "layers": "Layers",
    "forward": "Forward pass of the whole network",
    "rtdetr": "RT-DETR's forward pass",
    "engines": "Network by every engine of a CPU",
    "predict": "From a JPEG to boxes, beside the network alone",
    "training": "Training step",
    "pipeline": "Input pipeline",
    "postprocess": "Post-processing",
    "matcher": "Hungarian matching",
}
KERNELS = (
    *("assign", "rotated_iou", "nms", "dynamic_mask", "deformable_attention", "dwconv_bn_silu", "bn_silu"),
    "quality_focal_loss",
    "letterbox",
)
PICTURES = {  # file name -> title, ops
    "kernels": ("Kernels", KERNELS),
    **{op: (title, (op,)) for op, title in OPS.items() if op not in KERNELS},
}
REASONS = {"absent": "not here", "wrong": "not timed, wrong", "failed": "failed"}
INTRO = """# Benches

Generated from `results/*.json` by `make bench` (`pytest benches --benchmark-only`, or `python -m benches.run` without
pytest; `make gpu` on a GPU machine, which also writes [docs/gpu.md](../docs/gpu.md)); do not edit. `make bench-compare`
tells what got slower since.

How many times faster ours is than each peer, and how many times less extra memory it takes at its peak: ratios of
medians, in brackets the quartiles of the ratios of single rounds. All contenders of a row ran in turns in one process
on the same inputs, after warm-up, and a contender whose result differed from the float64 result has no time. (Training
iterations with their data draw batches of their own: each is checked on its own. Input pipelines are random: they must
agree in the number and size of boxes and the grey level over 256 images.) A CPU's clock is "call". On a GPU "graph" is
a CUDA graph's replay (kernels only) over inputs that exceed the L2 cache, for
contenders that can be captured, and "call" a call between two synchronisations, launches included. Goals, and how long
the host takes of a call, stand in [docs/gpu.md](../docs/gpu.md).
Extra memory on a CPU is the growth of the resident set at its peak, on a GPU PyTorch's peak; outputs are included.
The bandwidth counts the bytes that the fused op must move, for every contender.
"""


def write(folder: Path) -> None:
    records = devices({path.stem: json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))})
    parts = [INTRO]
    for kind, heading in (("cpu", "CPU"), ("cuda", "GPU")):
        found = {stem: record for stem, record in records.items() if record["device"]["type"] == kind}
        measured = {case["op"] for record in found.values() for case in record["cases"].values()}
        for stem, record in found.items():
            here = {case["op"] for case in record["cases"].values()}
            parts.append(device_section(record, draw(folder, stem, record), elsewhere=measured - here))
        if not found:
            parts.append(f"## {heading}\n\nNot measured.\n")
    text = "\n".join(parts)
    part = folder / "README.part"
    part.write_text(text)
    part.replace(folder / "README.md")


def devices(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The records by file name, where those of the calls of `benches.gpu` on one device are one."""
    found: dict[str, dict[str, Any]] = {}
    for stem, record in records.items():
        stem = stem.removesuffix(f"-{record.get('call')}")
        if stem in found and found[stem]["versions"] == record["versions"]:
            for part in ("cases", "not_measured"):
                found[stem][part] = {**found[stem][part], **record[part]}
        else:
            found[stem if stem not in found else f"{stem}-{record.get('call')}"] = record
    return found


def draw(folder: Path, stem: str, record: dict[str, Any]) -> dict[str, str]:
    """Pictures of a device: op that a picture comes before -> path from `folder`; none without matplotlib."""
    pictures = {}
    for name, (title, ops) in PICTURES.items():
        cases = {key: case for key, case in record["cases"].items() if case["op"] in ops}
        path = Path("pictures") / f"{stem}-{name}.png"
        rows = chart.bars(cases, OPS)
        try:
            if rows:
                chart.draw(folder / path, f"{title}, {record['device']['name']}", rows)
                pictures[ops[0]] = path.as_posix()
        except ImportError:
            print("no pictures: matplotlib is not installed")
            return {}
    return pictures


def device_section(
    record: dict[str, Any], pictures: dict[str, str] | None = None, elsewhere: Collection[str] = ()
) -> str:
    """elsewhere: ops that another record of such a device measures."""
    device = dict(record["device"])
    kind = {"cpu": "CPU", "cuda": "GPU"}[device.pop("type")]
    facts = [f"{key.replace('_', ' ')} {value}" for key, value in device.items() if key != "name"]
    lines = [f"## {kind}: {device['name']}", "", f"{', '.join(facts)}.  "]
    lines.append(", ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".")
    if record["copy_gb_s"]:
        lines.append(f"\nCopy bandwidth, measured: {record['copy_gb_s']:.0f} GB/s, reads and writes counted.")
    shared = [case for case in record["cases"].values() if kind == "CPU" and (case["load"] or 0) > device["cores"] + 1]
    if shared:
        lines.append(f"\nOther programs kept the cores busy during {len(shared)} of {len(record['cases'])} cases.")
    if record.get("quick"):
        lines.append("\nA quick run: few rounds, not to be quoted.")
    for op, title in OPS.items():
        cases = {key: case for key, case in record["cases"].items() if case["op"] == op}
        missing = [key for key in record["not_measured"] if key.startswith(f"{op}: ") and key not in cases]
        if not (cases or missing) and op in elsewhere:
            continue
        if pictures and op in pictures:
            lines += ["", f"![Times as fast as each peer]({pictures[op]})"]
        lines += ["", f"### {title}", ""]
        lines += op_table(cases, record["copy_gb_s"]) if cases else ["Not measured."]
        lines += [f"- not measured: {key.removeprefix(f'{op}: ')} ({record['not_measured'][key]})" for key in missing]
    return "\n".join(lines) + "\n"


def op_table(cases: dict[str, dict[str, Any]], copy_gb_s: float | None) -> list[str]:
    bandwidth = copy_gb_s is not None and any(case["bytes"] for case in cases.values())
    head = ["case", "ours", "peer", "clock", "ours, ms", "peer, ms", "faster", "ours, MB", "peer, MB", "less memory"]
    head += ["ours, GB/s", "of copy"] * bandwidth
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    notes: dict[str, list[str]] = {}
    for key, case in cases.items():
        ours, entries = case["ours"], case["contenders"]
        title = key.split(": ", 1)[1]
        for name, entry in entries.items():
            if entry["status"] != "timed":
                notes.setdefault(f"{name}: {REASONS[entry['status']]} ({entry['why']})", []).append(title)
        for name, ratio in case["ratios"].items():
            clock = ratio["clock"]
            mine, theirs = entries[ours][clock], entries[name][clock]
            cells = [title, ours, name, clock, figures(mine["median"]), figures(theirs["median"])]
            cells.append(f"**{factor(ratio['time'])}** ({factor(ratio['q1'])} to {factor(ratio['q3'])})")
            cells += [megabytes(entries[n]["memory"]).removesuffix(" MB") for n in (ours, name)]
            cells.append("" if ratio["memory"] is None else factor(ratio["memory"]))
            if bandwidth:
                speed = mine.get("gb_s")
                cells += [f"{speed:.0f}", f"{speed / copy_gb_s:.0%}"] if speed else ["", ""]  # type: ignore[operator]
            lines.append("| " + " | ".join(cells) + " |")
        if not case["ratios"] and entries[ours]["status"] == "timed":
            notes.setdefault("no peer ran beside ours, so no time is shown", []).append(title)
    lines.append("")
    for (group, name), ratios in groups(cases).items():
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(f"- geometric mean of {len(ratios)} cases, {group}, against {name}: **{factor(mean)}**")
    everywhere = len(cases)
    lines += [
        f"- {note}" + ("" if len(titles) == everywhere else ": " + "; ".join(titles)) for note, titles in notes.items()
    ]
    loads = [case["load"] for case in cases.values() if case["load"] is not None]
    if loads and copy_gb_s is None:
        lines.append(f"- load average of the machine meanwhile: {min(loads)} to {max(loads)}")
    return lines


def groups(cases: dict[str, dict[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """Ratios by (group, peer), where a group has several cases and the peer was timed in all of them."""
    found: dict[tuple[str, str], list[float]] = {}
    sizes: dict[str, int] = {}
    for case in cases.values():
        if case["group"] is None:
            continue
        sizes[case["group"]] = sizes.get(case["group"], 0) + 1
        for name, ratio in case["ratios"].items():
            found.setdefault((case["group"], name), []).append(ratio["time"])
    return {key: ratios for key, ratios in found.items() if len(ratios) == sizes[key[0]] > 2}


def factor(value: float) -> str:
    return f"{figures(value)}x"


def figures(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(value: int | None) -> str:
    return "unknown" if value is None else f"{figures(value / 1e6)} MB"
