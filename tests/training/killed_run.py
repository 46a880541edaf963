"""A training that sends itself kill -9 in the middle: python killed_run.py CONFIG.json PART MOMENT.

A moment is a call of a Python or C function by the main thread within a part of the run; MOMENT counts them from 1.
With MOMENT 0 the run goes to its end, and the number of moments of each part is printed. The settings are those of
TrainConfig; once training has begun, a file `started` lies beside the run.
"""

import functools
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

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


def main() -> None:
    config, part, moment = sys.argv[1:]
    settings = json.loads(Path(config).read_text())
    paths = ("train", "train_images", "val", "val_images", "out")
    moments = Moments(part, int(moment))
    os.register_at_fork(after_in_child=lambda: sys.setprofile(None))  # the loaders live
    for name, where in PARTS.items():
        if moment == "0" or name == part:
            moments.count(name, *where)
    config = TrainConfig(**settings | {name: Path(settings[name]) for name in paths})
    train_module.train(config, callbacks=[Started()])
    print(json.dumps(moments.counts))


if __name__ == "__main__":
    main()
