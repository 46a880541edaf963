"""`accelerate` on every model of timm: what is fused, what is left and why, and whether the outputs stay.

    python -m benches.timm_models

writes docs/timm.md from what it measured (`benches/timm_models.json`), and goes on where it was stopped. Weights are
random; where something is fused, outputs, gradients and running statistics are compared, in training and inference.
Needs timm and the torchvision that belongs to the installed torch.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from rtmdet_fast.acceleration import DEPTHWISE, EPILOGUE, accelerate
from rtmdet_fast.files import write_atomically

RESULTS = Path(__file__).with_name("timm_models.json")
PAGE = Path(__file__).resolve().parents[1] / "docs/timm.md"
SIZES = (64, 96, 128)  # pixels; then the size of the model's own settings
INTRO = """# timm's models under `accelerate`

Written by `python -m benches.timm_models` from what it measured (`benches/timm_models.json`); do not edit.
What is not counted here has not been looked at yet: the command goes on where it was stopped.

"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benches.timm_models", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=[], metavar="PATTERN", help="as timm.list_models takes them")
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the page")
    args = parser.parse_args(argv)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"models": {}, "made with": {}}
    if not args.table:
        import timm

        results["made with"] = {"timm": timm.__version__, "torch": torch.__version__}
        rows, names = results["models"], timm.list_models(args.models or "")
        for name in tqdm([name for name in names if args.again or name not in rows], unit="model"):
            rows[name] = survey(name)
            _write(results)
        compared = {name for name in names if "fused" in rows[name] and "compared" not in rows[name]}
        for name in tqdm(sorted(compared, key=lambda name: rows[name]["parameters"]), unit="comparison"):
            rows[name]["compared"] = compare(name)
            _write(results)
    _write(results)


def _write(results: dict[str, Any]) -> None:
    rows = (f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(results["models"].items()))
    text = f'{{\n "made with": {json.dumps(results["made with"])},\n "models": {{\n' + ",\n".join(rows) + "\n }\n}\n"
    for path, content in ((RESULTS, text), (PAGE, page(results))):
        with write_atomically(path) as file:
            file.write(content.encode())


def survey(name: str) -> dict[str, Any]:
    """What `accelerate` finds in a model without weights."""
    from timm.models import model_entrypoint

    row: dict[str, Any] = {"family": model_entrypoint(name).__module__.rpartition(".")[2]}
    try:
        model = build(name, "meta")
    except Exception:  # some compute with numbers while they are made
        try:
            model = build(name, "cpu")
        except Exception as error:  # of timm, or of a package that is not here
            return row | {"why": _sentence(error)}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["batch norms"] = sum(isinstance(part, _BatchNorm) for part in model.modules())
    classes = {part: type(part) for part in model.modules()}
    report = accelerate(model)
    assert set(report.replaced) or all(type(part) is cls for part, cls in classes.items())
    for key, entries in (("fused", report.replaced), ("left", report.left)):
        if entries:
            row[key] = dict(collections.Counter(entries.values()).most_common())
    return row


def build(name: str, device: str) -> nn.Module:
    import timm

    with torch.device(device):
        return timm.create_model(name, pretrained=False)


def compare(name: str) -> dict[str, Any]:
    """How far outputs, gradients and running statistics of a fused model are from the original's."""
    torch.manual_seed(0)
    try:
        model = build(name, "cpu")
        for part in model.modules():
            if isinstance(part, _BatchNorm) and part.affine:  # many begin at 0, behind which nothing would be seen
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, std=0.1)
        size, expected = _first_size(model)
        accelerate(model)
        found = _run(model, size)
    except Exception as error:
        return {"failed": _sentence(error)}
    differences: dict[str, Any] = {"size": size}
    for what, tensors in expected.items():
        pairs = [(a, b) for a, b in zip(tensors, found[what], strict=True) if a.numel()]
        assert all(a.isfinite().all() for a, _ in pairs) and any(a.any() for a, _ in pairs), f"{name}: {what}"
        differences[what] = max(float((a - b).abs().max()) / max(float(a.abs().max()), 1e-12) for a, b in pairs)
    return differences


def _first_size(model: nn.Module) -> tuple[int, dict[str, list[Tensor]]]:
    """The first of the sizes that a model takes, and what it computes at it."""
    settings: Any = model.pretrained_cfg
    own = settings["input_size"][-1]
    sizes = [own] if settings.get("fixed_input_size") else [*SIZES, own]
    for size in sizes[:-1]:
        with contextlib.suppress(RuntimeError, ValueError, AssertionError, IndexError):
            return size, _run(model, size)
    return own, _run(model, own)


def _run(model: nn.Module, size: int) -> dict[str, list[Tensor]]:
    """Two images in training, forward and backward; then, with the statistics of that, in inference."""
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.zero_grad()
    torch.manual_seed(1)  # of what is dropped
    try:
        outputs = [x for x in tree_leaves(model.train()(images)) if isinstance(x, Tensor)]
        sum((x * torch.linspace(-1, 1, x.shape[-1])).sum() for x in outputs).backward()
        statistics = [b.clone() for b in model.buffers() if b.is_floating_point()]
        with torch.inference_mode():
            inferred = [x for x in tree_leaves(model.eval()(images)) if isinstance(x, Tensor)]
    finally:
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    outputs = [x.detach() for x in outputs]
    return {"training": outputs, "gradients": gradients, "statistics": statistics, "inference": inferred}


def _sentence(error: Exception) -> str:
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", f"{type(error).__name__}: {error}").split())[:160]


def page(results: dict[str, Any]) -> str:
    """The page from the results."""
    return INTRO + "\n".join(_sections(results["models"], results["made with"])) + "\n"


def _sections(models: dict[str, dict[str, Any]], versions: dict[str, str]) -> Iterator[str]:
    families: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in models.values():
        families[row["family"]].append(row)
    fused = [row for row in models.values() if "fused" in row]
    compared = [row["compared"] for row in fused if "failed" not in row.get("compared", {"failed": ""})]
    with_norms = [row for row in models.values() if row.get("batch norms")]
    sizes = collections.Counter(row["size"] for row in compared)
    worst = max((row[what] for row in compared for what in row if what != "size"), default=0.0)
    greatest = "equal to the bit" if worst == 0 else f"equal to {worst:.0e} of the greatest value"
    made = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    yield (
        f"Of {len(models)} models of {made}, with random weights on a CPU, {len(with_norms)} have a BatchNorm, and in "
        f"{len(fused)} `accelerate` fuses something. {len(compared)} of these were run before and after it, two images "
        f"in training and inference ({', '.join(f'{n} at {size} px' for size, n in sorted(sizes.items()))}): outputs, "
        f"gradients of all parameters and running statistics are {greatest}. The others are left as they are, their "
        "classes too.\n"
    )
    yield "## Where something is fused\n"
    yield f"| family | models | {' | '.join(_KINDS)} | left, and why |"
    yield "|---|---|" + "---|" * (len(_KINDS) + 1)
    for family, rows in sorted(families.items()):
        some = [row for row in rows if "fused" in row]
        if some:
            counts, left = _total(some, "fused"), _total(some, "left")
            cells = [f"{counts[kind]}" if counts[kind] else "" for kind in _KINDS]
            assert not set(counts) - set(_KINDS)
            yield f"| {family} | {len(some)} of {len(rows)} | {' | '.join(cells)} | {_reasons(left)} |"
    yield "\nCounted are BatchNorms, of all these models together; of what is left, also depth-wise convolutions.\n"
    yield "## Where nothing is\n"
    yield "| family | models | left, and why |\n|---|---|---|"
    for family, rows in sorted(families.items()):
        none = [row for row in rows if row.get("batch norms") and "fused" not in row]
        if none:
            yield f"| {family} | {len(none)} of {len(rows)} | {_reasons(_total(none, 'left'))} |"
    without = {family: sum(row.get("batch norms") == 0 for row in rows) for family, rows in sorted(families.items())}
    told = ", ".join(f"{family} ({count})" for family, count in without.items() if count)
    yield f"\nWithout any BatchNorm, most of them no convolutional networks: {told}.\n"
    failed = {name: row["why"] for name, row in models.items() if "why" in row}
    failed |= {name: row["compared"]["failed"] for name, row in models.items() if "failed" in row.get("compared", {})}
    pending = [name for name, row in models.items() if "fused" in row and "compared" not in row]
    if failed or pending:
        yield "## What was not run\n"
        yield from (f"- `{name}`: {why}" for name, why in sorted(failed.items()))
        yield from (f"- `{name}`: not compared yet" for name in pending)


_KINDS = (EPILOGUE, DEPTHWISE)


def _total(rows: list[dict[str, Any]], key: str) -> collections.Counter[str]:
    counts: collections.Counter[str] = collections.Counter()
    for row in rows:
        counts.update(row.get(key, {}))
    return counts


def _reasons(left: collections.Counter[str]) -> str:
    return "; ".join(f"{count} {why}" for why, count in left.most_common()) or "nothing"


if __name__ == "__main__":
    main()
