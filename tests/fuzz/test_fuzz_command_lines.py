"""Command lines with values missing, doubled, odd or of a wrong type: they work, or one sentence tells why not.

RTMDET_FAST_FUZZ_SEED sets the seed, RTMDET_FAST_FUZZ_COMMAND_LINES the number of lines; each tenth of the first hundred
is run as a process of its own too.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from urllib.error import URLError

import cv2
import numpy as np
import pytest
import torch

from rtmdet_fast import RTMDet
from rtmdet_fast.cli import demo, main
from rtmdet_fast.cli.data import DataConfig
from rtmdet_fast.cli.demo import DemoConfig
from rtmdet_fast.cli.eval import EvalConfig
from rtmdet_fast.cli.info import InfoConfig
from rtmdet_fast.cli.predict import PredictConfig
from rtmdet_fast.cli.split import SplitConfig
from rtmdet_fast.data import shapes as shapes_module
from rtmdet_fast.training import train as train_module
from rtmdet_fast.training.config import TrainConfig

SEED = int(os.environ.get("RTMDET_FAST_FUZZ_SEED", "0"))
COUNT = int(os.environ.get("RTMDET_FAST_FUZZ_COMMAND_LINES", "200"))
STEPS = 3
pytestmark = pytest.mark.slow

COMMANDS = {
    "train": (TrainConfig, "--train ann.json --train-images images --val ann.json --val-images images --out out "
              "--size nano --epochs 1 --batch-size 2 --image-size 64 --num-workers 0 --device cpu --no-report"),
    "eval": (EvalConfig, "--weights w.pth --ann ann.json --images images --image-size 64 --json e.json"),
    "predict": (PredictConfig, "images --weights w.pth --out out --image-size 64 --json p.json"),
    "data": (DataConfig, "data --page p.html --json d.json"),
    "split": (SplitConfig, "--images images --out out --size 64 --overlap 16 --workers 1 --json s.json"),
    "demo": (DemoConfig, "--out out --epochs 1 --device cpu"),
    "info": (InfoConfig, "--json i.json"),
}  # fmt: skip
NUMBERS = [
    "-1", "0", "1", "2", "63", "64", "257", "1000000", "9" * 30, "-" + "9" * 30, "1.5", "nan", "inf", "1e400", "x", "",
    "\u0661", "0x10", "1_0", "None",
]  # fmt: skip
# None of them lies outside the folder of a case, but for what cannot be written.
PATHS = [
    "ann.json", "images", "w.pth", "empty", "file", "file/below", "nowhere", ".", "", "x" * 300, "a b", "円", "\udcff",
    "a\nb", "images/*.png", "images/[", "**", "bad.png", "bad.json", "bad.pth", "video.mp4", "/dev/null", "~nobody/x",
    "0", "97", "rtsp://127.0.0.1:1/x", "rtmdet-tiny", "--", "-", "\0", "labels", "link", "loop", "'", "%s", "../images",
    "\udcff.png", "\udcff.mp4",
]  # fmt: skip
WORDS = [
    "det", "ins", "rotated", "cpu", "cuda", "cuda:99", "meta", "auto", "nano", "tiny", "bf16", "coco", "dota", "None",
]  # fmt: skip


class TooLong(KeyboardInterrupt):
    """Ends a training that goes as it should."""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """What command lines name, good and bad; each case has a copy."""
    folder = tmp_path_factory.mktemp("library")
    shapes = shapes_module.make_shapes(folder / "shapes", num_train=4, num_val=1, image_size=64)
    shutil.copytree(shapes.train_images, folder / "images")
    shutil.copy(shapes.train_ann, folder / "ann.json")
    (folder / "shapes").rename(folder / "data")
    names = [category["name"] for category in json.loads((folder / "ann.json").read_text())["categories"]]
    torch.manual_seed(0)
    RTMDet("nano", class_names=names).save(folder / "w.pth")
    for name in ("empty", "labels"):
        (folder / name).mkdir()
    (folder / "labels" / "x.txt").write_text("not a label\n")
    (folder / "file").write_text("")
    (folder / "bad.png").write_bytes(b"\x89PNG not really")
    (folder / "bad.json").write_bytes(b'{"images": [\xff')
    (folder / "bad.pth").write_bytes((folder / "w.pth").read_bytes()[:5000])
    (folder / "link").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    video = cv2.VideoWriter(str(folder / "video.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for value in range(3):
        video.write(np.full((48, 64, 3), 40 * value, np.uint8))
    video.release()
    if sys.platform == "linux":  # elsewhere file names are Unicode
        shutil.copy(next((folder / "images").iterdir()), folder / "\udcff.png")
        shutil.copy(folder / "video.mp4", folder / "\udcff.mp4")
    return folder


@pytest.fixture(scope="module")
def tally():
    counts = Counter()
    yield counts
    print(f"\n{sum(counts.values())} command lines of seed {SEED}: {dict(counts)}")


watched: list[Path] = []
strays: list[str] = []


def watch(event, arguments):
    """Notes what a command writes outside its folder."""
    if not watched or event not in ("open", "os.mkdir", "os.remove", "os.rename", "shutil.rmtree"):
        return
    path = arguments[1] if event == "os.rename" else arguments[0]
    if not isinstance(path, (str, bytes, Path)):
        return
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        return
    path = Path(os.path.realpath(os.fsdecode(path)))
    allowed = (watched[0], Path("/dev"), Path("/proc/self"), Path(tempfile.gettempdir(), "pymp-"))
    caches = "__pycache__" in path.parts or "matplotlib" in str(path)
    if not (caches or any(str(path).startswith(str(folder)) for folder in allowed)):
        strays.append(f"{event} {path}")


sys.addaudithook(watch)


def draw_line(rng) -> list[str]:
    """A command line that works, changed in up to four places."""
    command = list(COMMANDS)[rng.choice(len(COMMANDS), p=[0.25, 0.15, 0.25, 0.15, 0.1, 0.05, 0.05])]
    config, template = COMMANDS[command]
    line = [command, *template.split()]
    fields = {field.name: field for field in dataclasses.fields(config) if field.name != "compile"}  # takes minutes
    pools = {"path": PATHS, "number": NUMBERS, "word": WORDS}

    def odd(name: str = "") -> str:
        kind = str(fields[name].type) if name in fields else ""
        fitting = "path" if "Path" in kind else "number" if "int" in kind or "float" in kind else "word"
        if name in ("source", "weights", "init"):
            fitting = "path"
        if name == "num_workers":  # a process for each
            return ["-1", "0", "1", "257", "x", "9" * 30][rng.integers(6)]
        pool = pools[fitting] if rng.random() < 0.85 else pools[list(pools)[rng.integers(3)]]
        return pool[rng.integers(len(pool))]

    for _ in range(rng.integers(5)):
        at = int(rng.integers(len(line)))
        match rng.integers(7):
            case 0:
                del line[max(at, 1) :][:1], line[max(at, 1) : max(at, 1) + 1]
            case 1 | 2 if len(line) > 2:  # the value of an option that is there
                at = max(at, 2)
                line[at] = odd(line[at - 1].lstrip("-").replace("-", "_"))
            case 3 | 4:  # one more option
                name = list(fields)[rng.integers(len(fields))]
                option = f"--{name.replace('_', '-')}"
                if fields[name].type == "bool":
                    line += [option if rng.random() < 0.7 else f"--no-{name.replace('_', '-')}"]
                else:
                    line += [odd(name)] if name == "source" else [option, odd(name)]
            case 5:
                line.insert(at, ["--bogus", "-x", "--", "--help", "円", line[at]][rng.integers(6)])
            case _:
                line.insert(int(rng.integers(1, len(line) + 1)), odd())
    return line


def check(code: int, errors: str, line: list[str]) -> str:
    assert "Traceback" not in errors, f"{line}: {errors}"
    told = [text for text in errors.splitlines() if text.startswith("error: ")]
    if code == 2:
        assert len(told) == 1 or "--help" in errors, f"{line}: {errors}"  # a sentence, or what the parser shows
        return "refused"
    assert code in (0, 130) and not told, f"{line}: {code}, {errors}"
    return "done" if code == 0 else "trained on"


@pytest.mark.parametrize("case", range(COUNT))
def test_an_odd_command_line_works_or_is_one_sentence(
    library, tmp_path, monkeypatch, capsys, tally, record_property, case
):
    rng = np.random.default_rng((SEED, case))
    line = draw_line(rng)
    here = tmp_path / "here"
    shutil.copytree(library, here, symlinks=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("TORCH_HOME", str(here / "hub"))
    monkeypatch.delenv("RTMDET_FAST_KERNELS", raising=False)
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)  # which `main` sets, put back after the test
    monkeypatch.setattr("threading.excepthook", lambda *args: None)

    def offline(*args, **kwargs):
        raise URLError("no network")

    def few_steps(self):
        self.step += 1
        if self.step > STEPS:
            raise TooLong

    def few_shapes(folder, num_train, num_val, **options):
        return make_shapes(folder, num_train=8, num_val=1, **options)

    make_shapes = shapes_module.make_shapes
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(train_module.ModelEMA, "update", few_steps)
    monkeypatch.setattr(shapes_module, "make_shapes", few_shapes)
    assert demo.PredictConfig is PredictConfig
    strays.clear()
    watched.append(tmp_path)
    try:
        code = main(line)
    except SystemExit as stop:
        code = stop.code
    finally:
        watched.clear()
    told = capsys.readouterr()
    outcome = check(code, told.err + (told.out if code == 2 else ""), line)
    assert not strays, f"{line}: {strays}"
    tally[f"{line[0]} {outcome}"] += 1
    record_property("command lines fuzzed", 1)
    if case < 100 and case % 10 == 0 and not any("\0" in word for word in line) and outcome == "refused":
        done = subprocess.run(
            [sys.executable, "-m", "rtmdet_fast", *line], capture_output=True, cwd=here, stdin=subprocess.DEVNULL
        )
        check(done.returncode, (done.stderr + done.stdout).decode(errors="replace"), line)
