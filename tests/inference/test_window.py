"""Windows: where there is no display one sentence, where there is one the picture, until it is closed."""

import shutil
import subprocess
import sys
import types

import cv2
import numpy as np
import pytest
import torch

from rtmdet_fast import Results, UserError
from rtmdet_fast.inference import window
from rtmdet_fast.inference.window import Window

PICTURE = np.zeros((48, 64, 3), np.uint8)


def found(image=PICTURE):
    return Results(image, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), ("a",), path="x/a.jpg")


@pytest.fixture
def screen(monkeypatch):
    """A display made of a dict: what is shown, the keys that will be pressed, and whether the window is there."""
    state = {"shown": [], "keys": [], "there": False}

    def named(title, flags):
        state["there"] = True

    def key(milliseconds):
        return state["keys"].pop(0) if state["keys"] else -1

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: types.SimpleNamespace(returncode=0))
    monkeypatch.setattr(cv2, "namedWindow", named)
    monkeypatch.setattr(cv2, "resizeWindow", lambda *args: None)
    monkeypatch.setattr(cv2, "imshow", lambda title, image: state["shown"].append((title, image)))
    monkeypatch.setattr(cv2, "waitKey", key)
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *args: float(state["there"]))
    monkeypatch.setattr(cv2, "destroyWindow", lambda title: state.update(there=False))
    return state


def test_pictures_are_shown_until_a_key_or_the_user_closes_the_window(screen):
    with Window("a") as one:
        assert one.show(PICTURE) and one.show(PICTURE + 1)
        screen["keys"] = [ord("x")]
        assert one.show(PICTURE)
        for key in (27, ord("q")):
            screen["keys"] = [key]
            assert not one.show(PICTURE)
        screen["there"] = False
        shown = len(screen["shown"])
        assert not one.show(PICTURE) and len(screen["shown"]) == shown  # it is not opened again
    assert not screen["there"]


def test_results_are_shown_until_any_key(screen):
    screen["keys"] = [-1, -1, -1, ord("x")]
    found().show()
    assert [title for title, _ in screen["shown"]] == ["a.jpg"]
    assert not screen["keys"] and not screen["there"]


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="a display is always there")
def test_without_a_display_one_sentence_says_so(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(UserError, match=r"^there is no display to show pictures on .*: save them instead$"):
        found().show()
    monkeypatch.setenv("DISPLAY", ":4711")  # where OpenCV's toolkit would end the process
    with pytest.raises(UserError, match="OpenCV cannot open a window"):
        found().show()


@pytest.mark.skipif(shutil.which("Xvfb") is None, reason="Xvfb is not installed")
def test_on_a_real_display(monkeypatch):
    server = subprocess.Popen(["Xvfb", "-displayfd", "1", "-nolisten", "tcp"], stdout=subprocess.PIPE, stderr=-3)
    try:
        monkeypatch.setenv("DISPLAY", f":{server.stdout.readline().decode().strip()}")
        code = (
            "import numpy as np\nfrom rtmdet_fast.inference.window import Window\n"
            "with Window('a') as one:\n    assert one.show(np.zeros((48, 64, 3), np.uint8))\n"
            "    import cv2; cv2.destroyAllWindows(); assert not one.show(np.zeros((48, 64, 3), np.uint8))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()


def test_a_notebook_displays_by_itself(monkeypatch):
    shown = []
    shell = types.SimpleNamespace(kernel=None)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=shown.append))
    results = found()
    results.show()
    assert shown == [results]
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    assert not window.in_notebook()
