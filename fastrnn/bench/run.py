"""A run: the grid in the order of importance, until the budget is spent, each record on disk as soon as it is there.

With several passes the times of the whole grid are measured over again, so that a budget cuts off passes, not cases.

All sides of a case run in one process on the same weights and inputs, in turn. Nothing is timed before both gave the
same numbers; a case that differs is reported as failed, and the run then exits with 1; so does one that measured
nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fastrnn.backends.watchdog import GaveUp, check_device
from fastrnn.bench import energy, measuring, memory, parity, peers, report, roofline
from fastrnn.bench.apart import Apart
from fastrnn.bench.environment import Store, describe, gpu, keep_freed_memory, lines, results, slug, write
from fastrnn.bench.grids import Job, cases, jobs
from fastrnn.bench.measuring import Options
from fastrnn.bench.passes import KINDS, condensed, identity
from fastrnn.bench.records import SETUP, setups
from fastrnn.bench.shapes import matching
from fastrnn.cli.parser import UsageError

Record = dict[str, Any]


def plan(args: argparse.Namespace) -> list[Job]:
    """What is to be measured, the most important first."""
    chosen = matching(args.cases, cases(args.grid, args.hidden, args.batches, args.steps))
    threads = args.threads if args.device == "cpu" else [0]
    return jobs(chosen, args.cells, args.modes, args.dtypes, args.device, threads, args.parts)


def run(args: argparse.Namespace, command: list[str], echo: Callable[[str], None] = print) -> tuple[list[Record], Path]:
    """Measure; the records, one for each case, and where they were saved (whether or not they were)."""
    planned = plan(args)
    if not planned:
        raise UsageError(f"nothing is to be measured: {_nothing(args)}")
    library = torch.nn if args.self else import_module("fastrnn")
    kept = args.malloc == "keep" and keep_freed_memory()
    environment = {
        **describe(library, command),
        "malloc": "keep" if kept else "system",
        "device": args.device,
        "backend": args.backend,
        "peers": peers.table(args.device, args.peers),
        "apart": args.apart,
    }
    store, path = _open(args, environment, planned)
    echo(report.header(environment) + "\n")
    echo(report.peer_table(environment) + "\n")
    options = Options(
        library,
        args.backend,
        args.sample,
        args.rounds,
        args.peers,
        args.kernels,
        _meter(args, store, echo),
        gpu(),
        apart=args.apart,
        keep=kept,
    )
    for why in _without_bound(planned, options.facts):
        _note(store, f"no bound is given: {why}", echo)
    _measure_all(planned, _passes(args, store), options, store, args.budget, echo)
    return condensed(store.records), path


def _without_bound(planned: list[Job], facts: Record | None) -> list[str]:
    """Why some of what is timed on a GPU gets no bound."""
    dtypes = dict.fromkeys(j.dtype for j in planned if j.device == "cuda" and j.what == "timing")
    reasons = (roofline.unknown(dtype, facts) for dtype in dtypes if facts is not None)
    return list(dict.fromkeys(why for why in reasons if why is not None))


def _open(args: argparse.Namespace, environment: Record, planned: list[Job]) -> tuple[Store, Path]:
    """The file of the run: a new one, or with --resume one that is continued."""
    if args.resume is None:
        folder = results(args.out) / slug(environment)
        name = "gpu" if args.device == "cuda" else "cpu"
        path = folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.jsonl"
        store = Store(path if args.save else None)
    else:
        path = Path(args.resume)
        before = lines(path)
        _same_setup(path, before, environment)
        store = Store(path)
        again = {identity(KINDS[j.what], j.key()) for j in planned}  # which have another chance
        store.records = [r for r in before if not (_of_budget(r) or _failed(r) in again)]
    store.add({**environment, "passes": _passes(args, store)})
    return store, path


def _passes(args: argparse.Namespace, store: Store) -> int:
    """As asked for, no fewer than the file that is continued was to have; else, if kept, enough to tell the noise."""
    before = [r.get("passes", 1) for r in store.records if r["kind"] == "environment"]
    return int(max([args.passes or 0, *before]) or (KEPT_PASSES if args.save else 1))


def _same_setup(path: Path, before: list[Record], environment: Record) -> None:
    """UsageError if what `path` holds was made elsewhere, or with something else, than `environment` is."""
    made = [r for r in before if r["kind"] == "environment"]
    if not made:
        raise UsageError(f"--resume {path}: holds no environment; start a new run")
    there, here = {"hardware": slug(made[-1])}, {"hardware": slug(environment)}
    there, here = {**there, **setups(before)[-1]}, {**here, **{name: environment[name] for name in SETUP}}
    differing = [f"{name} {there[name]}, this is {here[name]}" for name in here if there[name] != here[name]]
    if differing:
        raise UsageError(f"--resume {path}: made on {'; '.join(differing)}; start a new run")


def _nothing(args: argparse.Namespace) -> str:
    """Why a plan is empty, as far as the options tell."""
    if args.parts == ["energy"]:
        return "--parts energy is of what timing measures; add timing"
    return f"no case has {'/'.join(args.cells)} in {'/'.join(args.modes)} with a part {'/'.join(args.parts)}"


def _meter(args: argparse.Namespace, store: Store, echo: Callable[[str], None]) -> energy.Meter | None:
    try:
        return energy.meter(args.device) if "energy" in args.parts else None
    except energy.Unmetered as why:
        _note(store, f"energy is not measured: {why}", echo)
        return None


def _failed(record: Record) -> Any:
    """Of which measurement it is the failure, or None."""
    return identity(KINDS.get(record["what"], ""), record) if record["kind"] == "failure" else None


BUDGET = "budget of"
KEPT_PASSES = 3


def _of_budget(record: Record) -> bool:
    return bool(record["kind"] == "note" and record["message"].startswith(BUDGET))


def _note(store: Store, message: str, echo: Callable[[str], None]) -> None:
    echo(message)
    note = {"kind": "note", "message": message}
    if note not in store.records:
        store.add(note)


def _measure_all(
    planned: list[Job], passes: int, options: Options, store: Store, budget: float, echo: Callable[[str], None]
) -> None:
    planned = _measurable(planned, store, echo)
    done = {_turn(r) for r in store.records if r["kind"] in KINDS.values() and _whole(r, options)}
    turns = [(k, j) for k in range(passes) for j in planned if k == 0 or j.what == "timing"]
    todo = [(k, j) for k, j in turns if (identity(KINDS[j.what], j.key()), k) not in done]
    if len(todo) < len(turns):
        echo(f"{len(turns) - len(todo)} of {len(turns)} are in the file already")
    failed: set[Any] = set()
    start = time.monotonic()
    echo(report.TIMES_HEADER)
    measured = 0
    for number, job in todo:
        if budget and time.monotonic() - start > budget:
            _note(store, f"{BUDGET} {budget:g} s spent: {measured} of {len(todo)} measured", echo)
            return
        key = identity(KINDS[job.what], job.key())
        if key in failed:  # its other passes would fail as well
            continue
        record = measure(job, options, echo)
        measured += 1
        if record["kind"] == "failure":
            failed.add(key)
        elif job.what == "timing":
            record["pass"] = number
        store.records = [r for r in store.records if not _replaced(r, key, None if _wrong(record) else number)]
        store.add(record)


def _wrong(record: Record) -> bool:
    """Whether it tells of wrong numbers, not of a process that died or could not start."""
    kinds = (parity.Mismatch.__name__, GaveUp.__name__)
    return bool(record["kind"] == "failure" and record["message"].startswith(kinds))


def _replaced(record: Record, key: Any, number: int | None) -> bool:
    """Whether it is of the case `key`, in the pass `number`; None: in any, since no number stands for what is wrong."""
    if record["kind"] not in KINDS.values():
        return False
    mine, turn = _turn(record)
    return bool(mine == key) and number in (None, turn)


def _turn(record: Record) -> tuple[Any, int]:
    return identity(record["kind"], record), record.get("pass", 0)


def _measurable(planned: list[Job], store: Store, echo: Callable[[str], None]) -> list[Job]:
    """Without the peaks of memory where they cannot be measured."""
    why_not = memory.unavailable()
    if not (why_not and any(j.what == "memory" and j.device == "cpu" for j in planned)):
        return planned
    _note(store, f"peak memory is not measured: {why_not}", echo)
    return [j for j in planned if j.what != "memory" or j.device != "cpu"]


def _whole(record: Record, options: Options) -> bool:
    """Whether a record of a file that is continued holds all that is asked for now: else it is measured anew."""
    if record["kind"] != "measurement":
        return True
    extras = (("kernels", options.kernels), ("joules", options.meter is not None))
    return set(options.peers) <= set(record.get("peers") or {}) and all(
        record.get(name) for name, asked in extras if asked
    )


def measure(job: Job, options: Options, echo: Callable[[str], None]) -> Record:
    """The record of `job`, or that of its failure."""
    try:
        record = measuring.measure(job, options)
        check_device()  # no time of a kernel that gave up: the last call does not tell, nor does the replay of a graph
    except Exception as error:  # one case must not end the run; the exit status tells
        message = str(error) if isinstance(error, Apart) else f"{type(error).__name__}: {error}"
        record = {"kind": "failure", "what": job.what, **job.key(), "message": message}
    echo(report.line(record))
    return record


def save(records: list[Record], path: Path, echo: Callable[[str], None]) -> None:
    """The tables, pictures and the page beside the records."""
    from fastrnn.bench import page

    write(path.with_suffix(".txt"), report.full(records))
    written = [path, path.with_suffix(".txt"), *page.write_all(records, path, echo)]
    echo("saved: " + ", ".join(str(p) for p in written))


def exit_code(records: list[Record]) -> int:
    """1 if something failed, or nothing was measured."""
    kinds = {r["kind"] for r in records}
    return 1 if "failure" in kinds or not kinds.intersection(KINDS.values()) else 0
