"""Pictures in a window, where there is a display."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np

from rtmdet_fast.errors import UserError

CLOSING_KEYS = frozenset({27, ord("q"), ord("Q")})  # 27: escape
_PROBE = "import cv2; cv2.namedWindow('probe'); cv2.waitKey(1); cv2.destroyAllWindows()"


class Window:
    """`with Window("title") as window: window.show(image)`. All of it has to happen in one thread.

    Raises UserError where no window can be opened. That is tried in another process, as OpenCV's toolkit ends the one
    that it fails in.
    """

    def __init__(self, title: str) -> None:
        reason = "" if _may_have_display() else "neither DISPLAY nor WAYLAND_DISPLAY is set"
        if not reason:
            tried = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, check=False)
            reason = "OpenCV cannot open a window" if tried.returncode else ""
        if reason:
            raise UserError(f"there is no display to show pictures on ({reason}): save them instead")
        self._title, self._opened = "".join(c if c.isprintable() else "?" for c in title), False

    def show(self, image: np.ndarray, *, wait: bool = False) -> bool:
        """Shows an image [H, W, 3] uint8 BGR in place of the one before, with `wait` until a key is pressed.

        False once the window was closed, or Q or escape pressed.
        """
        import cv2

        if self._opened and self._is_closed(cv2):
            return False
        if not self._opened:
            cv2.namedWindow(self._title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
            cv2.resizeWindow(self._title, image.shape[1], image.shape[0])
            self._opened = True
        cv2.imshow(self._title, image)
        key = cv2.waitKey(1)
        while wait and key < 0 and not self._is_closed(cv2):
            key = cv2.waitKey(50)
        return key & 0xFF not in CLOSING_KEYS and not self._is_closed(cv2)

    def _is_closed(self, cv2: Any) -> bool:
        try:
            return cv2.getWindowProperty(self._title, cv2.WND_PROP_VISIBLE) < 1
        except cv2.error:  # OpenCV 4.11, of a window that is gone and was the only one
            return True

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *exc: object) -> None:
        import cv2

        if self._opened and not self._is_closed(cv2):
            cv2.destroyWindow(self._title)


def in_notebook() -> bool:
    """Whether the code runs in a notebook, which shows pictures by itself."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def _may_have_display() -> bool:
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
