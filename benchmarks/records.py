"""`python -m benchmarks.records`: all committed records of this machine anew, one after the other. `make records`.

The grid of `fastrnn bench`, training by several processes, training through the harness, and the small benchmarks, kept
under benchmarks/results/<hardware>/; with --readme, the table, the path, the means and the picture of both READMEs are
then those of the new record. It waits for the machine to be quiet before each of them, and gives up where it is not.

    python -m benchmarks.records --budget 20 --small 0.01 --anyway --out /tmp/trial    # does it run through?
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fastrnn
from benchmarks.picture import heat_map
from fastrnn.bench.environment import IN_A_CLONE, describe, read, results, slug, write
from fastrnn.bench.measure import geomean
from fastrnn.bench.report import BUSY, markdown
from fastrnn.bench.shapes import CASES, MODES
from fastrnn.bench.targets import measurements
from fastrnn.cli import guarded
from fastrnn.cli.parser import UsageError

Record = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
SMALL = ("bandwidth", "overhead", "saving", "slow_paths")  # each prints a table; its argument: seconds a line
# Loops over a step made by torch.compile, which takes long to make: a few usual shapes, in a folder of their own.
PEERS = ["--peers", "compiled loop", "--cases", "T100-B1-H256", "T35-B20-H200", "--cells", "LSTM", "GRU", "--modes",
         "inference", "training", "--threads", "1", "--parts", "timing", "--passes", "1", "--no-apart"]  # fmt: skip
PATIENCE = 300.0  # seconds that a load of our own making may take to fall


def steps(args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """Names and commands, in order; those that are in SMALL print what is to be kept, the others keep it themselves."""
    here = [sys.executable, "-m"]
    out = ["--out", args.out] if args.out else []
    threads = list(map(str, args.threads))
    small = [] if args.small is None else [str(args.small)]
    made = [("grid", [*here, "benchmarks", "--threads", *threads, "--budget", f"{args.budget:g}", "--save", *out])]
    if args.processes > 1:
        made.append(("ddp", [*here, "benchmarks", "--ddp", str(args.processes), "--save", *out]))
    made.append(
        ("peers", [*here, "benchmarks", *PEERS, "--budget", f"{args.budget:g}", "--save", "--out", _beside(args)])
    )
    harness = ["--rounds", "1", "--steps", "2"] if args.budget else []
    made.append(("end_to_end", [*here, "benchmarks.end_to_end", "--threads", *threads, "--save", *harness, *out]))
    made += [(name, [*here, f"benchmarks.{name}", *small]) for name in SMALL]
    return made


def _beside(args: argparse.Namespace) -> str:
    """Not among the records that --check takes the newest of."""
    return str(Path(args.out or IN_A_CLONE) / "peers")


def wait_until_quiet(load: Callable[[], float], sleep: Callable[[float], None], patience: float) -> None:
    """UsageError if other work keeps the machine busy."""
    waited = 0.0
    while load() >= BUSY:
        if waited >= patience:
            raise UsageError(f"the machine is busy (load {load():.2f}); stop other work, or --anyway")
        sleep(5.0)
        waited += 5.0


def execute(command: Sequence[str], captured: bool = False) -> str:
    """What it prints, if that is to be kept. UsageError if it fails."""
    try:
        pipe = subprocess.PIPE if captured else None
        return subprocess.run(command, cwd=ROOT, stdout=pipe, text=True, check=True).stdout or ""
    except subprocess.CalledProcessError as failed:
        raise UsageError(f"{' '.join(command[1:])} ended with exit code {failed.returncode}") from None


def keep(name: str, command: Sequence[str], folder: Path) -> None:
    """Run a benchmark that prints a table, and write the command and the table into `folder`."""
    shown = " ".join(["python", *command[1:]])
    table = execute(command, captured=True)
    path = folder / f"{name.replace('_', '-')}-{time.strftime('%Y%m%d', time.gmtime())}.txt"
    write(path, f"$ {shown}\n{table}")
    print(f"{table}saved: {path}", flush=True)


def figures(records: list[Record]) -> list[str]:
    """What the paragraph that names the record says of it: geometric means over the listed shapes, and over all, at one
    thread and at two, and the lowest ratio."""
    listed = {case.name for case in CASES if case.listed}
    shown = [r for r in measurements(records) if r["mode"] in MODES]
    groups = [[r for r in shown if r["threads"] == n] for n in (1, 2)]
    groups += [[r for r in group if r["case"] in listed] for group in groups]
    found = [geomean([r["ratio"]["p50"] for r in group]) for group in groups]
    return [f"{value:.2f}" for value in (*found, min(r["ratio"]["p50"] for r in shown))]


def refreshed(text: str, records: list[Record], name: str, root: Path = ROOT) -> str:
    """A README with the table of `records`, and in the paragraph that names their file their path and figures."""
    (old,) = set(re.findall(r"benchmarks/results/[\w./-]+\.jsonl", text))
    before = read(root / old)
    new = dict(zip(figures(before), figures(records), strict=True))
    parts = text.replace(markdown(before), markdown(records)).split("\n\n")
    for k, part in enumerate(parts):
        if old in part:
            with_path = part.replace(old, "\0")  # whose digits are no figures
            parts[k] = re.sub(r"\d+\.\d\d(?!\d)", lambda m: new.get(m[0], m[0]), with_path).replace("\0", name)
    return "\n\n".join(parts)


def publish(path: Path, root: Path = ROOT) -> None:
    """Both READMEs and their picture, from the records in `path`."""
    records = read(path)
    for name in ("README.md", "README.zh.md"):
        write(root / name, refreshed((root / name).read_text(), records, path.relative_to(ROOT).as_posix()))
    write(root / "docs/img/speed.svg", heat_map(records, 2))


def run(args: argparse.Namespace) -> int:
    if args.readme and (args.out or args.budget or args.threads != [1, 2]):
        raise UsageError("--readme: the READMEs show the whole grid at 1 and 2 threads, kept in this clone")
    folder = results(args.out) / slug(describe(fastrnn))
    before = set(folder.glob("cpu-*.jsonl"))
    for name, command in steps(args):
        if not args.anyway:
            wait_until_quiet(lambda: os.getloadavg()[0], time.sleep, PATIENCE)
        print(f"\n==== {name}: {' '.join(command[1:])}", flush=True)
        if name in SMALL:
            keep(name, command, folder)
        else:
            execute(command)
    if args.readme:
        (new,) = set(folder.glob("cpu-*.jsonl")) - before
        publish(new.resolve())
        print("both READMEs and docs/img/speed.svg are of the new record; pytest tests/test_docs.py names what is left")
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "python -m benchmarks.records", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    made.add_argument("--processes", type=int, default=2, help="of --ddp; 1: leave it out (%(default)s)")
    made.add_argument("--budget", type=float, default=0.0, help="seconds of the grid; 0: all of it (%(default)g)")
    made.add_argument("--small", type=float, help="seconds a line of the small benchmarks (their own)")
    made.add_argument("--anyway", action="store_true", help="on a busy machine, too; to try it out")
    made.add_argument("--readme", action="store_true", help="bring both READMEs and the picture in step")
    made.add_argument("--out", metavar="FOLDER", help="instead of benchmarks/results")
    return made


def main(argv: list[str] | None = None) -> int:
    return guarded("python -m benchmarks.records", lambda: run(parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
