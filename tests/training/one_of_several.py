"""What one of several processes does, or one alone: trainings and evaluations, as a JSON file tells it.

    torchrun --nproc-per-node 2 tests/training/one_of_several.py told.json

Besides what `train` and `eval` write, every process leaves process-RANK.json: digests of its averaged weights, which
annotations it read, which images it decoded to evaluate.
"""

import hashlib
import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from rtmdet_fast.cli import main
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.plan import PlanSampler
from rtmdet_fast.errors import UserError
from rtmdet_fast.evaluation import evaluate as evaluate_module
from rtmdet_fast.models.rtdetr import model as rtdetr_module
from rtmdet_fast.models.rtdetr.denoising import denoising_queries
from rtmdet_fast.training import step as step_module
from rtmdet_fast.training import train as train_module
from rtmdet_fast.training.config import TrainConfig


def digest(model):
    """Of every bit of the weights and buffers."""
    state = hashlib.sha256()
    for name, value in model.state_dict().items():
        state.update(name.encode() + value.contiguous().numpy().tobytes())
    return state.hexdigest()


def config_of(options):
    paths = ("train", "train_images", "val", "val_images", "out")
    return TrainConfig(**{key: Path(value) if key in paths and value else value for key, value in options.items()})


def work(told):
    """Trainings and evaluations one after the other; what this process left of it."""
    averages, read, decoded, steps, agreed = [], [], [], [], []
    make_average, read_source = train_module.ModelEMA, CocoDataset._read_source
    load, update = evaluate_module._Images.__getitem__, make_average.update

    def reading(self, source, notes):
        read.append(source.annotations.name)
        return read_source(self, source, notes)

    def updating(self):
        update(self)
        here = {"rank": os.environ.get("RANK"), "step": self.step}
        if not restarted and here in (told.get("fails"), told.get("is killed")):
            Path(sys.argv[1]).with_name("ended-at").write_text(str(time.time()))
            if here == told.get("fails"):
                raise UserError(f"this is why process {os.environ['RANK']} ends")
            os.kill(os.getpid(), signal.SIGKILL)

    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"

    def making(*args, **kwargs):
        steps.append(step_module.GraphStep(*args, **kwargs))
        return steps[-1]

    def agreeing(values):
        agreed.append((list(values), agree(values)))
        return agreed[-1][1]

    agree = step_module.greatest_on_host

    def loading(self, index):
        decoded.append(index)
        return load(self, index)

    with ExitStack() as changes:
        change = lambda *args: changes.enter_context(patch.object(*args))  # noqa: E731
        change(train_module, "LOG_EVERY", 1)
        change(train_module, "ModelEMA", lambda *args: averages.append(make_average(*args)) or averages[-1])
        change(train_module, "PlanSampler", partial(PlanSampler, drop_last=told.get("drop_last", True)))
        change(CocoDataset, "_read_source", reading)
        change(make_average, "update", updating)
        if told.get("sizes"):  # to which a step that stays in its place is padded, though on a CPU none is recorded
            change(step_module, "GRAPHED", {"cpu"})
            change(step_module, "SIZES", tuple(told["sizes"]))
            change(step_module, "greatest_on_host", agreeing)
            change(train_module, "GraphStep", making)
        if told.get("double"):  # so that what Adam makes of a gradient is not what rounding made of it
            changes.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float64)
            change(torch.Tensor, "float", torch.Tensor.double)
        # random noise would be another of one process than of two
        quiet = partial(denoising_queries, label_noise_ratio=0, box_noise_scale=0)
        change(rtdetr_module, "denoising_queries", quiet)
        results = [train_module.train(config_of(options)) for options in told.get("trainings", ())]
        codes = [main(["train", *arguments]) for arguments in told.get("commands", ())]
    with patch.object(evaluate_module._Images, "__getitem__", loading):
        codes += [main(["eval", *arguments]) for arguments in told.get("evaluations", ())]
    return {
        "averages": [digest(average.model) for average in averages],
        "read": read,
        "decoded": decoded,
        "codes": codes,
        "metrics": [result.metrics for result in results],
        "eager": [step.eager for step in steps],
        "agreed": agreed,
    }


if __name__ == "__main__":
    told = Path(sys.argv[1])
    left = work(json.loads(told.read_text()))
    if any(left["codes"]):
        sys.exit(max(left["codes"]))
    (told.parent / f"process-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(left))
