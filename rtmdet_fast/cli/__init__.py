"""The command line: `rtmdet-fast train`, `predict`, … (all of them in `main`)."""

from __future__ import annotations

import io
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from rtmdet_fast import __version__
from rtmdet_fast.cli.benchmark import BenchmarkConfig, run_benchmark
from rtmdet_fast.cli.compare import CompareConfig, run_compare
from rtmdet_fast.cli.data import DataConfig, run_data
from rtmdet_fast.cli.demo import DemoConfig, run_demo
from rtmdet_fast.cli.eval import EvalConfig, run_eval
from rtmdet_fast.cli.export import ExportConfig, run_export
from rtmdet_fast.cli.info import InfoConfig, run_info
from rtmdet_fast.cli.merge import MergeConfig, run_merge
from rtmdet_fast.cli.output import Outcome, one_line
from rtmdet_fast.cli.predict import PredictConfig, run_predict
from rtmdet_fast.cli.processes import tell_of_failure, wait_for_the_end, was_left
from rtmdet_fast.cli.split import SplitConfig, run_split
from rtmdet_fast.cli.train import run_train
from rtmdet_fast.errors import UserError

ALONE_OR_AUTO = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="[auto]",
    instance_from_str=lambda given: " ".join(given) or True,
    is_instance=lambda value: isinstance(value, (bool, str)),
    str_from_instance=lambda value: [str(value)],
)
"""Of an option that is given alone, or as `--option auto`."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; exit code 2 and one sentence on stderr where the user's input is at fault."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a class name must not end a command where the console lacks a letter
            stream.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"rtmdet-fast {__version__}")
        return 0

    from rtmdet_fast.training.config import TrainConfig
    from rtmdet_fast.training.interruption import Terminated

    @dataclass(frozen=True, kw_only=True)
    class TrainCommand(TrainConfig):
        resume: Annotated[Any, ALONE_OR_AUTO] = False
        preview: bool = False
        """Draw augmented batches, what the network would see, into the folder preview in `out`, and end without
        training."""
        json: Path | None = None
        """Write the result to this file."""

    TrainCommand.__doc__ = TrainConfig.__doc__
    commands: dict[type, Callable[[Any], Outcome]] = {
        DataConfig: run_data,
        TrainCommand: run_train,
        EvalConfig: run_eval,
        CompareConfig: run_compare,
        PredictConfig: run_predict,
        MergeConfig: run_merge,
        ExportConfig: run_export,
        BenchmarkConfig: run_benchmark,
        SplitConfig: run_split,
        DemoConfig: run_demo,
        InfoConfig: run_info,
    }
    subcommand = tyro.conf.subcommand
    config = tyro.cli(
        Annotated[DataConfig, subcommand("data")]
        | Annotated[TrainCommand, subcommand("train")]
        | Annotated[EvalConfig, subcommand("eval")]
        | Annotated[CompareConfig, subcommand("compare")]
        | Annotated[PredictConfig, subcommand("predict")]
        | Annotated[MergeConfig, subcommand("merge")]
        | Annotated[ExportConfig, subcommand("export")]
        | Annotated[BenchmarkConfig, subcommand("benchmark")]
        | Annotated[SplitConfig, subcommand("split")]
        | Annotated[DemoConfig, subcommand("demo")]
        | Annotated[InfoConfig, subcommand("info")],
        prog="rtmdet-fast",
        description="RTMDet and RT-DETR: train, evaluate and predict. --version tells the version.",
        args=arguments,
    )
    warnings.showwarning = lambda message, *_: print(f"warning: {one_line(str(message))}", file=sys.stderr)
    threading.excepthook = _tell_of_thread
    try:
        from rtmdet_fast.kernels._dispatch import check_backend  # after --help, which has no need of PyTorch

        check_backend()
        if "\0" in "".join(arguments):  # only of a caller in Python
            raise UserError("an argument holds the character NUL, which no path or name can")
        outcome = commands[type(config)](config)
        if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts one speaks
            outcome.publish(config.json)
    except UserError as error:
        # a loader process wraps the sentence in its traceback
        return _failed(one_line(str(error).rpartition("rtmdet_fast.errors.UserError: ")[2]))
    except OSError as error:  # a disk that is full, a folder that cannot be written
        return _failed(f"{error.strerror or one_line(str(error))}: {error.filename or ''}".rstrip(": "))
    except (KeyboardInterrupt, Terminated) as end:
        interrupted = isinstance(end, KeyboardInterrupt)
        if os.environ.get("RANK", "0") == "0":
            print(("interrupted" if interrupted else "terminated") + _how_to_go_on(config), file=sys.stderr)
        return 130 if interrupted else 143
    except Exception as error:
        if was_left(error):
            wait_for_the_end()
            return 1
        what = _what_the_machine_did(error, config)
        if what is None:
            tell_of_failure(traceback.format_exc())
            raise
        return _failed(what + _how_to_go_on(config))
    return 0


def _failed(reason: str) -> int:
    """Tells why a command ends, and returns its exit code."""
    tell_of_failure(reason)
    print(f"error: {reason}", file=sys.stderr)
    return 2


def _how_to_go_on(config: Any) -> str:
    """The end of a sentence on what ended a command."""
    from rtmdet_fast.training.config import TrainConfig

    begun = isinstance(config, TrainConfig) and (config.out / "last.pth").exists()
    if isinstance(config, PredictConfig) and config.shard is not None:
        return "; the shard goes on with --resume"
    return "; the training goes on with --resume" if begun else ""


OUT_OF_MEMORY = ("DefaultCPUAllocator", "Insufficient memory", "is killed by signal: Killed", "Cannot allocate memory")
"""As PyTorch tells it on a CPU, OpenCV, the loader of a process that the system ended, the system."""


def _what_the_machine_did(error: BaseException, config: Any) -> str | None:
    """It ran out of memory, or ended a loader process; None where the error is of another kind."""
    import torch

    what = one_line(str(error)) or type(error).__name__
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    kinds = (MemoryError, torch.OutOfMemoryError)
    if any(isinstance(cause, kinds) or any(words in str(cause) for words in OUT_OF_MEMORY) for cause in causes):
        settings = [name for name in ("batch_size", "image_size", "num_workers", "workers") if hasattr(config, name)]
        options = " or ".join(f"--{name.replace('_', '-')}" for name in settings)
        return f"out of memory ({what})" + (f"; a smaller {options} needs less" if options else "")
    if any("DataLoader worker (pid" in str(cause) for cause in causes):
        return f"a loader process ended ({what})"
    return None


def _tell_of_thread(args: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread hands its OSError to who writes next, and that is told."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)
