"""A page that stands alone: without scripts or outside resources, light or dark, on a phone and on paper.

The parts are HTML as text. What is `text` in a signature is escaped here; what is `html` is taken as it is.
"""

from __future__ import annotations

import base64
import math
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from rtmdet_fast.files import write_atomically

# cv2 is imported where it is used: the package imports without it.

# The long side of a picture: small ones grow before letters are drawn on them, large ones shrink.
PICTURE_SIDE = 380


def write_page(path: str | Path, title: str, sections: Iterable[str], note: str = "") -> Path:
    """Writes the page and returns its path. UserError where it cannot be written.

    Args:
        path: of the file; its folder is made where it is missing.
        title: text.
        sections: html, as `section` makes them; empty ones are left out.
        note: text beside the time of writing.
    """
    written = f"written {time.strftime('%Y-%m-%d %H:%M')}"
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>"
        f'<h1>{escape(title)}</h1><p class="note">{escape(f"{note}; {written}" if note else written)}</p>\n'
        + "\n".join(part for part in sections if part)
        + "\n</body></html>\n"
    )
    path = Path(path)
    with write_atomically(path) as file:
        file.write(page.encode(errors="replace"))
    return path


def section(title: str, *html: str, note: str = "") -> str:
    """A part of the page under its title (text), with a note (text); nothing where there is no content."""
    if not any(html):
        return ""
    told = f'<p class="note">{escape(note)}</p>' if note else ""
    head = f"<h2>{escape(title)}</h2>" if title else ""
    return f"<section>{head}{told}{''.join(html)}</section>"


def grid(*figures: str) -> str:
    """Figures (html) beside each other, as many as the width takes."""
    return f'<div class="grid">{"".join(figures)}</div>' if any(figures) else ""


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """The page's chief figures: what each is (text) and its value (html)."""
    cells = "".join(f"<div><b>{value}</b><span>{escape(label)}</span></div>" for label, value in figures)
    return f'<div class="tiles">{cells}</div>' if cells else ""


def figure(title: str, html: str, note: str = "") -> str:
    """What has a title (text), and a note (text) beneath; nothing where it is empty."""
    if not html:
        return ""
    told = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{html}{told}</figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], shares: Sequence[float] | None = None) -> str:
    """Texts in columns, of which the first stands left.

    shares: of each row in [0, 1], drawn as a bar behind its first cell.
    """
    if not rows:
        return ""
    body = []
    for i, row in enumerate(rows):
        first, *others = (escape(cell) for cell in row)
        bar = "" if shares is None else f' class="bar" style="--share:{100 * min(max(shares[i], 0.0), 1.0):.1f}%"'
        body.append(f"<tr><td{bar}>{first}</td>{''.join(f'<td>{cell}</td>' for cell in others)}</tr>")
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def long_table(head: Sequence[str], rows: Sequence[Sequence[str]], shares: Sequence[float] | None = None) -> str:
    """A table that goes on beside itself where it is long."""
    step = max(math.ceil(len(rows) / 4), 12)
    parts = (slice(start, start + step) for start in range(0, len(rows), step))
    return side_by_side(*(table(head, rows[part], None if shares is None else shares[part]) for part in parts))


def side_by_side(*html: str) -> str:
    """Tables beside each other, as far as the width takes them."""
    return f'<div class="tables">{"".join(html)}</div>' if any(html) else ""


def bars(title: str, rows: Sequence[tuple[str, float, str]], note: str = "", color: str = "") -> str:
    """Horizontal bars: what each is, its length by the greatest of them, and what stands beside it (texts)."""
    if not rows:
        return ""
    most = max((value for _, value, _ in rows if math.isfinite(value)), default=0.0)
    drawn = "".join(
        f'<tr><th scope="row">{escape(label)}</th><td><div><i style="width:{_share(value, most):.1f}%"></i></div></td>'
        f"<td>{escape(told)}</td></tr>"
        for label, value, told in rows
    )
    ink = f' style="--bar-ink:{color}"' if color else ""
    return figure(title, f'<table class="bars"{ink}>{drawn}</table>', note)


def _share(value: float, most: float) -> float:
    return 100 * value / most if math.isfinite(value) and most > 0 and value > 0 else 0.0


def settings_table(settings: Mapping[str, Any]) -> str:
    """Names and values; of nested mappings and dataclasses the names with dots."""
    cells = "".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(str(value))}</td></tr>'
        for key, value in flat(settings).items()
    )
    return f'<table class="settings">{cells}</table>' if cells else ""


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings and dataclasses as one, `a.b` of {"a": {"b": …}}."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def versions(*packages: str) -> dict[str, str]:
    """Of Python, the system and the packages that are installed, by name."""
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found | {"system": f"{platform.system()} {platform.machine()}"}


def picture(image: np.ndarray, caption: str, quality: int = 85) -> str:
    """A BGR image [H, W, 3] uint8 as JPEG within the page, with its caption (text)."""
    import cv2

    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    address = "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode()
    return f'<div><img alt="{escape(caption)}" src="{address}"><span>{escape(caption)}</span></div>'


def pictures(title: str, *html: str, note: str = "") -> str:
    """Pictures that belong together, side by side under one title (text)."""
    told = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<figure class="pair"><figcaption>{escape(title)}</figcaption><div>{"".join(html)}</div>{told}</figure>'


def resized(image: np.ndarray, scale: float) -> np.ndarray:
    """An image of `scale` times the size, of one pixel at least."""
    import cv2

    size = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)


STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --page: #fff; --soft: #5f6773;
        --line: #e3e5e8; --tile: #f5f6f8; --bar: #3d7eff2e; --bar-ink: #3d7eff; --cell: 61, 126, 255 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7e9; --page: #15171a; --soft: #9aa0a8;
          --line: #2c3036; --tile: #1e2126; --bar: #3d7eff59 } }
* { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 1280px; margin: 0 auto; padding: 1.5rem }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .8rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem }
h3 { font-size: 1rem; font-weight: 600; margin: 1.6rem 0 .6rem }
.note { color: var(--soft); margin: .3rem 0 .8rem; font-size: .9rem; max-width: 60rem; overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .7rem;
         margin-top: 1.2rem }
.tiles div { background: var(--tile); border-radius: .5rem; padding: .6rem .9rem }
.tiles b { display: block; font-size: 1.55rem; font-weight: 600; overflow-wrap: anywhere; line-height: 1.25 }
.tiles span, .pair span { color: var(--soft); font-size: .85rem }
small { font-size: .6em; font-weight: 400 }
figure { margin: 0; min-width: 0 }
figcaption { font-size: .92rem; margin-bottom: .35rem; overflow-wrap: anywhere }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1.8rem 1.6rem }
.grid + .grid, .grid + .tables, .tables + .grid, .grid + .wide { margin-top: 1.6rem }
.grid .broad { grid-column: 1 / -1 }
svg { width: 100%; max-width: 34rem; height: auto; display: block }
svg text { font-family: inherit !important }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem .9rem; margin: .3rem 0 0; padding: 0;
          font-size: .85rem }
.legend li { display: flex; gap: .4rem; align-items: baseline; min-width: 0; overflow-wrap: anywhere }
.legend i { flex: none; width: .9rem; height: .25rem; border-radius: .1rem; align-self: center }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start }
.tables > * { max-width: 100% }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
td, th { padding: .2rem .5rem .2rem .25rem; border-bottom: 1px solid var(--line);
         text-align: right; font-weight: 400 }
th { color: var(--soft) }
td:first-child, th:first-child, .settings td { text-align: left; overflow-wrap: anywhere }
.wide td:first-child { min-width: 6rem }
.wide td:not(:first-child) { white-space: nowrap }
.bar { background: linear-gradient(to right, var(--bar) var(--share), transparent var(--share));
       min-width: 9rem }
.bars { width: 100% }
.bars td, .bars th { border: 0; padding: .15rem .4rem .15rem 0; white-space: nowrap }
.bars th { color: inherit; width: 1%; max-width: 13rem; min-width: 5.5rem; white-space: normal;
           overflow-wrap: break-word }
.bars td:last-child { color: var(--soft); width: 1%; text-align: left }
.bars td:nth-child(2) { min-width: 5rem }
.bars i { display: block; height: .85rem; min-width: 1px; border-radius: .15rem; background: var(--bar-ink) }
.matrix { font-size: .8rem }
.matrix td, .matrix th { padding: .25rem .4rem; text-align: center; border: 1px solid var(--line) }
.matrix th[scope=row] { text-align: right; max-width: 10rem; min-width: 4.5rem; overflow-wrap: anywhere }
.matrix thead th { vertical-align: bottom }
.matrix thead th span { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 9rem; overflow: hidden }
.matrix td { background: rgba(var(--cell), var(--share, 0)) }
.matrix .wrong { --cell: 232, 89, 12 }
.findings { list-style: none; margin: 0; padding: 0 }
.findings li { margin: .5rem 0; overflow-wrap: anywhere }
.findings b { color: #fff; border-radius: .25rem; padding: .05rem .4rem; font-size: .8rem; font-weight: 600 }
.findings .note { margin: .1rem 0 }
.pair > div { display: flex; gap: .4rem }
.pair > div > div { flex: 1; min-width: 0 }
img { width: 100%; height: auto; display: block; border-radius: .25rem }
@media (max-width: 500px) {
  body { padding: 1rem }
  .tiles { grid-template-columns: 1fr 1fr }
  .tiles b { font-size: 1.3rem }
  .tiles div { padding: .5rem .7rem }
  td, th { padding: .2rem .35rem .2rem .2rem }
  .bar { min-width: 6rem }
  .pair > div { flex-direction: column } }
@media print {
  :root { color-scheme: light; --ink: #000; --page: #fff; --soft: #444;
          --line: #ccc; --tile: #f5f6f8; --bar: #3d7eff2e }
  body { max-width: none; padding: 0; font-size: 12px }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  figure, tr, .tiles div { break-inside: avoid }
  h2, h3, figcaption, h2 + .note { break-after: avoid }
  .wide { overflow: visible } }
"""
