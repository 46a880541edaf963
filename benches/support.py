"""What can be exported, and how near each file is to its model: `python -m benches.support` writes docs/support.md.

Every model is exported with weights that are random, and such that it finds much; `export` then compares the file with
the model. int8 takes trained weights: `--weights FILE --calibrate FOLDER`. What was measured stays in support.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benches.confident import confident
from rtmdet_fast.errors import UserError
from rtmdet_fast.export.export import export
from rtmdet_fast.images import IMAGE_SUFFIXES
from rtmdet_fast.models.detector import Detector
from rtmdet_fast.models.families import load_model

RESULTS = Path(__file__).with_name("support.json")
PAGE = Path(__file__).resolve().parents[1] / "docs/support.md"
IMAGE_SIZE = 256
MODELS = {
    **{f"RTMDet-{size}, det": ("det", size) for size in ("nano", "tiny", "s", "m", "l", "x")},
    **{f"RTMDet-{size}, ins": ("ins", size) for size in ("nano", "tiny", "s", "m", "l", "x")},
    **{f"RTMDet-{size}, rotated": ("rotated", size) for size in ("nano", "tiny", "s", "m", "l", "x")},
    **{f"RT-DETR-{size}": ("rtdetr", size) for size in ("r18", "r34", "r50m", "r50", "r101", "l", "x")},
}
FORMATS: dict[str, dict[str, Any]] = {
    "ONNX": dict(suffix=".onnx", image_size=IMAGE_SIZE),
    "ONNX, open sides": dict(suffix=".onnx", dynamic=True),
    "OpenVINO": dict(suffix=".xml", image_size=IMAGE_SIZE),
    "OpenVINO, open sides": dict(suffix=".xml", dynamic=True),
    "OpenVINO int8": dict(suffix=".xml", image_size=IMAGE_SIZE, int8=True),
    ".pt2": dict(suffix=".pt2", image_size=IMAGE_SIZE),
    ".pt2, open sides": dict(suffix=".pt2", dynamic=True),
    "ONNX, no NMS": dict(suffix=".onnx", image_size=IMAGE_SIZE, nms=False),
    "OpenVINO, no NMS": dict(suffix=".xml", image_size=IMAGE_SIZE, nms=False),
    "OpenVINO int8, no NMS": dict(suffix=".xml", image_size=IMAGE_SIZE, nms=False, int8=True),
    ".pt2, no NMS": dict(suffix=".pt2", image_size=IMAGE_SIZE, nms=False),
}
TRAINED = [format for format, options in FORMATS.items() if options.get("int8")]
"""Not for random weights."""
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf")
INTRO = f"""# Export: support matrix

Written by `python -m benches.support` from what it measured (`benches/support.json`); do not edit.

Each cell is an [export](export.md) of a model, for any batch, whose detections were compared with the model's. In it
stand the greatest difference of a box, in pixels, and of a score, and how many of how many detections had no like in
the other: scores that differ by rounding, and IoUs at the threshold, make a detection another one. `export` makes the
same comparison each time, and writes no file that fails it. NMS is inside of every file of RTMDet but for columns of
"no NMS", whose files give all boxes and scores; RT-DETR has none. Open sides can be any multiples of 32.

The weights are random, and such that much is found; images are noise of {IMAGE_SIZE} pixels. Activations of such
weights grow over the layers, so that SiLU is all but ReLU in the last ones. int8 is not for them, as they multiply what
it rounds: rows of trained weights, which name their file, have it, on images of theirs.

"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benches.support", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="MODEL")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS, metavar="FORMAT")
    parser.add_argument("--weights", nargs="+", type=Path, default=[], help="trained weights, in place of --models")
    parser.add_argument("--calibrate", type=Path, help="folder of images for --weights")
    parser.add_argument("--missing", action="store_true", help="only what has no result yet")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the page")
    args = parser.parse_args(argv)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    models: dict[str, Callable[[], Detector]] = {
        name: partial(confident, task, size, IMAGE_SIZE)
        for name, (task, size) in MODELS.items()
        if name in args.models and not args.weights
    }
    for path in args.weights:
        model = load_model(path)
        models[f"{model.title}, {model.task}, {path.name}"] = partial(load_model, path)
    wanted = [
        (model, format)
        for model in models
        for format in args.formats
        if (args.weights or format not in TRAINED) and not (args.missing and format in results.get(model, {}))
    ]
    for model, format in tqdm([] if args.table else wanted, unit="export"):
        results.setdefault(model, {})[format] = measure(models[model](), FORMATS[format], args.calibrate)
        write(results)
    write(results)


def write(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(results))


def measure(model: Detector, options: dict[str, Any], images: Path | None = None) -> dict[str, Any]:
    """How an exported file agrees with its model, or why there is none; and what it was made with.

    images: a folder of them, for trained weights, to compare on and to calibrate with.
    """
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    more: dict[str, Any] = {key: value for key, value in options.items() if key != "suffix"}
    if images is None:
        more |= dict(score_threshold=0.05, candidates=1000)
    else:
        more.pop("image_size", None)
        more["calibrate" if more.get("int8") else "images"] = images if more.get("int8") else _files(images)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{options['suffix']}"
        try:
            found = export(model, path, **more)
        except (UserError, RuntimeError) as error:  # an exporter may fail in its own way
            why = re.sub(r"\x1b\[[\d;]*m", "", str(error).replace(f"{folder}/", "")).split(". ")[0]
            return {"why": " ".join(why.split())[:300], "versions": versions}
    return {**found._asdict(), "versions": versions}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def page(results: dict[str, Any]) -> str:
    """The page from the results."""
    return INTRO + "\n".join(_sections(results))


def _sections(results: dict[str, Any]) -> Iterator[str]:
    trained = [model for model in results if model not in MODELS]
    sections = {task: [model for model in MODELS if model.endswith(f", {task}")] for task in ("det", "ins", "rotated")}
    sections |= {"RT-DETR": [model for model in MODELS if model.startswith("RT-DETR")], "Trained weights": trained}
    for heading, models in sections.items():
        rows = [model for model in models if model in results]
        formats = [format for format in FORMATS if format not in TRAINED or rows == trained]
        # what is not for most is told where it was tried
        formats = [x for x in formats if "no NMS" not in x or any(x in results[model] for model in rows)]
        if not rows:
            continue
        yield f"## {heading}\n"
        yield f"| | {' | '.join(formats)} |"
        yield "|---" * (len(formats) + 1) + "|"
        for model in rows:
            yield f"| {model} | {' | '.join(_cell(results[model].get(format)) for format in formats)} |"
        yield ""
    versions = sorted(
        {f"{name} {v}" for row in results.values() for cell in row.values() for name, v in cell["versions"].items()}
    )
    yield f"Made with {', '.join(versions)}."
    yield ""


def _cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "not measured"
    if "why" in result:
        return f"no: {result['why']}"
    masks = f", masks IoU {1 - result['mask_error']:.4f}" if result["mask_error"] else ""
    return (
        f"{result['box_error']:.0e} px, {result['score_error']:.0e}{masks}; "
        f"{result['unmatched']} of {result['detections']}"
    )


if __name__ == "__main__":
    main()
