"""The README's picture: `python -m benchmarks.picture RESULTS.jsonl docs/img/speed.svg`.

A heat-map of torch.nn's time over ours, one row for each case, a column for each cell and mode. SVG is written as
text, so that the same records give the same file and a test can compare them.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from fastrnn.bench.environment import read
from fastrnn.bench.shapes import CASES, CELLS, MODES
from fastrnn.bench.targets import measurements

Record = dict[str, Any]
LEFT, TOP, WIDTH, HEIGHT = 210, 96, 92, 24  # of the first field, and of each
SLOWEST, EQUAL, FASTEST = (214, 96, 77), (247, 247, 247), (33, 113, 181)
FULL = 8.0  # ratio from which the colour is no darker


def colour(ratio: float) -> str:
    """From red (half as fast) over white (equal) to blue (8 times as fast), on a logarithmic scale."""
    end, reach = (FASTEST, math.log(FULL)) if ratio >= 1 else (SLOWEST, math.log(2.0))
    share = min(1.0, abs(math.log(ratio)) / reach)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(EQUAL, end, strict=True))


def text(x: float, y: float, words: str, size: int = 12, anchor: str = "start", fill: str = "#1f2937") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{escape(words)}</text>'


def field(x: int, y: int, ratio: float) -> list[str]:
    """One measurement."""
    dark = ratio > FULL / 2
    return [
        f'<rect x="{x}" y="{y}" width="{WIDTH - 2}" height="{HEIGHT - 2}" fill="{colour(ratio)}"/>',
        text(x + WIDTH / 2 - 1, y + 15, f"{ratio:.2f}", 12, "middle", "#ffffff" if dark else "#1f2937"),
    ]


def heat_map(records: list[Record], threads: int) -> str:
    """The picture of one thread count, as SVG."""
    ratios = {(r["case"], r["cell"], r["mode"]): r["ratio"]["p50"] for r in measurements(records, threads)}
    names = [case.name for case in CASES if any(key[0] == case.name for key in ratios)]
    columns = [(cell, mode) for cell in CELLS for mode in MODES]
    environment = next(r for r in records if r["kind"] == "environment")
    width, height = LEFT + len(columns) * WIDTH + 12, TOP + len(names) * HEIGHT + 34
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        text(12, 26, "How many times as fast as torch.nn", 17),
        text(12, 46, f"median time of torch.nn over fastrnn's, fp32, {threads} threads, {environment['cpu']}", 12),
    ]
    for k, (cell, mode) in enumerate(columns):
        x = LEFT + k * WIDTH + WIDTH / 2 - 1
        out += [text(x, TOP - 24, cell, 13, "middle"), text(x, TOP - 8, mode, 12, "middle")]
    for row, name in enumerate(names):
        y = TOP + row * HEIGHT
        out.append(text(LEFT - 8, y + 15, name, 12, "end"))
        for k, (cell, mode) in enumerate(columns):
            ratio = ratios.get((name, cell, mode))
            if ratio is not None:
                out += field(LEFT + k * WIDTH, y, ratio)
    note = f"torch {environment['torch']}, {environment['date'][:10]}; red: torch.nn is faster"
    return "\n".join([*out, text(12, height - 12, note, 12, fill="#6b7280"), "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="JSON lines of a run")
    parser.add_argument("out", type=Path, help="the .svg to write")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.out.write_text(heat_map(read(args.run), args.threads))


if __name__ == "__main__":
    main()
