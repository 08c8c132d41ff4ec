"""A quick run against records that were kept: has something become slower, as a ratio over torch.nn?

By the rule of `fastrnn.bench.compare`, with the noise that the passes of the records tell. What is slower at first is
measured again, up to TRIES times, and named if it still is with all of these as passes, or could not be measured again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from fastrnn.bench import report
from fastrnn.bench.compare import LEAST, NO_NOISE, Change, by_key, compare, describe
from fastrnn.bench.environment import describe as environment_of
from fastrnn.bench.environment import gpu, keep_freed_memory, read, results, slug
from fastrnn.bench.grids import Job
from fastrnn.bench.measuring import Options
from fastrnn.bench.passes import KINDS, condensed, group_of, identity, noise
from fastrnn.bench.records import setups
from fastrnn.bench.run import measure, plan
from fastrnn.cli.parser import UsageError

TRIES = 3
ELSEWHERE = 0.3  # granted beside records of other hardware, where torch.nn's ratios are others; chosen, not measured
Record = dict[str, Any]


def newest(folder: Path, environment: Record) -> Path:
    """The records that were kept last of those that `environment` can be held against: of its hardware, else of any.

    Raises:
        UsageError: there are none; the message says what keeps the newest ones from it.
    """
    pattern = "gpu-*.jsonl" if environment["device"] == "cuda" else "cpu-*.jsonl"
    own, every = (folder / slug(environment)).glob(pattern), folder.glob(f"*/{pattern}")
    reasons: dict[Path, str] = {}
    for path in (*sorted(own, reverse=True), *sorted(every, key=lambda p: p.name, reverse=True)):
        if path not in reasons:
            why = unfit(path, environment)
            if why is None:
                return path
            reasons[path] = why
    told = "".join(f"; {path.name} is {why}" for path, why in list(reasons.items())[:3])
    raise UsageError(f"--check: no records to hold against in {folder}; make some with --save, or name a file{told}")


def unfit(path: Path, environment: Record) -> str | None:
    """Why the records in `path` are no measure for a run in `environment`; None if they are."""
    try:
        records = read(path)
    except UsageError:
        return "not a file of records"
    made = setups(records)
    if not made:
        return "without an environment"
    load = max(r["load"] for r in records if r["kind"] == "environment")
    if load >= report.BUSY:
        return f"of a busy machine (load {load:.2f})"
    if not noise(records):
        return "of a single pass"
    differing = (n for n in ("subject", "backend", "malloc") if any(m[n] != environment[n] for m in made))
    name = next(differing, None)
    return name and f"made with {name} {made[-1][name]}, not {environment[name]}"


def command(args: argparse.Namespace, words: list[str], echo: Callable[[str], None]) -> int:
    """Exit code 1 if a case is slower than in the records, or wrong."""
    library = import_module("fastrnn")
    kept = args.malloc == "keep" and keep_freed_memory()
    environment = {
        **environment_of(library, words),
        "malloc": "keep" if kept else "system",
        "device": args.device,
        "backend": args.backend,
    }
    path = Path(args.check) if args.check else newest(results(args.out), environment)
    records = read(path)
    levels = noise(records)
    if not levels:
        raise UsageError(f"--check {path}: its records do not {NO_NOISE}")
    known = {key: r for key, r in by_key(records).items() if group_of(r) in levels}
    made_on = {slug(r) for r in records if r["kind"] == "environment"}
    least = LEAST if made_on == {slug(environment)} else ELSEWHERE
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
    slower = confirmed(found, list(known.values()), least, options, echo)
    echo(f"\n{len(found)} of {len(planned)} cases measured: {len(failed)} failed, {len(slower)} slower than in {path}")
    for c in slower:
        echo(f"REGRESSION  {c.before:.2f} -> {c.after:.2f}  {describe(c.key)}")
    return 1 if failed or slower or not found else 0


def confirmed(
    found: list[tuple[Job, Record]],
    known: list[Record],
    least: float,
    options: Options,
    echo: Callable[[str], None],
) -> list[Change]:
    """The regressions that stay when they are measured again, and those of which that fails."""
    jobs = {identity(KINDS[job.what], job.key()): job for job, _ in found}
    passes = [{**r, "pass": 0} for _, r in found if r["kind"] == "measurement"]
    slower = compare(known, condensed(passes), least).regressions
    failed: list[Change] = []
    for number in range(1, TRIES):
        if not slower:
            break
        echo(f"again, since slower: {len(slower)}")
        again = [measure(jobs[c.key], options, echo) for c in slower]
        failed += [c for c, r in zip(slower, again, strict=True) if r["kind"] == "failure"]
        suspects = {c.key for c in slower} - {c.key for c in failed}
        passes += [{**r, "pass": number} for r in again if r["kind"] == "measurement"]
        passes = [r for r in passes if identity(r["kind"], r) in suspects]
        slower = compare(known, condensed(passes), least).regressions
    return failed + slower
