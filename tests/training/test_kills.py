"""kill -9 at random moments of a training, which ends in the very weights of one that nobody killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from told import assert_same_files
from torchrun import torchrun

from rtmdet_fast import RTMDet
from rtmdet_fast.data.plan import PlanSampler
from rtmdet_fast.data.shapes import make_shapes
from rtmdet_fast.training.train import train

PATIENCE = 300  # seconds after which a process that hangs fails
KILLS = {"checkpoint": 5, "validation": 4, "report": 3, "anywhere": 4, "by the clock": 4}
SEED = int(os.environ.get("RTMDET_FAST_FUZZ_SEED", "0"))


class Runs:
    """Runs with the same settings, one after another, each of which goes on from where it was killed."""

    def __init__(self, folder, config, server):
        self.folder, self.config, self.server, self.number = folder, config, server, 0
        folder.mkdir()

    @property
    def out(self):
        return self.folder / str(self.number) / "run"

    def start(self, part, moment, seconds=None):
        """Starts the run or goes on with it; kills it `seconds` after its first step, if given. What it printed, and
        whether it was killed."""
        self.out.parent.mkdir(exist_ok=True)
        config = replace(self.config, out=self.out, resume=(self.out / "last.pth").exists())
        settings, log = self.out.with_name("settings.json"), self.out.with_name("log.txt")
        settings.write_text(json.dumps(asdict(config), default=str))
        started = self.out.with_name("started")
        started.unlink(missing_ok=True)
        print(json.dumps([str(settings), part, int(moment), str(log)]), file=self.server.stdin, flush=True)
        pid = int(self.server.stdout.readline())
        timer = threading.Timer(PATIENCE, os.kill, (pid, signal.SIGABRT))
        timer.start()
        if seconds is not None:
            while not started.exists() and timer.is_alive():
                time.sleep(0.01)
            time.sleep(seconds)
            with suppress(ProcessLookupError):  # it came to its end
                os.kill(pid, signal.SIGKILL)
        code = int(self.server.stdout.readline())
        timer.cancel()
        assert code in (0, -signal.SIGKILL), f"exit code {code}: {log.read_text()}"
        return log.read_text(), code != 0

    def look(self):
        """What there is of the run is whole."""
        for name in ("last.pth", "best.pth"):
            if (self.out / name).exists():
                RTMDet.from_pretrained(self.out / name)
        if (self.out / "last.pth").exists():
            torch.load(self.out / "last.pth", weights_only=True)
        for path in self.out.glob("*.json"):
            json.loads(path.read_text())


@pytest.fixture
def server():
    command = [sys.executable, Path(__file__).with_name("killed_run.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        yield process
        process.stdin.close()


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_in_the_weights_of_an_unbroken_one(
    config, tmp_path, server, record_property
):
    config = replace(config, epochs=2, num_workers=2, report=True, save_every="0.000001s", keep=2, loggers=())
    whole, killed = Runs(tmp_path / "whole", config, server), Runs(tmp_path / "killed", config, server)
    moments = json.loads(whole.start("", 0)[0].splitlines()[-1])
    begun = time.monotonic()
    Runs(tmp_path / "timed", config, server).start("", -1)
    seconds = time.monotonic() - begun
    rng = np.random.default_rng(SEED)
    waiting = rng.permutation([part for part, count in KILLS.items() for _ in range(count)]).tolist()
    survived, ended = 0, 0
    while waiting:
        part = waiting[-1]
        if part == "by the clock":
            _, was_killed = killed.start("", -1, rng.uniform(0, seconds))
        else:
            _, was_killed = killed.start(part, rng.integers(1, moments[part] + 1))
        killed.look()
        if was_killed:
            waiting.pop()
            survived += 1
        else:  # the moment lay beyond the end of what was left
            assert_same_files(whole.out, killed.out)
            killed.number, ended = killed.number + 1, ended + 1
            assert ended < 100, "the moments never come"
    killed.start("", -1)
    assert_same_files(whole.out, killed.out)
    assert not [path for path in killed.out.glob(".*.tmp") if path.stat().st_size]
    assert (killed.out / "report.html").exists()
    record_property("kills survived", survived)
    record_property("runs killed that ended in the weights of an unbroken one", ended + 1)


PREEMPTED = """
import json, os, signal, sys, time
from pathlib import Path
from rtmdet_fast.data.plan import PlanSampler
from rtmdet_fast.training.callbacks import Callback
from rtmdet_fast.training.config import TrainConfig
from rtmdet_fast.training.interruption import Interruption
from rtmdet_fast.training.train import train

arrived, arrive, plan, shown = [], Interruption._arrive, PlanSampler.__iter__, []

class Preempt(Callback):
    def on_step(self, progress):
        if progress.iteration == int(sys.argv[2]):
            os.kill(os.getppid(), signal.SIGTERM)
            while not arrived:
                time.sleep(0.01)

def iterate(self):
    shown.append([])
    for batch in plan(self):
        shown[-1] += [plan.index for plan in batch]
        yield batch

Interruption._arrive = lambda *args: arrived.append(args) or arrive(*args)
PlanSampler.__iter__ = iterate
settings = json.loads(Path(sys.argv[1]).read_text())
paths = {name: Path(settings[name]) for name in ("train", "train_images", "val", "val_images", "out")}
train(TrainConfig(**settings | paths), callbacks=[Preempt()])
(paths["out"] / f"shown-{os.environ['RANK']}.json").write_text(json.dumps(shown))
"""


@pytest.mark.slow
def test_sigterm_to_torchrun_leaves_a_checkpoint_of_all_its_processes(config, tmp_path, monkeypatch, record_property):
    """Of the very step, in mid-epoch and before the validation; two processes go on to the bit, and one shows the
    images of the epoch that neither of the two has shown."""
    shapes = make_shapes(tmp_path / "shapes", num_train=27, num_val=2, image_size=96)  # one has no objects
    config = replace(config, train=shapes.train_ann, train_images=shapes.train_images, batch_size=1, num_workers=1)
    (tmp_path / "run.py").write_text(PREEMPTED)

    def start(out, at, resume=False):
        settings = tmp_path / "settings.json"
        settings.write_text(json.dumps(asdict(replace(config, out=out, resume=resume)), default=str))
        done = torchrun(tmp_path / "run.py", settings, at, timeout=PATIENCE)
        return done.returncode, done.stderr

    whole, rest, plan = tmp_path / "whole", [], PlanSampler.__iter__

    def iterate(self):
        rest.append([])
        for batch in plan(self):
            rest[-1] += [plan.index for plan in batch]
            yield batch

    code, told = start(whole, -1)
    assert code == 0, told
    ranks = [json.loads((whole / f"shown-{rank}.json").read_text()) for rank in (0, 1)]
    for first, second in zip(*ranks, strict=True):
        assert sorted(first + second) == [*range(26)]
    for step in (4, 13):
        broken, alone = tmp_path / f"broken-{step}", tmp_path / f"alone-{step}"
        code, told = start(broken, step)
        state = torch.load(broken / "last.pth", weights_only=True)["training"]
        assert code != 0 and (state["epoch"], state["step"], state["iteration"]) == (0, step, step), told
        shutil.copytree(broken, alone)
        code, told = start(broken, -1, resume=True)
        assert code == 0, told
        assert_same_files(whole, broken)

        rest.clear()
        with monkeypatch.context() as patch, pytest.warns(UserWarning, match="had 2 processes and goes on with 1"):
            patch.setattr(PlanSampler, "__iter__", iterate)
            train(replace(config, out=alone, resume=True))
        shown = [index for first, *_ in ranks for index in first[:step]]
        assert sorted(shown + rest[0]) == sorted(rest[1]) == [*range(26)]
        record_property("images lost or twice", len(set(range(26)) ^ set(shown + rest[0])))
    record_property("runs of two processes broken off that ended in the weights of an unbroken one", 2)
