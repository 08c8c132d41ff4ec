"""A quick run against records that were kept: has something become slower, as a ratio over torch.nn?

By the rule of `fastrnn.bench.compare`, with the noise that the records tell. What might be slower, by SUSPECT standard
errors, is measured again, up to TRIES times and after a pause; with all of these as its passes it is named or not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from fastrnn.bench import report
from fastrnn.bench.compare import (
    LEAST,
    NO_NOISE,
    SURE,
    Comparison,
    by_key,
    compare,
    differing,
    made_on,
    text,
)
from fastrnn.bench.environment import describe as environment_of
from fastrnn.bench.environment import gpu, keep_freed_memory, read, results, slug
from fastrnn.bench.grids import Job
from fastrnn.bench.measuring import Options
from fastrnn.bench.passes import KINDS, condensed, identity, noise
from fastrnn.bench.records import CONDITIONS, setups
from fastrnn.bench.run import measure, plan
from fastrnn.cli.parser import UsageError

TRIES, PAUSE = 3, 5.0  # seconds: a burst of other work must not meet all tries
SUSPECT = 2.0
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
        return "of too few passes"
    return differing(made, environment, ("subject", "backend", *CONDITIONS))


def command(args: argparse.Namespace, words: list[str], echo: Callable[[str], None]) -> int:
    """Exit code 1 if a case is slower than in the records, or wrong."""
    library = import_module("fastrnn")
    kept = args.malloc == "keep" and keep_freed_memory()
    environment = {
        **environment_of(library, words),
        "malloc": "keep" if kept else "system",
        "device": args.device,
        "backend": args.backend,
        "apart": args.apart,
    }
    path = Path(args.check) if args.check else newest(results(args.out), environment)
    records = read(path)
    if not noise(records):
        raise UsageError(f"--check {path}: its records do not {NO_NOISE}")
    known = by_key(records)
    if why := differing(setups(records), environment):
        raise UsageError(f"--check {path}: its records were {why}")
    same = made_on(records) == made_on([environment])
    planned = [j for j in plan(args) if j.what == "timing" and identity(KINDS[j.what], j.key()) in known]
    if not planned:
        raise UsageError(f"--check: nothing of {path} is in what was asked to be measured (threads, types, cases)")
    echo(report.header(environment) + f"\nagainst {path}\n\n{report.TIMES_HEADER}")
    options = Options(library, args.backend, args.sample, args.rounds, facts=gpu(), apart=args.apart, keep=kept)
    start = time.monotonic()
    found: list[tuple[Job, Record]] = []
    for job in planned:
        if args.budget and time.monotonic() - start > args.budget:
            break
        found.append((job, measure(job, options, echo)))
    measured, failures = confirmed(found, list(known.values()), same, options, echo)
    echo(f"\n{len(found)} of {len(planned)} cases measured, {failures} failed; against {path}")
    echo(text(measured))
    return 1 if failures or measured.worse or not found else 0


def confirmed(
    found: list[tuple[Job, Record]],
    known: list[Record],
    same: bool,
    options: Options,
    echo: Callable[[str], None],
) -> tuple[Comparison, int]:
    """What was measured beside what is known, suspects as often as TRIES; and how many failed at any time.

    `same`: what is known is of this hardware and torch.
    """
    least = LEAST if same else ELSEWHERE
    jobs = {identity(KINDS[job.what], job.key()): job for job, _ in found}
    passes = [{**r, "pass": 0} for _, r in found if r["kind"] == "measurement"]
    failures = len(found) - len(passes)
    for number in range(1, TRIES):
        sure = SUSPECT if number == 1 else 0.0  # tries that lie apart leave the doubt
        suspects = [c.key for c in compare(known, condensed(passes), least, sure, same).regressions if c.key in jobs]
        if not suspects:
            break
        echo(f"again, since perhaps slower: {len(suspects)}")
        time.sleep(PAUSE)
        again = {key: measure(jobs[key], options, echo) for key in suspects}
        failed = [key for key, r in again.items() if r["kind"] == "failure"]
        jobs = {key: jobs[key] for key in suspects if key not in failed}
        failures += len(failed)
        passes += [{**r, "pass": number} for r in again.values() if r["kind"] == "measurement"]
    return compare(known, condensed(passes), least, SURE, same)._replace(only_before=[]), failures
