"""Trainings that send themselves kill -9 in the middle, each in a process of its own.

Every line of stdin is a JSON list: a file with the settings of TrainConfig, a part of the run, a moment in it, a file
for what the run prints. A moment is a call of a Python or C function by the main thread within the part, counted from
1. With 0 the run goes to its end and prints how many there are in each part, with -1 it just goes to its end. Told are
the process's number and then its exit code; once training has begun, a file `started` lies beside the run.

The processes are forked from this one, which has imported all and done nothing: to import takes longer than to train.
"""

import functools
import json
import os
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path

import matplotlib.backends.backend_svg  # noqa: F401  # as what follows it: what a run would import first
import PIL.Image
import torch._dynamo  # noqa: F401

from rtmdet_fast.training import train as train_module
from rtmdet_fast.training.callbacks import Callback
from rtmdet_fast.training.checkpoints import Checkpoints
from rtmdet_fast.training.config import TrainConfig

PARTS = {
    "anywhere": (train_module, "_train"),
    "checkpoint": (Checkpoints, "write"),
    "validation": (train_module, "evaluate"),
    "report": (train_module, "report_run"),
}


class Moments:
    def __init__(self, part: str, moment: int) -> None:
        self.fatal, self.counts, self.active = (part, moment), Counter(), []

    def __call__(self, *_) -> None:
        for part in self.active:
            self.counts[part] += 1
            if (part, self.counts[part]) == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    def count(self, part: str, holder: object, name: str) -> None:
        function = getattr(holder, name)

        @functools.wraps(function)
        def counted(*args, **kwargs):
            self.active.append(part)
            sys.setprofile(self)
            try:
                return function(*args, **kwargs)
            finally:
                self.active.remove(part)
                sys.setprofile(self if self.active else None)

        setattr(holder, name, counted)


class Started(Callback):
    def on_start(self, settings, iteration):
        settings.out.with_name("started").touch()


def run(config: str, part: str, moment: int) -> None:
    settings = json.loads(Path(config).read_text())
    paths = ("train", "train_images", "val", "val_images", "out")
    moments = Moments(part, moment)
    os.register_at_fork(after_in_child=lambda: sys.setprofile(None))  # the loaders live
    for name, where in PARTS.items():
        if moment == 0 or name == part:
            moments.count(name, *where)
    train_module.train(TrainConfig(**settings | {name: Path(settings[name]) for name in paths}), callbacks=[Started()])
    print(json.dumps(moments.counts))


def fork(*arguments: object, log: str) -> int:
    """The number of the process that runs it."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        run(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    PIL.Image.init()
    for line in sys.stdin:
        *arguments, log = json.loads(line)
        pid = fork(*arguments, log=log)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
