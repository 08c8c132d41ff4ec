"""Pictures of a run: heat-maps of the speed-up over H and B, and bars of the time of a step beside the roofline."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastrnn.bench.report import in_order, seconds
from fastrnn.bench.shapes import CASES
from fastrnn.bench.targets import measurements

Record = dict[str, Any]
MISSING = "pictures are left out: matplotlib is not installed; pip install 'fastrnn[plot]'"
_SIZES = {case.name: case for case in CASES}
_LIMIT = 3  # of the colours: 8 times as fast, or as slow


def draw_all(records: list[Record], folder: Path) -> list[Path]:
    """PNG and SVG of every picture that the records give, in `folder`; the paths of the PNGs.

    Raises:
        ModuleNotFoundError: there is no matplotlib.
    """
    import matplotlib.figure  # noqa: F401  before the folder is made

    folder.mkdir(parents=True, exist_ok=True)
    found = in_order(measurements(records))
    made = []
    for name, group in _grouped(found, ("device", "cell", "dtype", "mode", "threads", "shape")):
        cells = {(sizes_of(r)["H"], sizes_of(r)["B"]) for r in group}
        if len(cells) > 1:
            made += _save(heat_map(group, f"torch.nn / fastrnn: {name}"), folder / f"speedup-{_slug(name)}")
    for name, group in _grouped(found, ("device", "dtype", "mode", "threads")):
        made += _save(bars(group, f"Time of a step: {name}"), folder / f"steps-{_slug(name)}")
    return made


def known(r: Record) -> bool:
    """Whether the sizes of a record can be told."""
    return "H" in r or r["case"] in _SIZES


def sizes_of(r: Record) -> dict[str, Any]:
    """T, B, H and the form of a record; those of older ones are found by the name of the case."""
    if "H" in r:
        return r
    case = _SIZES[r["case"]]
    sizes = {"T": case.T, "B": case.B, "H": case.H, "layers": case.layers, "tokens": case.tokens}
    return {**sizes, "form": case.form, "bidirectional": case.bidirectional}


def _grouped(records: list[Record], fields: tuple[str, ...]) -> Iterable[tuple[str, list[Record]]]:
    groups: dict[str, list[Record]] = {}
    for r in records:
        values = {"device": "cpu", "dtype": "float32", **r}
        n = values["threads"]
        values["threads"] = f"{n} thread{'s' * (n > 1)}" if n else ""
        values["shape"] = _shape(sizes_of(r))
        groups.setdefault(" ".join(filter(None, (str(values[f]) for f in fields))), []).append(r)
    return groups.items()


def _shape(sizes: dict[str, Any]) -> str:
    """What H and B do not tell: "" for one layer in one direction over many steps of a dense batch."""
    form = "" if sizes["form"] == "dense" else sizes["form"]
    if sizes["T"] == 1:
        form = form or "one step"
    layers = f"{sizes['layers']} layers" if sizes["layers"] > 1 else ""
    return " ".join(filter(None, (form, layers, "bidirectional" if sizes["bidirectional"] else "")))


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def heat_map(group: list[Record], title: str) -> Any:
    """Medians of the ratio by H and B, the geometric mean where several shapes share them. Blue: fastrnn is faster."""
    from matplotlib.figure import Figure

    values: dict[tuple[int, int], list[float]] = {}
    for r in group:
        s = sizes_of(r)
        values.setdefault((s["H"], s["B"]), []).append(math.log2(r["ratio"]["p50"]))
    rows, columns = (sorted({key[i] for key in values}) for i in (0, 1))
    means = {key: sum(v) / len(v) for key, v in values.items()}
    grid = [[means.get((h, b), math.nan) for b in columns] for h in rows]
    if any(len(v) > 1 for v in values.values()):
        title += " (means where cases share H and B)"
    width = max(3.6, 1.6 + 0.75 * len(columns))
    figure = Figure(figsize=(width, 1.8 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid, cmap="RdBu", vmin=-_LIMIT, vmax=_LIMIT, aspect="auto")
    for y, h in enumerate(rows):
        for x, b in enumerate(columns):
            if (h, b) in means:
                dark = abs(means[h, b]) > 0.6 * _LIMIT
                text = f"{2 ** means[h, b]:.2f}"
                axes.text(x, y, text, ha="center", va="center", color="white" if dark else "black", fontsize=8)
    axes.set_xticks(range(len(columns)), [str(b) for b in columns])
    axes.set_yticks(range(len(rows)), [str(h) for h in rows])
    axes.set(xlabel="B", ylabel="H")
    axes.set_title("\n".join(textwrap.wrap(title, int(width * 11))), fontsize=9)
    bar = figure.colorbar(image, ax=axes, ticks=range(-_LIMIT, _LIMIT + 1))
    bar.ax.set_yticklabels([f"{2.0**t:g}" for t in range(-_LIMIT, _LIMIT + 1)])
    return figure


def bars(group: list[Record], title: str) -> Any:
    """Time of a step of torch.nn and fastrnn, and the roofline, where there is one, through each pair; logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.34 * len(group)), layout="constrained")
    axes = figure.add_subplot()
    least = math.inf
    for y, r in enumerate(group):
        steps = sizes_of(r)["T"] * (2 if r["mode"] == "training" else 1)
        for shift, side, color in ((-0.2, "baseline", "#b0b0b0"), (0.2, "subject", "#2a6fbb")):
            width = r[side]["p50"] / steps * 1e6
            axes.barh(y + shift, width, 0.38, color=color)
            least = min(least, width)
        if r.get("bound"):
            x = r["bound"]["seconds"] / steps * 1e6
            axes.plot([x, x], [y - 0.42, y + 0.42], color="#c03020", linewidth=2)
            least = min(least, x)
    axes.set_yticks(range(len(group)), [f"{r['cell']} {r['case']}  {seconds(r['subject']['p50'])}" for r in group])
    axes.tick_params(labelsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(left=least / 3)  # else the shortest bar is next to nothing, whatever its time
    axes.set_xlabel("microseconds a step; in training, steps forward and backward are counted", fontsize=8)
    bound = ", red: the roofline" if any(r.get("bound") for r in group) else ""
    axes.set_title(f"{title}\ngrey: torch.nn, blue: fastrnn{bound}", fontsize=9)
    return figure


def _save(figure: Any, stem: Path) -> list[Path]:
    for suffix in (".png", ".svg"):
        figure.savefig(stem.with_name(stem.name + suffix), dpi=110)
    return [stem.with_name(stem.name + ".png")]
