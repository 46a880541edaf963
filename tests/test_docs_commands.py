"""The commands of the docs, run one after the other as a reader would, with a smaller demo and shorter trainings."""

import re
import shlex
import shutil

import pytest
from test_docs import BLOCK, ROOT

from benches.confident import confident
from rtmdet_fast.cli import main
from rtmdet_fast.data.shapes import CLASSES, make_shapes

PAGES = {
    "README.md": "det",
    "docs/benchmark.md": "det",
    "docs/cli.md": "det",
    "docs/data.md": "det",
    "docs/export.md": "det",
    "docs/look.md": "det",
    "docs/masks.md": "ins",
    "docs/predict.md": "det",
    "docs/reliability.md": "det",
    "docs/report.md": "det",
    "docs/rotated.md": "rotated",
    "docs/rtdetr.md": "rtdetr",
    "docs/scale.md": "det",
    "docs/train.md": "det",
}
OTHERS = (  # left to other tests: weights and data that are not here, torchrun, 8 bits of random weights
    r"--weights [\w-]+( |$)|--init rtdetr-r18|\b(bccd|hit_uav|coco|work_dirs)\b|[ \"]/data/|--help|"
    r"merge runs/found|--int8"
)
TRAINED = "rtmdet-fast train --data runs/demo/data --image-size 128 --epochs 2 --out runs/"
# What a page takes from pages before it.
BEFORE = {
    "docs/benchmark.md": ["rtmdet-fast export --weights runs/demo/run/best.pth --out runs/demo/model.onnx"],
    "docs/report.md": [TRAINED + "boxes", TRAINED + "two"],
}
SMALLER = {"--image-size": "64", "--epochs": "1", "--batch-size": "4"}


def commands(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = [line for kind, code in BLOCK.findall(text) if not kind for line in code.replace("\\\n", " ").split("\n")]
    return [line for line in lines if line.startswith("rtmdet-fast ") and not re.search(OTHERS, line)]


def smaller(line):
    """The words of a command, a training's numbers made small."""
    words = shlex.split(line, comments=True)[1:]
    if words[0] in ("train", "data"):
        words = [SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if words[0] == "train":
        words += ["--num-workers", "0"] + ["--size", "nano"] * ("--model" not in words)
        words += ["--queries", "10"] * ("--model" in words)
    if words[0] == "benchmark":
        words += ["--rounds", "2", "--engines", "folded", "onnxruntime"]  # to compile takes minutes
    return words


def test_every_page_with_commands_is_run():
    with_commands = {
        page.relative_to(ROOT).as_posix()
        for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        if commands(page.relative_to(ROOT))
    }
    assert with_commands == set(PAGES)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """By task: a folder as `make demo` leaves it, and what pages take from others."""
    made = {}

    def make(task):
        if task in made:
            return made[task]
        folder = made[task] = tmp_path_factory.mktemp(task)
        make_shapes(folder / "runs/demo/data", num_train=8, num_val=5, image_size=64)
        boxes = task == "rtdetr"
        model = confident(task, "r18" if boxes else "nano", 64, CLASSES, **{"num_queries": 10} if boxes else {})
        for run in ("demo/run", "finer")[: 1 + boxes]:
            (folder / "runs" / run).mkdir(parents=True)
            model.save(folder / "runs" / run / "best.pth")
        return folder

    return make


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page, demo, tmp_path, monkeypatch, capsys):
    shutil.copytree(demo(PAGES[page]), tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for line in [*BEFORE.get(page, []), *commands(page)]:
        assert main(smaller(line)) == 0, f"{line}\n{capsys.readouterr().err}"
