"""Pictures of a run as PNG files: curves, a confusion matrix, attention. Drawn without a display or global state."""

from __future__ import annotations

import csv
import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError

Rows = list[dict[str, float]]


def figure(width: float, height: float) -> Any:
    """A matplotlib figure that no window shows; raises UserError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError("pictures need matplotlib: pip install 'fastrnn[train]', or --report false") from None
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def read_metrics(folder: Path) -> Rows:
    """The rows of all sittings of a run in `folder`; where two sittings overlap, the later one counts."""
    rows: Rows = []
    versions = sorted((folder / "metrics").glob("version_*"), key=lambda p: int(p.name.rpartition("_")[2]))
    for version in versions:
        file = version / "metrics.csv"
        if not file.exists():
            continue  # a sitting that ended before its first row
        with open(file, newline="") as lines:
            new = [{k: float(v) for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(lines)]
        if new:
            first = min(row["step"] for row in new)
            rows = [row for row in rows if row["step"] < first] + new
    return rows


def draw_curves(rows: Rows, history: Rows, path: Path) -> None:
    """Loss, perplexity or a score, learning rate, norm of gradients and tokens/s over the steps of a run.

    `rows` are those of the metrics file, `history` has one row per epoch with "step" as steps taken.
    """
    scored = {name for row in history for name in row}
    extra = [name for name in ("valid_ppl", "valid_accuracy", "valid_bleu", "valid_r2") if name in scored]
    panels = ["loss", *extra, "lr", "grad_norm", "tokens_per_s"]
    image = figure(3.6 * len(panels), 3.0)
    for axes, name in zip(image.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if name == "loss":
            curve(axes, rows, "train_loss", "training")
            curve(axes, history, "valid_loss", "validation", "o-")
            axes.legend()
        else:
            curve(axes, history if name in extra else rows, name, name, "o-" if name in extra else "-")
        axes.set(title=name.replace("_", " "), xlabel="step")
        axes.grid(alpha=0.3)
    save(image, path)


def curve(axes: Any, rows: Rows, name: str, label: str, style: str = "-") -> None:
    points = [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]
    if points:
        axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=3)


def draw_matrix(
    values: Any, rows: Sequence[str], columns: Sequence[str], labels: tuple[str, str], path: Path, numbers: bool
) -> None:
    """A heat map of `values` (rows, columns), named along both axes; with `numbers`, the values in the cells."""
    height, width = 1.6 + 0.32 * len(rows), 2.2 + 0.32 * len(columns)
    image = figure(min(max(width, 3.5), 24), min(max(height, 3), 24))
    axes = image.subplots()
    axes.imshow(values, cmap="Blues", vmin=0, aspect="auto")
    axes.set_xticks(range(len(columns)), [visible(c) for c in columns], rotation=90)
    axes.set_yticks(range(len(rows)), [visible(r) for r in rows])
    axes.set(ylabel=labels[0], xlabel=labels[1])
    if numbers and len(rows) <= 20:
        middle = float(values.max()) / 2
        for i in range(len(rows)):
            for j in range(len(columns)):
                color = "white" if values[i][j] > middle else "black"
                axes.text(j, i, f"{values[i][j]:g}", ha="center", va="center", color=color, fontsize=8)
    use_font(image, [*rows, *columns])
    save(image, path)


def visible(token: str) -> str:
    """A token as a label: mathematics and blanks taken literally, long ones cut."""
    token = token.replace("$", r"\$").replace("\n", "⏎").replace("\t", "⇥")
    token = token if len(token) <= 24 else token[:23] + "…"
    return token if token.strip() else "␣"


def use_font(image: Any, texts: Sequence[str]) -> None:
    """A font for all text of `image` that has the characters of Chinese, Japanese and Korean, where they occur."""
    if all(ord(c) < 0x2E80 for text in texts for c in text):
        return
    from matplotlib import font_manager

    wanted = (
        "Noto Sans CJK",
        "Source Han",
        "WenQuanYi",
        "SimHei",
        "Microsoft YaHei",
        "PingFang",
        "Droid Sans Fallback",
    )
    for font in font_manager.fontManager.ttflist:
        if font.name.startswith(wanted):
            for text in image.findobj(lambda artist: hasattr(artist, "set_fontfamily")):
                text.set_fontfamily([font.name, "DejaVu Sans"])
            return


def save(image: Any, path: Path) -> None:
    """Writes `image` to `path` whole or not at all."""
    import warnings

    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".png", delete=False) as file, warnings.catch_warnings():
        # Without a font of that script a box stands for the character; the picture says so itself.
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        warnings.filterwarnings("ignore", "Matplotlib currently does not support")
        image.savefig(file, format="png", dpi=110)
    Path(file.name).chmod(0o644)
    shutil.move(file.name, path)
