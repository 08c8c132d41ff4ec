"""Draws the pictures of docs/design.md: `python docs/img/draw.py`. A test compares the files with what this draws."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.sax.saxutils import escape

INK, GREY = "#1f2937", "#6b7280"
BLUE, GREEN, AMBER, ROSE, PAPER = "#dbeafe", "#dcfce7", "#fef3c7", "#ffe4e6", "#ffffff"


class Picture:
    """Boxes, arrows and words on white, in pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        ]

    def box(self, x: float, y: float, w: float, h: float, text: str = "", fill: str = BLUE, size: int = 13) -> None:
        """A box; `text` may have several lines, centred."""
        self.parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="5" fill="{fill}" stroke="{INK}"/>')
        lines = text.split("\n") if text else []
        for k, line in enumerate(lines):
            self.word(x + w / 2, y + h / 2 + (k - len(lines) / 2 + 0.78) * size * 1.3, line, size, "middle")

    def word(self, x: float, y: float, text: str, size: int = 13, anchor: str = "start", colour: str = INK) -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, both: bool = False) -> None:
        """A line with a head at its end, or at both. The heads are drawn, as not every viewer knows markers."""
        self.parts.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{INK}" stroke-width="1.4"/>')
        self._head(x1, y1, x2, y2)
        if both:
            self._head(x2, y2, x1, y1)

    def _head(self, x1: float, y1: float, x2: float, y2: float) -> None:
        length = math.hypot(x2 - x1, y2 - y1)
        ux, uy = 7 * (x2 - x1) / length, 7 * (y2 - y1) / length
        left, right = (x2 - ux - uy / 2, y2 - uy + ux / 2), (x2 - ux + uy / 2, y2 - uy - ux / 2)
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in ((x2, y2), left, right))
        self.parts.append(f'<polygon points="{points}" fill="{INK}"/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, dash: str = "4 3") -> None:
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{GREY}" stroke-dasharray="{dash}"/>'
        )

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def parts() -> str:
    p = Picture(600, 380)
    p.box(20, 20, 560, 40, "modules: RNN, LSTM, GRU, their cells; functional; replace")
    p.box(20, 80, 560, 40, "layers: directions, dropout, lengths, resets, packed batches")
    p.box(20, 140, 560, 40, "one op: eager autograd, compile and export, vmap and grad")
    p.box(20, 200, 560, 40, "choice of a backend, with its reason", GREEN)
    names = "cpu\nC++ engine", "cuda\nclusters", "triton\n3 schedules", "reference\nthe truth", "native\ntorch.nn"
    for k, name in enumerate(names):
        p.box(20 + 115 * k, 264, 100, 46, name, AMBER)
        p.arrow(70 + 115 * k, 240, 70 + 115 * k, 262)
    for y in (60, 120, 180):
        p.arrow(300, y, 300, y + 18)
    for k, language in enumerate(("C++", "Python")):
        p.box(20 + 230 * k, 332, 215, 34, f"cells in {language}: step, step_backward", ROSE, 12)
        for x in (70, 185):
            p.arrow(x + 230 * k, 332, x + 230 * k, 312)
    return p.svg()


def cpu() -> str:
    p = Picture(760, 330)
    p.word(20, 24, "one step, one tile: a few rows x 16 hidden units, all gates of them", 14)
    p.box(20, 50, 110, 90, "h of the step\nbefore\n(rows x H)", GREEN)
    p.box(170, 50, 180, 150, "", AMBER)
    p.word(260, 70, "W_hh, packed in the", 13, "middle")
    p.word(260, 87, "order of reading", 13, "middle")
    for k, gate in enumerate("ifgo"):
        p.box(185 + 40 * k, 100, 32, 84, f"{gate}\n16", PAPER)
    p.box(20, 170, 110, 70, "x W_ih^T + b\na chunk of steps,\nin the cache", BLUE, 12)
    p.box(400, 50, 150, 190, "", GREEN)
    p.word(475, 72, "registers", 14, "middle")
    for k, gate in enumerate("ifgo"):
        p.box(412, 86 + 26 * k, 126, 22, f"sum of {gate}", PAPER, 12)
    p.box(412, 196, 126, 34, "cell: step", ROSE)
    p.arrow(130, 95, 168, 95)
    p.arrow(350, 120, 398, 120)
    p.arrow(130, 215, 398, 215)
    p.box(610, 70, 120, 36, "h, y", BLUE)
    p.box(610, 126, 120, 36, "c", BLUE)
    p.box(610, 182, 120, 36, "tape", BLUE)
    for y in (88, 144, 200):
        p.arrow(550, y, 608, y)
    p.word(670, 244, "one store each", 12, "middle", GREY)
    p.line(20, 262, 740, 262)
    p.word(20, 286, "threads: by direction, then by batch rows; only with few rows by units, with a barrier a step", 13)
    p.word(
        20,
        308,
        "backward: the same tiles from the last step to the first; dW_hh, dW_ih summed a chunk of steps at a time",
        13,
    )
    return p.svg()


def schedules() -> str:
    p = Picture(760, 360)
    p.word(20, 24, "resident", 15)
    p.word(20, 42, "one launch, nobody waits", 12, colour=GREY)
    for k in range(3):
        p.box(20 + 118 * k, 56, 106, 120, "", BLUE)
        p.word(73 + 118 * k, 74, f"program {k}", 12, "middle")
        p.box(30 + 118 * k, 82, 86, 44, "all of W_hh", AMBER, 12)
        p.box(30 + 118 * k, 134, 86, 32, f"16 rows, {k}", GREEN, 12)
    p.word(20, 200, "each program: its rows, all steps, h stays inside", 12, colour=GREY)
    p.word(410, 24, "persistent", 15)
    p.word(410, 42, "one launch, a barrier a step", 12, colour=GREY)
    for k in range(3):
        p.box(410 + 114 * k, 56, 102, 76, "", BLUE)
        p.word(461 + 114 * k, 74, f"program {k}", 12, "middle")
        p.box(418 + 114 * k, 82, 86, 42, f"W_hh of\nunits {k}", AMBER, 12)
        p.arrow(446 + 114 * k, 132, 446 + 114 * k, 156)
        p.arrow(476 + 114 * k, 156, 476 + 114 * k, 132)
    p.box(410, 158, 330, 30, "h of the step, in global memory (L2)", GREEN, 12)
    p.line(410, 200, 740, 200)
    p.word(575, 216, "all of the group meet here, every step", 12, "middle", GREY)
    p.word(20, 250, "stepwise", 15)
    p.word(20, 268, "one launch a step, any H", 12, colour=GREY)
    for k in range(4):
        p.box(200 + 130 * k, 240, 100, 44, f"step {k}", BLUE)
        p.arrow(250 + 130 * k, 318, 250 + 130 * k, 286)
        if k:
            p.arrow(170 + 130 * k, 262, 198 + 130 * k, 262)
    p.box(200, 320, 490, 28, "W_hh, read from the caches by every launch", AMBER, 12)
    return p.svg()


def cluster() -> str:
    p = Picture(760, 320)
    p.word(20, 24, "a cluster of 4 blocks, one tile of 8 or 16 batch rows, all time steps", 14)
    for k in range(4):
        x = 20 + 184 * k
        p.box(x, 42, 168, 150, "", BLUE)
        p.word(x + 84, 60, f"block {k}", 13, "middle")
        p.box(x + 10, 68, 148, 34, f"registers: W_hh of units {k}", AMBER, 11)
        p.box(x + 10, 108, 148, 34, f"registers: c of units {k}", GREEN, 11)
        p.box(x + 10, 148, 148, 36, "shared memory: all of h,\ntwo buffers by turns", ROSE, 11)
        p.arrow(x + 84, 222, x + 84, 194, both=True)
    p.box(
        20,
        224,
        720,
        30,
        "st.async: each block sends its units of the new h to all, bytes are counted by the receiver",
        PAPER,
        12,
    )
    p.word(20, 280, "no barrier of the grid: clusters are independent of one another", 12, colour=GREY)
    p.word(
        20,
        300,
        "backward: each block sends every peer its share of dh, and shares are added in a fixed order",
        12,
        colour=GREY,
    )
    return p.svg()


def badges() -> str:
    """What pyproject.toml says, for the head of the README."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    facts = (
        ("version", r'^version = "(.+)"'),
        ("Python", r'^requires-python = "(.+)"'),
        ("torch", r'^dependencies = \["torch([^"]+)"'),
        ("license", r'^license = "(.+)"'),
    )
    p, x = Picture(570, 24), 0
    for name, pattern in facts:
        (value,) = re.findall(pattern, project, re.M)
        left, right = 8 * len(name) + 14, 8 * len(value) + 14
        p.box(x + 1, 1, left, 22, name, PAPER, 12)
        p.box(x + left, 1, right, 22, value, BLUE, 12)
        x += left + right + 12
    return p.svg()


PICTURES = {"badges": badges, "parts": parts, "cpu": cpu, "schedules": schedules, "cluster": cluster}


def main() -> None:
    for name, draw in PICTURES.items():
        (Path(__file__).parent / f"{name}.svg").write_text(draw())


if __name__ == "__main__":
    main()
