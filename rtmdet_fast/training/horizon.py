"""Where a run ends: after the epochs asked for, or nearer, where `--time` or `--patience` say so."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rtmdet_fast.training.config import Settings

clock = time.monotonic
"""In seconds."""


@dataclass(frozen=True)
class Horizon:
    """The end as it is planned now; rate, averaging and stage 2 go by it.

    An end that comes nearer keeps its stage 2, for which the run then leaves out epochs of stage 1. Once stage 2 has
    begun, it can only become shorter.
    """

    epochs: int
    """Of the run."""
    stage2_epochs: int
    """Of these the last ones, without strong augmentation."""
    reason: str | None = None
    """Why they are fewer than asked for: "patience" or "time"."""

    @property
    def stage2_begin(self) -> int:
        """Epochs before stage 2."""
        return self.epochs - self.stage2_epochs

    def validates(self, epoch: int, interval: int | None) -> bool:
        """Whether the epoch, counted from 1, ends with a validation."""
        if epoch == self.epochs:
            return True
        if interval is not None:
            return epoch % interval == 0
        return epoch % max(self.epochs // 30, 1) == 0 or epoch > self.stage2_begin

    def within(
        self, seconds: float, epoch: int, epoch_seconds: float, validation_seconds: float, settings: Settings
    ) -> Horizon:
        """After `epoch` epochs, with as many more, and their validations, as `seconds` have room for."""
        begun = self.reason == "patience" or 0 < self.stage2_epochs > self.epochs - epoch

        def ending_after(epochs: int) -> Horizon:
            if begun:
                stage2 = max(epochs - self.stage2_begin, 0)
            else:
                # as many as the run would have that is asked for so many epochs
                share = round(epochs * settings.stage2_epochs / settings.epochs)
                stage2 = min(max(share, min(settings.stage2_epochs, max(epochs // 2, 1))), epochs - epoch)
            reason = self.reason if epochs == self.epochs else "time" if epochs < settings.epochs else None
            return Horizon(epochs, stage2, reason)

        most = self.epochs if begun else settings.epochs
        found = ending_after(min(most, epoch + max(int(seconds / max(epoch_seconds, 1e-9)), 0)))
        while found.epochs > epoch:
            left = found.epochs - epoch
            validations = left // (settings.val_interval or max(found.epochs // 30, 1)) + found.stage2_epochs + 1
            if left * epoch_seconds + min(validations, left) * validation_seconds <= seconds:
                break
            found = ending_after(found.epochs - 1)
        return found

    def out_of_patience(self, epoch: int, best_epoch: int, patience: int) -> Horizon:
        """After a validation: with stage 2 next, or with the end, where the best was `patience` epochs ago.

        Stage 2 has patience of its own, from its beginning: it is another augmentation, under which figures rise.
        """
        in_stage2 = self.stage2_epochs > 0 and epoch >= self.stage2_begin
        since = max(best_epoch, self.stage2_begin) if in_stage2 else best_epoch
        if epoch == self.epochs or epoch - since < patience:
            return self
        if in_stage2:
            return Horizon(epoch, epoch - self.stage2_begin, "patience")
        return Horizon(epoch + self.stage2_epochs, self.stage2_epochs, "patience")
