"""However a run ends before its time: one sentence, a checkpoint that loads, and from there the same run to the bit."""

import errno
import multiprocessing
import os
import signal
import subprocess
import threading
import warnings
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import pytest
import torch
from full_disk import no_space, room_for
from told import assert_same_run

from rtmdet_fast import RTMDet, UserError
from rtmdet_fast.cli import main
from rtmdet_fast.inference.preprocess import normalize
from rtmdet_fast.training import train as train_module
from rtmdet_fast.training.callbacks import Callback
from rtmdet_fast.training.config import resolve
from rtmdet_fast.training.interruption import Interruption
from rtmdet_fast.training.state import remove_run
from rtmdet_fast.training.train import train

STEPS = 18 // 4
"""Of an epoch."""
EVERY_STEP = dict(save_every="0.000001s")


class Crash(Exception):
    pass


@pytest.fixture
def config(config, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no power is cut here
    return replace(config, epochs=2, stage2_epochs=1, val_interval=2)


@pytest.fixture(autouse=True)
def ctrl_c():
    """As in a terminal; a shell has what it starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class After(Callback):
    """Calls `act` after a step, before the checkpoint of it; after all further ones too, if `on`."""

    def __init__(self, iteration, act, on=False):
        self.iteration, self.act, self.on = iteration, act, on

    def on_step(self, progress):
        if progress.iteration == self.iteration or (self.on and progress.iteration > self.iteration):
            self.act()


def crash(*_, **__):
    raise Crash


def saved(config):
    return torch.load(config.out / "last.pth", weights_only=True)["training"]


def unfinished(config):
    return [path.name for path in config.out.iterdir() if path.name.endswith(".tmp")]


def resumed(config):
    torch.manual_seed(12345)
    return train(replace(config, resume=True))


@pytest.mark.parametrize(
    ("iteration", "workers", "accumulate", "task"),
    [
        (3, 2, 1, "det"),
        pytest.param(STEPS + 3, 0, 1, "ins", marks=pytest.mark.slow),
        pytest.param(4, 1, 2, "det", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_from_a_checkpoint_within_an_epoch(config, whole, iteration, workers, accumulate, task):
    """In the first epoch, with mosaic and mixup, in stage 2, and between batches that make one step."""
    config = replace(config, num_workers=workers, accumulate=accumulate, task=task)
    with pytest.raises(Crash):
        train(replace(config, **EVERY_STEP), callbacks=[After(iteration, crash)])
    assert saved(config)["iteration"] == iteration - 1
    assert_same_run(whole(config), resumed(config))


@pytest.mark.parametrize(
    ("within", "workers"),
    [("best_score_thresholds", 0), pytest.param("evaluate", 2, marks=pytest.mark.slow)],
)
def test_a_crash_in_a_validation_costs_no_step_and_repeats_no_row(config, whole, monkeypatch, within, workers):
    """Before and after its row is in metrics.csv."""
    config = replace(config, num_workers=workers, val_interval=1)
    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(train_module, within, crash)
        train(config)
    state = saved(config)
    assert (state["epoch"], state["step"], state["iteration"]) == (0, STEPS, STEPS)
    assert_same_run(whole(config), resumed(config))


@pytest.mark.parametrize("file", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_a_crash_between_the_last_files_of_a_run_leaves_none_of_them_old(config, monkeypatch, file):
    """Of a run without validation, whose best weights are its last."""
    config = replace(config, val=None, val_images=None)
    save, count = RTMDet.save, []

    def crashing(model, path, **extra):
        count.append(path)
        if len(count) == file:
            raise Crash
        save(model, path, **extra)

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(RTMDet, "save", crashing)
        train(config)
    resumed(config)
    last, best = (torch.load(config.out / name, weights_only=True)["state_dict"] for name in ("last.pth", "best.pth"))
    assert all(torch.equal(last[key], best[key]) for key in last)


@pytest.mark.parametrize(
    ("number", "code", "iteration"),
    [(signal.SIGTERM, 143, 2), pytest.param(signal.SIGINT, 130, 2 * STEPS, marks=pytest.mark.slow)],
)
def test_a_signal_ends_a_run_after_the_step_with_a_checkpoint(
    config, whole, monkeypatch, capsys, number, code, iteration
):
    """Sent to its loaders as well, as terminals and SLURM do, and twice, as torchrun hands it on."""
    config = replace(config, num_workers=2)

    def send():
        processes = [str(process.pid) for process in multiprocessing.active_children()]
        for _ in range(2):  # by another process: what their own sends them the loaders obey
            subprocess.run(["kill", f"-{int(number)}", *processes, str(os.getpid())], check=True)

    before = signal.getsignal(number)
    assert cli(config, monkeypatch, After(iteration, send)) == code
    word = {143: "terminated", 130: "interrupted"}[code]
    assert capsys.readouterr().err == f"{word}; the training goes on with --resume\n"
    assert signal.getsignal(number) == before and not multiprocessing.active_children()
    assert saved(config)["iteration"] == iteration
    assert_same_run(whole(config), resumed(config))


def cli(config, monkeypatch, *callbacks):
    """The exit code of `rtmdet-fast train` with these settings and callbacks."""
    with monkeypatch.context() as patched:
        patched.setattr(train_module, "train", lambda _: train(config, callbacks=callbacks))
        for module, name in ((warnings, "showwarning"), (threading, "excepthook")):  # which main sets
            patched.setattr(module, name, getattr(module, name))
        return main(["train", "--out", str(config.out)])


@pytest.mark.parametrize("where", ["make_model", "evaluate", pytest.param("report_run", marks=pytest.mark.slow)])
def test_a_signal_outside_of_the_steps_ends_a_run_at_once(config, whole, monkeypatch, capsys, where):
    config = replace(config, report=where == "report_run")

    def sent(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    with monkeypatch.context() as patched:
        patched.setattr(train_module, where, sent)
        assert cli(config, monkeypatch) == 143
    told = capsys.readouterr().err
    if where == "make_model":
        assert told == "terminated\n" and not (config.out / "last.pth").exists()
    else:
        assert told == "terminated; the training goes on with --resume\n"
        again = resumed(config)
        assert_same_run(whole(replace(config, report=False)), again)
        assert (again.report is None) == (where != "report_run")


def test_a_second_ctrl_c_is_at_once_and_a_programs_own_handlers_stay(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("rtmdet_fast.training.interruption.clock", lambda: now[0])
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption:
        interruption.hold()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # of the same press
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.arrived == signal.SIGINT
        now[0] += 2
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == [1] and interruption.arrived is None
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (signal.SIGKILL, "out of memory ("),
        pytest.param(signal.SIGUSR1, "a loader process ended (", marks=pytest.mark.slow),
    ],
)
def test_a_dead_loader_process_ends_a_run_with_one_sentence(config, whole, monkeypatch, capsys, number, word):
    config = replace(config, num_workers=2)

    def end_a_loader():
        os.kill(multiprocessing.active_children()[0].pid, number)

    assert cli(config, monkeypatch, After(STEPS + 2, end_a_loader)) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {word}") and "DataLoader worker" in told and told.count("\n") == 1
    assert told.endswith("; the training goes on with --resume\n")
    if number != signal.SIGKILL:
        assert_same_run(whole(config), resumed(config))


def test_a_gpu_out_of_memory_ends_a_run_with_one_sentence(config, monkeypatch, capsys):
    count = []

    def full(images):
        count.append(1)
        if len(count) == STEPS + 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1.00 MiB free.")
        return normalize(images)

    with monkeypatch.context() as patched:
        patched.setattr(RTMDet, "normalize", staticmethod(full))
        assert cli(replace(config, **EVERY_STEP), monkeypatch) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: out of memory (CUDA out of memory. Tried to") and told.count("\n") == 1
    assert "a smaller --batch-size" in told and told.endswith("; the training goes on with --resume\n")
    assert saved(config)["iteration"] == STEPS + 2


@pytest.mark.parametrize(("full", "why"), [(partial(room_for, 2**15), errno.EFBIG), (no_space, errno.ENOSPC)])
def test_a_full_disk_ends_a_run_with_one_sentence(config, monkeypatch, capsys, full, why):
    config = replace(config, loggers=())
    with ExitStack() as disk:
        filled = After(2, lambda: disk.enter_context(full()))
        assert cli(replace(config, **EVERY_STEP), monkeypatch, filled) == 2
    told = capsys.readouterr().err
    assert told == f"error: cannot write {config.out}/last.pth: {os.strerror(why)}\n"
    assert saved(config)["iteration"] == 1 and not unfinished(config)


def test_no_checkpoint_holds_weights_of_a_loss_that_is_not_finite(config, monkeypatch):
    """The loss of a step is looked at during the next one."""
    count = []

    def poisoned(images):
        count.append(1)
        return normalize(images) * (float("nan") if len(count) == 3 else 1.0)

    monkeypatch.setattr(RTMDet, "normalize", staticmethod(poisoned))
    with pytest.raises(UserError, match="loss is nan"):
        train(replace(config, **EVERY_STEP))
    assert saved(config)["iteration"] == 2


@pytest.mark.parametrize("links", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_newest_checkpoints_stay_and_each_can_be_gone_on_from(config, whole, monkeypatch, links):
    config = replace(config, keep=3, **EVERY_STEP)
    if not links:
        monkeypatch.setattr(os, "link", partial(crash_with, OSError(errno.EPERM, "no links here")))
    with pytest.raises(Crash):
        train(config, callbacks=[After(2 * STEPS, crash)])
    older = {path.name for path in config.out.glob("last-*.pth")}
    assert older == {f"last-{2 * STEPS - 3}.pth", f"last-{2 * STEPS - 2}.pth"} and not unfinished(config)
    os.replace(config.out / f"last-{2 * STEPS - 3}.pth", config.out / "last.pth")
    assert saved(config)["iteration"] == 2 * STEPS - 3
    assert_same_run(whole(config), resumed(config))
    older = {path.name for path in config.out.glob("last-*.pth")}
    assert older == {f"last-{2 * STEPS - 2}.pth", f"last-{2 * STEPS - 1}.pth"}
    remove_run(config.out)
    assert not list(config.out.glob("last-*.pth"))


def crash_with(error, *_):
    raise error


def test_times_between_checkpoints_that_cannot_be(config):
    assert resolve(config).save_every == 1800 and resolve(replace(config, save_every="10m")).save_every == 600
    for bad in ("soon", "0", "-1m"):
        with pytest.raises(UserError, match=f"^--save-every {bad} is no time"):
            resolve(replace(config, save_every=bad))
    with pytest.raises(UserError, match="--keep is 0"):
        resolve(replace(config, keep=0))
