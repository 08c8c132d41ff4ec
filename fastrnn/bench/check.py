"""A quick run against records that were kept: has something become slower, as a ratio over torch.nn?

What is slower at first is measured again, up to TRIES times, and named only if it was slower each time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from fastrnn.bench import report
from fastrnn.bench.compare import Change, by_key, compare, describe
from fastrnn.bench.environment import describe as environment_of
from fastrnn.bench.environment import gpu, read, results, slug
from fastrnn.bench.grids import Job
from fastrnn.bench.measuring import Options
from fastrnn.bench.run import KINDS, identity, measure, plan
from fastrnn.cli.parser import UsageError

TRIES = 3
TOLERANCE = 0.15  # wider than a comparison's of two quiet runs: a quick run has few rounds, and machines differ
Record = dict[str, Any]


def newest(folder: Path, hardware: str, device: str) -> Path:
    """The records of this hardware that were kept last; of any, where there are none of this.

    Raises:
        UsageError: none were kept.
    """
    pattern = "gpu-*.jsonl" if device == "cuda" else "cpu-*.jsonl"
    found = sorted((folder / hardware).glob(pattern)) or sorted(folder.glob(f"*/{pattern}"), key=lambda p: p.name)
    if not found:
        raise UsageError(f"--check: no records in {folder}; make some with fastrnn bench --save, or name a file")
    return found[-1]


def command(args: argparse.Namespace, words: list[str], echo: Callable[[str], None]) -> int:
    """Exit code 1 if a case is slower than in the records, or wrong."""
    library = import_module("fastrnn")
    environment = {**environment_of(library, words), "malloc": args.malloc, "device": args.device}
    path = Path(args.check) if args.check else newest(results(args.out), slug(environment), args.device)
    known = by_key(read(path))
    planned = [j for j in plan(args) if j.what == "timing" and identity(KINDS[j.what], j.key()) in known]
    if not planned:
        raise UsageError(f"--check: nothing of {path} is in what was asked to be measured (threads, types, cases)")
    echo(report.header(environment) + f"\nagainst {path}\n\n{report.TIMES_HEADER}")
    options = Options(library, args.backend, args.sample, args.rounds, (), False, None, gpu())
    start = time.monotonic()
    found: list[tuple[Job, Record]] = []
    for job in planned:
        if args.budget and time.monotonic() - start > args.budget:
            break
        found.append((job, measure(job, options, echo)))
    failed = [r for _, r in found if r["kind"] == "failure"]
    slower = confirmed(found, list(known.values()), options, echo)
    echo(f"\n{len(found)} of {len(planned)} cases measured: {len(failed)} failed, {len(slower)} slower than in {path}")
    for c in slower:
        echo(f"REGRESSION  {c.before:.2f} -> {c.after:.2f}  {describe(c.key)}")
    return 1 if failed or slower else 0


def confirmed(
    found: list[tuple[Job, Record]], known: list[Record], options: Options, echo: Callable[[str], None]
) -> list[Change]:
    """The regressions that stay when they are measured again."""
    jobs = {identity(KINDS[job.what], job.key()): job for job, _ in found}
    slower = compare(known, [r for _, r in found], TOLERANCE).regressions
    for _ in range(TRIES - 1):
        if not slower:
            break
        echo(f"again, since slower: {len(slower)}")
        again = [measure(jobs[c.key], options, echo) for c in slower]
        slower = compare(known, again, TOLERANCE).regressions
    return slower
