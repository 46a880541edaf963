"""The drawings of docs/kernels.md and docs/rtdetr.md: `python docs/drawings/draw.py` writes the SVG files beside it.

They have a light ground of their own, so that they read alike on light and dark pages.
"""

# ruff: noqa: RUF001 (minus and multiplication signs)
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

INK, MUTED, LINE = "#1f2328", "#59636e", "#c9d1d9"
BLUE, GREEN, ORANGE, GREY = "#54aeff", "#4ac26b", "#fb8f44", "#e6eaef"
PALE_BLUE, PALE_GREEN, PALE_ORANGE = "#ddf4ff", "#dafbe1", "#fff1e5"
DARK_BLUE, DARK_GREEN, DARK_ORANGE = "#0550ae", "#116329", "#953800"

Point = tuple[float, float]


class Drawing:
    """SVG elements, gathered in the order of drawing; coordinates in pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            "font-family=\"system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif\" font-size=\"13\">",
            f"<title>{title}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{MUTED}"/></marker></defs>',
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" fill="#ffffff" stroke="{LINE}"/>',
        ]

    def add(self, element: str) -> None:
        self.parts.append(element)

    def rect(
        self, x: float, y: float, w: float, h: float, fill: str = "none", stroke: str = LINE, more: str = ""
    ) -> None:
        self.add(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" stroke="{stroke}" {more}/>')

    def text(self, x: float, y: float, words: str, fill: str = INK, anchor: str = "start", more: str = "") -> None:
        """Lines of `words`, 17 pixels apart; `y` is the base of the first."""
        for i, line in enumerate(words.split("\n")):
            at = f'x="{x:g}" y="{y + 17 * i:g}" fill="{fill}" text-anchor="{anchor}"'
            self.add(f"<text {at} {more}>{line}</text>")

    def head(self, x: float, y: float, words: str) -> None:
        self.text(x, y, words, more='font-weight="600"')

    def arrow(self, *points: Point) -> None:
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        self.add(f'<path d="{path}" fill="none" stroke="{MUTED}" stroke-width="1.5" marker-end="url(#tip)"/>')

    def polygon(self, points: Sequence[Point], fill: str = "none", stroke: str = INK, more: str = "") -> None:
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.add(f'<polygon points="{corners}" fill="{fill}" stroke="{stroke}" {more}/>')

    def grid(self, x: float, y: float, rows: int, columns: int, cell: float, fill: Callable[[int, int], str]) -> None:
        """Cells of the colours fill(row, column)."""
        for r in range(rows):
            for c in range(columns):
                self.rect(x + c * cell, y + r * cell, cell, cell, fill(r, c))

    def box(self, x: float, y: float, w: float, h: float, words: str, fill: str, ink: str = INK) -> None:
        """A rounded box with centred lines."""
        self.rect(x, y, w, h, fill, LINE, 'rx="5"')
        lines = words.count("\n") + 1
        self.text(x + w / 2, y + h / 2 + 5 - 8.5 * (lines - 1), words, ink, "middle")

    def save(self, path: Path) -> None:
        path.write_text("\n".join([*self.parts, "</svg>\n"]), encoding="utf-8")


def dwconv_bn_silu() -> Drawing:
    """A program slides down the rows of its columns; below, which passes over the data there are."""
    d = Drawing(860, 560, "Depth-wise convolution, BatchNorm and SiLU in one kernel")
    cell, rows, top = 20, 13, 62
    d.head(24, 34, "One program: some channels, some columns, sliding down the rows (K = 5, stride 1)")

    at = 6  # the row of the input that is used now

    def input_colour(r: int, c: int) -> str:
        halo = c < 2 or c >= 10
        if r == at:
            return PALE_ORANGE if halo else BLUE
        if at < r <= at + 3:
            return PALE_ORANGE if halo else PALE_BLUE
        return "#f6f8fa" if halo else (GREY if r < at else "#ffffff")

    def output_colour(r: int, c: int) -> str:
        if r < at - 2:
            return GREY
        return GREEN if r <= at + 2 else "#ffffff"

    x_in, x_out = 110, 470
    d.grid(x_in, top, rows, 12, cell, input_colour)
    d.grid(x_out, top, rows, 8, cell, output_colour)
    bottom = top + rows * cell
    d.text(x_in + 120, bottom + 19, "x: columns of the tile, and 2 of halo on each side", anchor="middle")
    d.text(x_out + 80, bottom + 19, "output", anchor="middle")

    d.text(100, top + 2.6 * cell, "used, and\nforgotten", MUTED, "end")
    d.text(100, top + at * cell + 15, "in use", DARK_BLUE, "end")
    d.text(100, top + (at + 2) * cell + 7, "on their\nway", DARK_BLUE, "end")
    d.arrow((x_in + 244, top + at * cell + 10), (x_out - 6, top + at * cell + 10))
    middle = (x_in + 240 + x_out) / 2
    d.text(middle, top + at * cell - 26, "added to\nK = 5 rows", anchor="middle")
    d.text(middle, top + at * cell + 32, "weights of\nrow 4 … row 0", MUTED, "middle")
    d.text(x_out + 172, top + 1.9 * cell, "complete: stored, and in\ntraining added to the\nmoments of the tile", MUTED)
    d.text(
        x_out + 172,
        top + (at - 1) * cell + 15,
        "sums of 5 rows in flight,\nin registers (float32):\nthe row of the input is\nloaded once",
        DARK_GREEN,
    )
    d.text(x_out + 172, top + (at + 4) * cell + 15, "not yet begun", MUTED)

    y = 396
    d.head(24, y - 14, "Passes over the data")
    d.text(24, y + 25, "inference")
    d.box(120, y, 430, 40, "convolution, BatchNorm (folded into the weights), SiLU, residual", PALE_BLUE)
    d.text(562, y + 25, "reads x, writes y", MUTED)

    y += 54
    d.text(24, y + 25, "training")
    d.box(120, y, 190, 40, "convolution, moments\nof each tile", PALE_BLUE)
    d.arrow((312, y + 20), (330, y + 20))
    d.box(332, y, 78, 40, "merge the\nmoments", PALE_ORANGE)
    d.arrow((412, y + 20), (430, y + 20))
    d.box(432, y, 118, 40, "normalise,\nSiLU, residual", PALE_BLUE)
    d.text(562, y + 17, "reads x, writes z; reads z, writes y\n(SyncBatchNorm: of all processes)", MUTED)

    y += 54
    d.text(24, y + 25, "backward")
    d.box(120, y, 190, 40, "sums of du and du · x̂", PALE_BLUE)
    d.arrow((312, y + 20), (430, y + 20))
    d.box(432, y, 118, 40, "dx and dw\ntogether", PALE_BLUE)
    d.text(562, y + 17, "reads dy, z; reads dy, z, x, writes dx\n(dz is computed where it is used)", MUTED)
    return d


def assign() -> Drawing:
    """The cost matrix, of which a row is one program's and nothing is stored."""
    d = Drawing(860, 500, "Label assignment without a cost matrix in memory")
    cell, columns, rows = 18, 29, 6
    x, y = 120, 78
    d.head(24, 34, "The matrix of costs: ground truths by priors. No entry is ever stored.")
    candidates = {2, 3, 4, 7, 8, 9, 10, 13, 14, 15, 16, 20, 21, 24, 25, 27, 28}
    won = {0: (2, 3, 20), 1: (7, 8, 9), 2: (9, 10, 24), 3: (14,), 4: (15, 16, 25), 5: (27,)}
    looked_at = 2

    def colour(r: int, c: int) -> str:
        if c in won[r]:
            return ORANGE if c == 9 else GREEN
        if c not in candidates:
            return "#f6f8fa"
        return PALE_BLUE if r == looked_at else "#ffffff"

    d.grid(x, y, rows, columns, cell, colour)
    d.rect(x - 2, y + looked_at * cell - 2, columns * cell + 4, cell + 4, "none", DARK_BLUE, 'stroke-width="2"')
    d.rect(x + 9 * cell - 2, y - 2, cell + 4, rows * cell + 4, "none", DARK_ORANGE, 'stroke-width="2"')
    d.text(x - 12, y + 36, "ground\ntruths of\nan image", MUTED, "end")
    d.text(x, y - 10, "priors, fine levels to coarse (8,400 at 640 px)", MUTED)
    d.arrow((x + columns * cell, y + rows * cell + 14), (x + 20 * cell, y + rows * cell + 14))
    d.text(x + columns * cell, y + rows * cell + 34, "a row is gone through from the coarse end", MUTED, "end")
    d.rect(x, y + rows * cell + 11, 12, 12, "#f6f8fa")
    d.text(x + 18, y + rows * cell + 22, "inside no ground truth: no candidate", MUTED)
    d.text(662, y + 2, "1. Once a prior: the part of\nthe cost that is the same\nfor all ground truths", MUTED)
    d.text(662, y + looked_at * cell + 32, "2. A row: one program", DARK_BLUE)
    d.text(662, y + 4 * cell + 24, "3. Won by two: resolved", DARK_ORANGE)

    y = 256
    d.head(24, y, "2. Match: a program keeps two short lists in registers")
    cell = 26
    d.text(24, y + 32, "least costs", INK)
    d.grid(120, y + 14, 1, 13, cell, lambda r, c: GREEN if c < 3 else PALE_BLUE)
    for i, cost in enumerate(
        ("1.2", "1.9", "2.0", "2.4", "3.1", "3.3", "4.0", "4.4", "5.2", "6.1", "7.7", "8.0", "9.3")
    ):
        d.text(120 + cell * (i + 0.5), y + 32, cost, INK, "middle", 'font-size="11"')
    d.text(24, y + 68, "greatest IoUs", INK)
    d.grid(120, y + 50, 1, 13, cell, lambda r, c: PALE_BLUE)
    ious = (".81", ".74", ".66", ".41", ".30", ".22", ".11", ".05", ".03", ".01", "0", "0", "0")
    for i, iou in enumerate(ious):
        d.text(120 + cell * (i + 0.5), y + 68, iou, INK, "middle", 'font-size="11"')
    d.text(474, y + 32, "wins the first k of them: here 3", DARK_GREEN)
    d.text(474, y + 68, "sum 3.34, thus k = max(int(3.34), 1) = 3", DARK_BLUE)
    d.text(24, y + 98, "Both have topk = 13 places. A cost or IoU enters where it beats the worst of its list.", MUTED)

    y = 396
    d.head(24, y, "3. Resolve: one program a block of priors")
    d.rect(24, y + 16, 16, 16, ORANGE)
    d.text(
        50,
        y + 29,
        "A prior that several ground truths won goes to the least cost of all, computed again for these few priors.",
        INK,
    )
    d.rect(24, y + 42, 16, 16, GREEN)
    d.text(
        50,
        y + 55,
        "One that a single ground truth won keeps it. How many won a prior, and which, is one 64-bit sum: the order",
        INK,
    )
    d.text(
        50, y + 72, "of the programs makes no difference, and the result is the same to the bit from run to run.", INK
    )
    return d


def rotated_iou() -> Drawing:
    """Two boxes, then box 2 in the frame of box 1, then what one edge contributes."""
    d = Drawing(860, 372, "IoU of rotated boxes as a sum over edges")
    a, b = 92.0, 52.0
    centre, wx, wy, hx, hy = (38.0, 20.0), 78.0, 45.0, -26.0, 45.0  # of box 2, half sides as vectors

    def quad(x: float, y: float) -> list[Point]:
        corners = ((-1, -1), (1, -1), (1, 1), (-1, 1))
        return [(x + centre[0] + i * wx + j * hx, y + centre[1] + i * wy + j * hy) for i, j in corners]

    d.head(24, 34, "1. In the frame of box 1")
    x, y = 128, 168
    corners = quad(x, y)
    d.add(f'<clipPath id="one"><rect x="{x - a:g}" y="{y - b:g}" width="{2 * a:g}" height="{2 * b:g}"/></clipPath>')
    d.polygon(corners, BLUE, "none", 'clip-path="url(#one)" opacity="0.6"')
    d.rect(x - a, y - b, 2 * a, 2 * b, "none", INK, 'stroke-width="2"')
    d.polygon(corners, "none", DARK_ORANGE, 'stroke-width="2"')
    d.text(x - a, y + b + 20, "box 1:\n|x| ≤ a, |y| ≤ b")
    d.text(x + 118, y + 86, "box 2", DARK_ORANGE)
    d.text(24, 326, "Moved and turned, so that box 1\nis upright about the origin.", MUTED)

    d.head(324, 34, "2. Each edge of box 2")
    x, y = 428, 168
    corners = quad(x, y)
    start, end = corners[0], corners[1]
    slope = (end[1] - start[1]) / (end[0] - start[0])
    bend, last = start[0] + (y - b - start[1]) / slope, x + a
    under = [(start[0], y), (start[0], y - b), (bend, y - b), (last, start[1] + slope * (last - start[0])), (last, y)]
    d.rect(x - a, y - b, 2 * a, 2 * b, "none", LINE, 'stroke-width="2"')
    d.polygon(corners, "none", LINE, 'stroke-width="2"')
    d.polygon(under, "#ffd8b5", DARK_ORANGE, 'stroke-dasharray="3 3"')
    d.add(
        f'<path d="M{start[0]:.1f} {start[1]:.1f}L{end[0]:.1f} {end[1]:.1f}" stroke="{DARK_ORANGE}" stroke-width="3"/>'
    )
    d.arrow((x - a - 10, y), (x + a + 62, y))
    d.text(x + a + 66, y + 4, "x", MUTED)
    d.text(324, 326, "The area between the edge and the axis,\n|y| clamped to b, x to −a … a.", MUTED)

    d.head(630, 34, "3. The sum is the intersection")
    d.text(
        630,
        72,
        "intersection =\n− Σ over 4 edges of\n∫ clamp(y, −b, b) dx, |x| ≤ a",
        DARK_BLUE,
    )
    d.text(
        630,
        146,
        "No two edges are compared,\nso rounding cannot take edges\nthat coincide for crossing or\n"
        "not, and no vertices are\nsorted. Each term is\ncontinuous in every coordinate.",
    )
    d.text(630, 268, "Pairs whose bounding circles\nare apart are left out first.", MUTED)
    return d


def batched_nms() -> Drawing:
    """Bits of which box suppresses which, then the scan over tiles."""
    d = Drawing(860, 440, "Batched NMS by a bit mask")
    cell, n, tile = 13, 24, 8
    x, y = 96, 92
    classes = ((0, 11), (11, 19), (19, 24))
    above = {(0, 2), (0, 5), (1, 3), (2, 4), (3, 9), (6, 10), (7, 8)}
    above |= {(11, 13), (12, 14), (13, 15), (16, 18), (19, 21), (20, 23)}
    d.head(24, 34, "1. All pairs of a class at once, into bits")
    d.rect(x, y, n * cell, n * cell, "#f6f8fa")
    for low, high in classes:
        for r in range(low, high):
            for c in range(r + 1, high):
                d.rect(x + c * cell, y + r * cell, cell, cell, BLUE if (r, c) in above else PALE_BLUE, "#ffffff")
    for i in range(0, n + 1, tile):
        d.add(f'<path d="M{x + i * cell:g} {y - 6}V{y + n * cell + 6}" stroke="{MUTED}" stroke-dasharray="4 3"/>')
    for i in range(n // tile):
        d.text(x + (i + 0.5) * tile * cell, y - 12, f"tile {i}", MUTED, "middle")
    d.text(x + n * cell / 2, y - 32, "box j, by class and score (a tile has 64)", MUTED, "middle")
    d.text(x - 10, y + 60, "box i,\nin the\nsame\norder", MUTED, "end")
    d.rect(x + tile * cell - 1, y + 3 * cell - 1, tile * cell + 2, cell + 2, "none", DARK_ORANGE, 'stroke-width="2"')
    d.arrow((x + n * cell + 26, y + 3.5 * cell), (x + 2 * tile * cell + 4, y + 3.5 * cell))
    d.text(x + n * cell + 30, y + 3.5 * cell + 4, "a word", DARK_ORANGE)
    d.text(
        24, y + n * cell + 26, "Pale: a pair of one class, the better box first. Blue: IoU above the threshold.", MUTED
    )

    left = 510
    d.head(left, 34, "2. A scan, tile by tile, each class by itself")
    d.text(left, 62, "keep (green) = alive and suppressed by none of\nkeep, again and again until nothing changes")
    rounds = (
        ("start", "11111111", ""),
        ("round 1", "11000011", ""),
        ("round 2", "11001011", "box 4: 2 is out itself"),
    )
    for i, (name, keep, words) in enumerate(rounds):
        d.text(left, 108 + 27 * i, name)
        for j, bit in enumerate(keep):
            d.rect(left + 62 + 16 * j, 95 + 27 * i, 16, 17, GREEN if bit == "1" else ORANGE)
        d.text(left + 200, 108 + 27 * i, words, MUTED, more='font-size="11"')
    d.text(left, 202, "In later tiles, what kept boxes suppress is gone\nfrom the start: the OR of their words.")
    d.text(left, 248, "tile 1")
    for j, colour in enumerate((ORANGE, GREEN, ORANGE, *["#f6f8fa"] * 5)):
        d.rect(left + 62 + 16 * j, 235, 16, 17, colour)
    d.text(left + 200, 248, "grey: another class", MUTED, more='font-size="11"')
    d.text(left, 290, "Classes and images are scanned side by side.")
    d.text(left, 320, "A pair too close to the threshold for float32 is\ndecided in float64.")
    d.text(left, 367, "The host waits for nothing: indices are padded\nwith −1, and counts tell how many there are.")
    return d


def dynamic_mask() -> Drawing:
    """An instance's three small layers on shared features, and the Dice loss from the logits."""
    d = Drawing(860, 420, "Dynamic masks: weights of each instance's own")
    d.head(24, 34, "1. Logits: three 1 × 1 convolutions whose weights are the instance's own 169 numbers")
    for i in range(8):
        d.rect(32 + 5 * i, 92 - 5 * i + 10, 110, 84, PALE_BLUE, LINE)
    d.polygon([(67, 90), (177, 90), (177, 108), (67, 108)], ORANGE, DARK_ORANGE)
    d.text(24, 206, "8 features, H × W: shared by\nall instances of the image", MUTED)
    d.text(188, 104, "a strip", DARK_ORANGE)
    d.box(252, 76, 112, 46, "x, y relative\nto the prior", PALE_ORANGE)
    d.text(308, 140, "computed, not stored", MUTED, "middle", 'font-size="11"')
    d.arrow((184, 132), (236, 150), (382, 150), (396, 132))
    d.arrow((366, 99), (396, 110))
    for i, words in enumerate(("10 → 8\nReLU", "8 → 8\nReLU", "8 → 1")):
        left = 400 + 118 * i
        d.box(left, 90, 84, 52, words, PALE_GREEN)
        d.text(left + 42, 160, ("80 + 8", "64 + 8", "8 + 1")[i], MUTED, "middle")
        d.arrow((left + 86, 116), (left + 116 if i < 2 else left + 108, 116))
    d.text(748, 112, "logit\n[K, H, W]")
    d.text(400, 182, "loaded once a program, kept in registers (forward)", MUTED)

    y = 262
    d.head(24, y, "2. Dice loss: from the logits, without a mask of the doubled size in memory")
    cell = 30
    d.grid(40, y + 22, 3, 3, cell, lambda r, c: BLUE if (r, c) == (1, 1) else PALE_BLUE)
    d.text(24, y + 134, "9 logits around a pixel", MUTED)
    d.arrow((136, y + 67), (196, y + 67))
    d.text(166, y + 58, "bilinear", MUTED, "middle", 'font-size="11"')
    d.grid(204, y + 37, 2, 2, cell, lambda r, c: GREEN)
    d.text(194, y + 134, "its 4 outputs, p", MUTED)
    d.arrow((270, y + 67), (316, y + 67))
    d.box(320, y + 40, 150, 54, "sums of p · t,\np² and t²", PALE_GREEN)
    d.text(320, y + 134, "t: the ground truth's mask", MUTED)
    d.arrow((472, y + 67), (512, y + 67))
    d.box(516, y + 40, 104, 54, "loss of the\ninstance", PALE_ORANGE)
    d.text(
        644,
        y + 34,
        "Backward the logits are com-\nputed again. Partial sums\nare added in order: no\n"
        "atomics, the same bits in\nevery run.",
    )
    return d


def families() -> Drawing:
    """AP on BCCD by epoch, from scratch; the figures are those of docs/figures.md and docs/rtdetr.md."""
    d = Drawing(860, 400, "AP on BCCD by epoch: RT-DETR-r18 and RTMDet-tiny, both from scratch")
    d.head(24, 34, "AP on BCCD's validation images, both from scratch at 256 px")
    left, top, width, height = 64, 60, 610, 290

    def at(epoch: float, ap: float) -> Point:
        return left + epoch / 48 * width, top + height - ap / 0.7 * height

    for tenths in range(8):
        x, y = at(0, tenths / 10)
        d.add(f'<path d="M{x:g} {y:g}h{width}" stroke="{LINE}"/>')
        d.text(x - 8, y + 4, f"{tenths / 10:.1f}", MUTED, "end")
    for epoch in range(0, 49, 12):
        d.text(at(epoch, 0)[0], top + height + 20, str(epoch), MUTED, "middle")
    d.text(left + width / 2, top + height + 38, "epochs of 36 steps", MUTED, "middle")
    rtdetr = (0.040, 0.282, 0.428, 0.538, 0.563, 0.582, 0.587, 0.591, 0.603, 0.605, 0.608, 0.616)
    rtmdet = (0.312, 0.387, 0.466, 0.504)
    for name, figures, colour in (
        ("RT-DETR-r18, 20 M", rtdetr, DARK_ORANGE),
        ("RTMDet-tiny, 4.8 M", rtmdet, DARK_BLUE),
    ):
        every = 48 // len(figures)
        points = [at(every * (i + 1), ap) for i, ap in enumerate(figures)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        d.add(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in points:
            d.add(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        d.text(points[-1][0] + 10, points[-1][1] + 4, f"{name}: {figures[-1]:.3f}", colour)
    return d


DRAWINGS = (dwconv_bn_silu, assign, rotated_iou, batched_nms, dynamic_mask, families)

if __name__ == "__main__":
    for drawing in DRAWINGS:
        drawing().save(Path(__file__).with_name(f"{drawing.__name__}.svg"))
