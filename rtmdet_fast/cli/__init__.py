"""The command line: rtmdet-fast train | eval | predict | split | demo | info."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from rtmdet_fast import __version__
from rtmdet_fast.cli.demo import DemoConfig, run_demo
from rtmdet_fast.cli.eval import EvalConfig, run_eval
from rtmdet_fast.cli.info import InfoConfig, run_info
from rtmdet_fast.cli.predict import PredictConfig, run_predict
from rtmdet_fast.cli.split import SplitConfig, run_split
from rtmdet_fast.cli.train import run_train
from rtmdet_fast.errors import UserError
from rtmdet_fast.files import write_json


def main(arguments: list[str] | None = None) -> int:
    """Run a command; exit code 2 and one sentence on stderr where the user's input is at fault."""
    if (sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        print(f"rtmdet-fast {__version__}")
        return 0

    import torch

    from rtmdet_fast.training.config import TrainConfig

    @dataclass(frozen=True, kw_only=True)
    class TrainCommand(TrainConfig):
        json: Path | None = None
        """Write the result to this file."""

    TrainCommand.__doc__ = TrainConfig.__doc__
    commands: dict[type, Callable[[Any], dict[str, Any]]] = {
        TrainCommand: run_train,
        EvalConfig: run_eval,
        PredictConfig: run_predict,
        SplitConfig: run_split,
        DemoConfig: run_demo,
        InfoConfig: run_info,
    }
    subcommand = tyro.conf.subcommand
    config = tyro.cli(
        Annotated[TrainCommand, subcommand("train")]
        | Annotated[EvalConfig, subcommand("eval")]
        | Annotated[PredictConfig, subcommand("predict")]
        | Annotated[SplitConfig, subcommand("split")]
        | Annotated[DemoConfig, subcommand("demo")]
        | Annotated[InfoConfig, subcommand("info")],
        prog="rtmdet-fast",
        description="RTMDet: train, evaluate and predict. --version tells the version.",
        args=arguments,
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a class name must not end a command where the console lacks a letter
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        found = commands[type(config)](config)
        if config.json is not None:
            write_json(config.json, found)
    except UserError as error:
        # A loader process wraps the sentence in its traceback, whose last line it is.
        sentence = str(error).strip().splitlines()[-1].removeprefix("rtmdet_fast.errors.UserError: ")
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    except OSError as error:  # a disk that is full, a folder that cannot be written
        print(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        hint = "a smaller --batch-size or --image-size needs less"
        print(f"error: out of memory ({str(error).splitlines()[0]}); {hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        begun = isinstance(config, TrainConfig) and (config.out / "last.pth").exists()
        print("interrupted" + ("; the training goes on with --resume" if begun else ""), file=sys.stderr)
        return 130
    return 0
