"""Tables from the records of a run: `python -m fastrnn.bench.report benchmarks/results/<hardware>/<run>.jsonl`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastrnn.bench.environment import read
from fastrnn.bench.measure import geomean
from fastrnn.bench.passes import joined
from fastrnn.bench.shapes import CASES, CELLS, MODES
from fastrnn.bench.targets import NOISE, TARGETS, Verdict, judge, measurements, single
from fastrnn.cli import guarded

Record = dict[str, Any]
NOISY = 1.5  # p80 / p20 of the ratio from which a line is marked
BUSY = 0.7  # load average at the start from which a run is not a measurement
MEMORY_RESOLUTION = 1 << 20  # bytes: below this, a difference of two peaks is allocator and page noise
_NAMED = {case.name for case in CASES}
_LISTED = {case.name for case in CASES if case.listed}

TIMES_HEADER = (
    f"{'cell':5}{'mode':10}{'case':26}{'thr':>3}  {'torch.nn':>10}{'p20..p80':>18}  {'subject':>10}{'p20..p80':>18}"
    f"  {'ratio':>6}{'p20..p80':>14}{'n':>6}  {'GF/s':>6}{'of gemm':>8}{'of bound':>9}  on"
)


def seconds(t: float) -> str:
    """Three digits in the unit that fits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if t >= size:
            return f"{t / size:.3g} {unit}"
    return f"{t * 1e6:.3g} us"


def time_line(r: Record) -> str:
    """One measurement as a line of the table of times. `~`: the ratio varied much; `<`: torch.nn is faster."""
    a, b, ratio = r["baseline"], r["subject"], r["ratio"]
    spans = [f"{seconds(s['p20'])}..{seconds(s['p80'])}".replace(" ", "") for s in (a, b)]
    span = f"{ratio['p20']:.2f}..{ratio['p80']:.2f}"
    line = (
        f"{r['cell']:5}{r['mode']:10}{r['case']:26}{r['threads']:>3}  {seconds(a['p50']):>10}{spans[0]:>18}"
        f"  {seconds(b['p50']):>10}{spans[1]:>18}  {ratio['p50']:>6.2f}{span:>14}{r['rounds']:>6}"
    )
    rate = r["flops"] / b["p50"]
    line += f"  {rate / 1e9:>6.1f}{rate / r['gemm']:>8.0%}" if r["gemm"] else " " * 16
    line += f"{r['bound']['share']['subject']:>9.0%}" if r.get("bound") else " " * 9
    line += f"  {r['chosen']}"
    if len(r.get("passes") or []) > 1:
        line += f"  passes {min(r['passes']):.2f}..{max(r['passes']):.2f}"
    marks = ("~" if ratio["p80"] / ratio["p20"] >= NOISY else "") + ("<" if ratio["p50"] < NOISE else "")
    return f"{line} {marks}".rstrip()


def line(r: Record) -> str:
    """A record as it is told while a run goes on."""
    if r["kind"] == "measurement":
        return "\n".join([time_line(r), *peer_lines(r)])
    if r["kind"] == "latency":
        return latency_line(r)
    if r["kind"] == "memory":
        return f"{r['cell']:5}{'memory':10}{r['case']:26}{r['threads']:>3}  {_memory_sizes(r)}"
    return failure_line(r)


def peer_lines(r: Record) -> list[str]:
    """torch.nn's time over each peer's, or why it did not run this case."""
    found = r.get("peers") or {}
    return [
        f"{'':15}{name:26} " + (f"absent: {p['absent']}" if "absent" in p else f"{p['ratio']['p50']:.2f} of torch.nn")
        for name, p in found.items()
    ]


def latency_line(r: Record) -> str:
    a, b = r["baseline"], r["subject"]
    times = "".join(f"{seconds(side[q]):>10}" for side in (a, b) for q in ("p50", "p99"))
    return f"{r['cell']:5}{'latency':10}{r['case']:26}{r['threads']:>3}  {times}  of {r['steps']} steps"


def latency_table(records: list[Record]) -> str:
    """Single steps whose state goes on, as in streaming."""
    columns = "".join(f"{side + ' ' + q:>10}" for side in ("nn", "ours") for q in ("p50", "p99"))
    rows = [line(r) for r in records if r["kind"] == "latency"]
    return "\n".join([f"{'latency of one step in a stream':44}  {columns}", *rows])


def peer_table(environment: Record) -> str:
    """The peers that are there, and why the others are not."""
    rows = environment.get("peers") or []
    return "\n".join([f"{'peer':19}whether it can run here", *(f"{name:19}{text}" for name, text in rows)])


def header(environment: Record) -> str:
    """The hardware, the versions and the command, in a few lines."""
    e = environment
    clock = f" at {e['clock']['now']:.0f} MHz" if e.get("clock") else ""
    lines = [
        f"{e['cpu']}{clock}, {e['cores']} cores, {' '.join(e['flags'])}; load {e['load']:.2f}; malloc: {e['malloc']}"
        + ("; each measurement in a process of its own" if e.get("apart") else ""),
        f"torch {e['torch']}, {e['subject']} {e['fastrnn'] or ''}, commit {e['commit']}, Python {e['python']}",
        f"{e['date']} $ {e['command']}",
    ]
    if e.get("device") == "cuda":
        lines.append(f"GPU: {e['gpu']}")
    if e["info"]:
        lines.append(f"engine: {e['info'].get('engine')}")
    if e["load"] > BUSY:
        lines.append(f"WARNING: other work was running (load {e['load']:.2f}); these times are not to be published")
    if e["variables"]:
        lines.append(f"variables: {e['variables']}")
    return "\n".join(lines)


def target_table(records: list[Record]) -> str:
    """Each target with what was reached, per thread count."""
    rows = [f"{'target, torch.nn / subject':58}{'thr':>3}{'at least':>10}{'reached':>9}  verdict"]
    for target in TARGETS:
        rows += [_verdict_line(judge(target, records, n)) for n in _threads(records)]
    return "\n".join([*rows, *_memory_verdict(records)])


def _verdict_line(v: Verdict) -> str:
    value = "-" if v.value is None else f"{v.value:.2f}"
    where = f"  (least: {v.where})" if v.where else ""
    return f"{v.target.text:58}{v.threads:>3}{v.target.at_least:>10.2f}{value:>9}  {v.status}{where}"


def _memory_verdict(records: list[Record]) -> list[str]:
    found = [(memory_ratio(r), f"{r['case']} {r['cell']}") for r in records if r["kind"] == "memory"]
    text = "peak memory of training, subject / torch.nn, each"
    if not found:
        return [f"{text:58}{'':3}{'<= 1.00':>10}{'-':>9}  not measured"]
    value, where = max(found)
    status = "met" if value <= 1.0 else "MISSED"
    return [f"{text:58}{'':3}{'<= 1.00':>10}{value:>9.2f}  {status}  (most: {where})"]


def memory_ratio(r: Record) -> float:
    """Subject over torch.nn; 1 when they differ by less than can be told apart."""
    if abs(r["subject"] - r["baseline"]) < MEMORY_RESOLUTION:
        return 1.0
    return float(r["subject"] / max(r["baseline"], 1))


def mean_table(records: list[Record]) -> str:
    """Geometric means of the ratio over the listed shapes, by cell and mode."""
    rows = [f"{'geometric means, listed shapes':32}" + "".join(f"{m:>12}" for m in (*MODES, "both"))]
    groups = dict.fromkeys((r["threads"], r.get("dtype", "float32")) for r in in_order(measurements(records)))
    for n, dtype in groups:
        some = [r for r in measurements(records, n) if r.get("dtype", "float32") == dtype]
        some = [r for r in some if r["case"] in _LISTED or r["case"] not in _NAMED]
        for cells in (*((c,) for c in CELLS), CELLS):
            name = cells[0] if len(cells) == 1 else "all cells"
            name += f", {n} threads" * bool(n) + f", {dtype}" * (dtype != "float32")
            values = [
                [r["ratio"]["p50"] for r in some if r["cell"] in cells and r["mode"] in modes]
                for modes in (*((m,) for m in MODES), MODES)
            ]
            means = "".join(f"{geomean(v):>12.2f}" if v else f"{'-':>12}" for v in values)
            rows.append(f"{name:32}{means}")
    return "\n".join(rows)


def memory_table(records: list[Record]) -> str:
    """Peak memory of training per case: what two iterations add to a process that holds the module."""
    columns = f"{'torch.nn':>12}{'subject':>12}{'ratio':>8}   (subject / torch.nn; = : within 1 MiB)"
    rows = [f"{'peak memory of training':34}{columns}"]
    for r in (r for r in records if r["kind"] == "memory"):
        rows.append(f"{r['cell']:6}{r['case']:28}{_memory_sizes(r)}")
    return "\n".join(rows)


def _memory_sizes(r: Record) -> str:
    same = "=" if abs(r["subject"] - r["baseline"]) < MEMORY_RESOLUTION else ""
    sizes = "".join(f"{r[side] / 2**20:>8.1f} MiB" for side in ("baseline", "subject"))
    return f"{sizes}{memory_ratio(r):>8.2f} {same}".rstrip()


def losing_list(records: list[Record]) -> str:
    """Every measurement in which torch.nn was faster, and everything that failed."""
    losing = [r for r in measurements(records) if r["ratio"]["p50"] < NOISE]
    losing.sort(key=lambda r: float(r["ratio"]["p50"]))
    rows = [f"torch.nn is faster (ratio < {NOISE}) in {len(losing)} of {len(measurements(records))} measurements"]
    rows += [f"  {r['ratio']['p50']:.2f}  {r['cell']} {r['case']} {r['mode']}, {r['threads']} threads" for r in losing]
    failed = [r for r in records if r["kind"] == "failure"]
    rows += [f"not measured, {len(failed)} failed:" for _ in failed[:1]]
    rows += [f"  {failure_line(r)}" for r in failed]
    return "\n".join(rows)


def failure_line(r: Record) -> str:
    return f"FAILED {r['what']} {r['cell']} {r['case']} {r['mode']}, {r['threads']} threads: {r['message']}"


def summarise(records: list[Record]) -> str:
    """What follows the table of times."""
    parts = [mean_table(records), losing_list(records)]
    if any(r["case"] in _NAMED for r in measurements(records)):
        parts.append(target_table(records))
    if any(r["kind"] == "memory" for r in records):
        parts.insert(0, memory_table(records))
    if any(r["kind"] == "latency" for r in records):
        parts.insert(0, latency_table(records))
    notes = [r["message"] for r in records if r["kind"] == "note"]
    if notes:
        parts.append("\n".join(notes))
    return "\n\n".join(parts)


def full(records: list[Record]) -> str:
    """The whole report."""
    environments = [header(r) for r in records if r["kind"] == "environment"]
    environments += [peer_table(r) for r in records if r["kind"] == "environment" and r.get("peers")][-1:]
    times = [TIMES_HEADER, *(line(r) for r in in_order(measurements(records)))]
    return "\n\n".join([*environments, "\n".join(times), summarise(records)]) + "\n"


def in_order(records: list[Record]) -> list[Record]:
    """As tables list them, whatever the order in which they were measured."""
    names = [case.name for case in CASES]

    def place(r: Record) -> tuple[Any, ...]:
        known = names.index(r["case"]) if r["case"] in names else len(names)
        return r["threads"], r.get("dtype", ""), known, r.get("H", 0), r.get("B", 0), r["case"], CELLS.index(r["cell"])

    return sorted(records, key=place)


def _threads(records: list[Record]) -> list[int]:
    return sorted({r["threads"] for r in measurements(records)})


def markdown(records: list[Record]) -> str:
    """The ratios as a Markdown table, one line per case: inference / training per cell, a column per thread count."""
    shown = single(measurements(records))
    times = {(r["case"], r["cell"], r["mode"], r["threads"]): r["ratio"]["p50"] for r in shown}
    columns = [(cell, n) for cell in CELLS for n in _threads(shown)]
    lines = ["| case | " + " | ".join(f"{cell}, {n} thread{'s' * (n > 1)}" for cell, n in columns) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for case in CASES:
        if not any(key[0] == case.name for key in times):
            continue
        fields = []
        for cell, n in columns:
            pair = [times.get((case.name, cell, mode, n)) for mode in MODES]
            fields.append(" / ".join("-" if v is None else f"{v:.2f}" for v in pair))
        lines.append(f"| {case.name} | " + " | ".join(fields) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="JSON lines; several runs are read as one")
    parser.add_argument("--markdown", action="store_true", help="the ratios alone, as a Markdown table")
    args = parser.parse_args()

    def show() -> int:
        records = joined(read(path) for path in args.runs)
        print(markdown(records) if args.markdown else full(records), end="")
        return 0

    return guarded("python -m fastrnn.bench.report", show)


if __name__ == "__main__":
    sys.exit(main())
