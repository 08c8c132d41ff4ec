"""The page that a finished run leaves: report.html, one file, pictures inside, nothing from the network."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .checkpoint import versions
from .plots import draw_curves, read_metrics
from .task import Result, Task

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2rem } pre { white-space: pre-wrap; overflow-wrap: anywhere }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
th { border-bottom: 1px solid } img { max-width: 100%; background: white } .wide { overflow-x: auto }
"""


def write_report(task: Task, result: Result, lines: Sequence[str]) -> Path:
    """Draws the curves into the run's folder and writes its report.html, whose path it returns."""
    folder = result.folder
    draw_curves(read_metrics(folder), task.history, folder / "curves.png")
    pictures = sorted(folder.glob("*.png"), key=lambda p: (p.name != "curves.png", p.name))
    config = {name: getattr(task.config, name) for name in task.config.__dataclass_fields__}
    parts = [
        f"<h1>fastrnn train {task.name}</h1>",
        section("What it said", f"<pre>{html.escape(chr(10).join(lines))}</pre>"),
        *(section(p.stem.replace("-", " "), picture(p)) for p in pictures),
        section("Epochs", history_table(task.history)),
        section("Configuration", table(["option", "value"], config.items())),
        section("Versions", table(["package", "version"], versions().items())),
    ]
    head = f'<meta charset="utf-8"><title>fastrnn train {task.name}: {html.escape(folder.name)}</title>'
    page = folder / "report.html"
    page.write_text(
        f"<!doctype html><html><head>{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>",
        encoding="utf-8",
    )
    return page


def section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{content}"


def picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


def history_table(history: list[dict[str, float]]) -> str:
    names = list(dict.fromkeys(name for row in history for name in row))  # BLEU is not scored in every epoch
    return table(names, ([f"{row[name]:.6g}" if name in row else "" for name in names] for row in history))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def line(tag: str, cells: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f'<div class="wide"><table>{line("th", head)}{"".join(line("td", row) for row in rows)}</table></div>'
