"""The page of a run: one HTML file, pictures inside, nothing from the network."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fastrnn.bench import pictures, report
from fastrnn.bench.environment import read, write
from fastrnn.bench.passes import joined
from fastrnn.bench.targets import NOISE, measurements
from fastrnn.cli.parser import UsageError

Record = dict[str, Any]
SHOWN = ("measurement", "latency", "memory", "failure")
STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2rem } pre { overflow-x: auto; font-size: 12px } .wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .1rem .8rem .1rem 0; text-align: left } th { border-bottom: 1px solid }
tr.slower { color: #c03020 } img { max-width: 100%; background: white; margin: .3rem }
"""
HEAD = (
    "case", "cell", "mode", "type", "threads", "torch.nn", "fastrnn", "ratio", "p20 to p80", "passes", "tokens/s",
    "share of bound", "bound by", "runs on", "peers", "kernels", "joules",
)  # fmt: skip


def write_all(records: list[Record], path: Path, echo: Callable[[str], None]) -> list[Path]:
    """The page beside the records in `path`, and a folder of pictures where matplotlib is; the paths of both."""
    folder = path.with_suffix("")
    drawn: list[Path] = []
    try:
        drawn = pictures.draw_all(records, folder)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("matplotlib"):
            raise
        echo(pictures.MISSING)
    page = path.with_suffix(".html")
    write(page, text(records, drawn, path.stem))
    return [page, *([folder] if drawn else [])]


def text(records: list[Record], drawn: Sequence[Path], name: str) -> str:
    """The page's source."""
    environments = [r for r in records if r["kind"] == "environment"]
    slower = sum(r["ratio"]["p50"] < NOISE for r in measurements(records))
    parts = [
        f"<h1>fastrnn bench: {html.escape(name)}</h1>",
        *(f"<pre>{html.escape(report.header(e))}</pre>" for e in environments),
        f"<p>{len(measurements(records))} measurements; torch.nn is faster in {slower} of them, marked red.</p>",
        section("Summary", f"<pre>{html.escape(report.summarise(records))}</pre>"),
        section("Peers", table(("peer", ""), environments[-1].get("peers") or ()) if environments else ""),
        section("Pictures", "".join(picture(p) for p in drawn)) if drawn else "",
        section("Measurements", table(HEAD, map(row, report.in_order(measurements(records))), is_slower)),
    ]
    head = f'<meta charset="utf-8"><title>fastrnn bench: {html.escape(name)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def row(r: Record) -> list[str]:
    """One measurement, as HEAD names the columns."""
    bound, ratio = r.get("bound"), r["ratio"]
    tokens = pictures.sizes_of(r).get("tokens")
    others = {
        n: p["absent"] if "absent" in p else f"{p['ratio']['p50']:.2f}" for n, p in (r.get("peers") or {}).items()
    }
    return [
        r["case"],
        r["cell"],
        r["mode"],
        r.get("dtype", "float32"),
        str(r["threads"] or ""),
        report.seconds(r["baseline"]["p50"]),
        report.seconds(r["subject"]["p50"]),
        f"{ratio['p50']:.2f}",
        f"{ratio['p20']:.2f} to {ratio['p80']:.2f}",
        " ".join(f"{p:.2f}" for p in r.get("passes") or []),
        f"{tokens / r['subject']['p50']:.3g}" if tokens else "",
        f"{bound['share']['subject']:.0%} (torch.nn {bound['share']['baseline']:.0%})" if bound else "",
        bound["limit"] if bound else "",
        r["chosen"],
        "; ".join(f"{name} {value}" for name, value in others.items()),
        "; ".join(f"{side}: {', '.join(names)}" for side, names in (r.get("kernels") or {}).items()),
        ", ".join(f"{side} {value:.3g}" for side, value in (r.get("joules") or {}).items()),
    ]


def is_slower(cells: Sequence[Any]) -> str:
    return "slower" if float(cells[HEAD.index("ratio")]) < NOISE else ""


def section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{content}"


def picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'


def table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], kind: Callable[[Sequence[Any]], str] | None = None
) -> str:
    def line(tag: str, cells: Sequence[Any], name: str = "") -> str:
        opening = f'<tr class="{name}">' if name else "<tr>"
        return opening + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line("td", cells, kind(cells) if kind else "") for cells in rows)
    return f'<div class="wide"><table>{line("th", head)}{body}</table></div>'


def command(files: Sequence[str], echo: Callable[[str], None]) -> int:
    """Tables, pictures and page of records that are on disk; of several files as of one, beside the last.

    Raises:
        UsageError: a file is none of records, or holds nothing that tables show.
    """
    paths = [Path(f) for f in files]
    runs = []
    for path in paths:
        found = read(path)
        if not any(r["kind"] in SHOWN for r in found):
            raise UsageError(f"--report {path}: holds nothing measured")
        for r in measurements(found):
            if not pictures.known(r):
                raise UsageError(f"--report {path}: {r['case']} is no case of this version, and its sizes are not told")
        runs.append(found)
    records = joined(runs)
    write(paths[-1].with_suffix(".txt"), report.full(records))
    echo("saved: " + ", ".join(str(p) for p in (paths[-1].with_suffix(".txt"), *write_all(records, paths[-1], echo))))
    return 0
