"""Where the figures of a run go besides metrics.csv: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rtmdet_fast.training.callbacks import Logger, Progress

if TYPE_CHECKING:
    from rtmdet_fast.training.config import Settings, TrainResult


class TensorBoard(Logger):
    """Events in the folder of the run."""

    def on_start(self, settings: Settings, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board: Any = SummaryWriter(str(settings.out), purge_step=iteration + 1 if iteration else None)

    def on_step(self, progress: Progress) -> None:
        self._write("train", progress)

    def on_epoch(self, progress: Progress) -> None:
        self._write("val", progress)

    def on_end(self, result: TrainResult) -> None:
        self._board.flush()  # which tells what its thread could not write, as `close` does not
        self._board.close()

    def _write(self, group: str, progress: Progress) -> None:
        for name, value in scalars(group, progress).items():
            self._board.add_scalar(name, value, progress.iteration)


def scalars(group: str, progress: Progress) -> dict[str, float]:
    """The figures there are, as group/name; of an epoch those of its validation."""
    return {f"{group}/{name}": value for name, value in progress.metrics.items() if (group, name) != ("val", "loss")}
