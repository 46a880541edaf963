"""A page in headless Chromium: what of it does not fit at the width of a phone, a tablet or a desktop."""

import json
import os
import re
import shutil
import subprocess
from html import unescape

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (360, 768, 1280)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

# A window is 500 pixels wide at least, a frame is as wide as it is told to be, and media queries go by the frame.
FRAMES = """<!doctype html><meta charset="utf-8"><pre id="found"></pre>
<script>
const found = {}, widths = %s
for (const width of widths) {
  const frame = document.createElement("iframe")
  frame.width = width
  frame.height = 900
  frame.onload = () => {
    const page = frame.contentDocument, room = page.documentElement.clientWidth
    const scrolls = part => part && (getComputedStyle(part).overflowX != "visible" || scrolls(part.parentElement))
    const beyond = [...page.body.querySelectorAll("*")].filter(part => {
      const { left, right, width } = part.getBoundingClientRect()
      return width && (right > room + 1 || left < -1) && !scrolls(part.parentElement)
    }).map(part => `${part.tagName} ${part.getAttribute("class") || ""}: ${part.textContent.slice(0, 60)}`)
    if (page.documentElement.scrollWidth > room + 1) beyond.push(`the page: ${page.documentElement.scrollWidth}`)
    found[width] = { beyond: beyond, height: page.documentElement.scrollHeight }
    document.getElementById("found").textContent = JSON.stringify(found)
  }
  frame.src = %s
  document.body.append(frame)
}
</script>"""


def chromium(*arguments) -> str:
    options = ("--headless", "--disable-gpu", "--allow-file-access-from-files", "--virtual-time-budget=20000")
    sandbox = ("--no-sandbox",) if os.geteuid() == 0 else ()
    return subprocess.run(
        [CHROMIUM, *options, *sandbox, *map(str, arguments)], check=True, capture_output=True, text=True, timeout=120
    ).stdout


def beyond(page) -> dict[int, list[str]]:
    """Of the page in a file, by width in pixels: what reaches beyond it without a scroll bar of its own."""
    frames = page.with_name("frames.html")
    frames.write_text(FRAMES % (list(WIDTHS), json.dumps(page.name)), encoding="utf-8")
    text = chromium("--dump-dom", frames.as_uri())
    found = json.loads(unescape(re.search(r'<pre id="found">(.*?)</pre>', text, re.DOTALL)[1]))
    assert {int(width) for width in found} == set(WIDTHS) and all(part["height"] > 300 for part in found.values())
    return {int(width): part["beyond"] for width, part in found.items()}
