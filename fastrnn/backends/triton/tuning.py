"""Measured choices: the best plan for a shape, and whether it beats torch.nn's kernels, kept on disk.

`tune` measures; calls look up what it found. A file holds the findings for one device, version of Triton and version of
fastrnn, as JSON, and is replaced as a whole, so that processes may read and write it at the same time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastrnn.backends.base import Query
from fastrnn.backends.triton import device
from fastrnn.backends.triton.plan import Limits, Plan, Problem, candidates, misfit, plan
from fastrnn.cells import CELLS

SCHEDULE = "FASTRNN_TRITON_SCHEDULE"  # names one, for tests and for a way around trouble
Timer = Callable[[Callable[[], Any]], float]  # seconds of one call
_forced: dict[Problem, Plan] = {}  # while they are measured; calls of other shapes, on other threads, keep their own


class Finding(NamedTuple):
    """What was measured for one shape: seconds of a call, with its backward if that is what it is about."""

    plan: Plan  # the best
    seconds: float
    native: float  # by torch.nn's kernels; infinite where they cannot make the call


def folder() -> Path:
    """Where findings are kept: FASTRNN_CACHE, or fastrnn in the user's cache folder."""
    own = os.environ.get("FASTRNN_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastrnn"


@functools.lru_cache(maxsize=16)
def path(limits: Limits) -> Path:
    import triton

    name = re.sub(r"[^a-z0-9]+", "-", limits.name.lower()).strip("-")
    return folder() / f"{name}-triton-{triton.__version__}-fastrnn-{version('fastrnn')}.json"


def key(problem: Problem, cell: str) -> str:
    """Shapes that share a finding: rows up to the same power of two."""
    rows = 1 << (problem.B - 1).bit_length()
    direction = "backward" if problem.backward else "forward"
    return f"{cell} {direction} {problem.itemsize} {problem.precision} H={problem.H} B<={rows} S={problem.S}"


@functools.lru_cache(maxsize=16)
def _read(file: Path) -> dict[str, Finding]:
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
        return {k: Finding(Plan(*v[0]), *v[1:]) for k, v in found.items()}
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        message = f"{file}: expected what fastrnn.tune has found, got something else ({error}); remove it"
        raise RuntimeError(message) from error


def lookup(problem: Problem, cell: str, limits: Limits) -> Finding | None:
    """What was found for this shape, if it was measured."""
    return _read(path(limits)).get(key(problem, cell))


def decide(problem: Problem, cell: str, limits: Limits) -> tuple[Plan, str]:
    """The plan to launch, and why: that of FASTRNN_TRITON_SCHEDULE, the one measured to be best, or the rule's."""
    forced = _forced.get(problem)
    return (forced, "being measured") if forced else _decide(problem, cell, limits, os.environ.get(SCHEDULE))


@functools.lru_cache(maxsize=1024)
def _decide(problem: Problem, cell: str, limits: Limits, schedule: str | None) -> tuple[Plan, str]:
    finding = None if schedule else lookup(problem, cell, limits)
    if finding is not None and misfit(finding.plan, problem, limits) is None:
        return finding.plan, f"measured, {finding.seconds * 1e6:.0f} us"
    return plan(problem, limits, schedule)


def faster_than_native(query: Query, precision: str) -> bool | None:
    """As measured for this shape, with its backward where gradients are asked for; None if it was not."""
    # What was measured of the backward is a whole training step.
    finding = lookup(problem_of(query, precision, query.grad), query.cell, _limits(query))
    return None if finding is None else finding.seconds < finding.native


def _limits(query: Query) -> Limits:
    return device.limits(query.device, query.device_index)


def problem_of(query: Query, precision: str, backward: bool) -> Problem:
    gates, size = CELLS[query.cell].gates, query.dtype.itemsize
    return Problem(gates, query.H, query.B, query.S, size, precision, backward)


def record(findings: dict[str, Finding], limits: Limits) -> Path:
    """Add findings to those on disk."""
    import fcntl  # of Unix, where Triton is

    file = path(limits)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # nobody else's findings get lost; released as it is closed
        forget()
        merged = _read(file) | findings
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        with open(handle, "w") as out:
            json.dump(merged, out, indent=0)
        os.replace(temporary, file)
    forget()
    return file


def forget() -> None:
    """Read the findings again when they are wanted."""
    for cached in (path, _read, _decide):
        cached.cache_clear()


@contextlib.contextmanager
def _force(problem: Problem, plan: Plan) -> Iterator[None]:
    _forced[problem] = plan
    try:
        yield
    finally:
        _forced.pop(problem, None)  # another thread may have measured the same


def timer(kind: str, seconds: float = 0.1, rounds: int = 7, index: int | None = None) -> Timer:
    """Median time of a call on a device, after a first one that compiles."""

    def wait() -> None:
        if kind == "cuda":
            torch.cuda.synchronize(index)

    def measure(function: Callable[[], Any]) -> float:
        times = []
        for k in range(rounds + 1):
            count, start = 0, time.perf_counter()
            while count == 0 or (k and time.perf_counter() - start < seconds / rounds):
                function()
                count += 1
            wait()
            times.append((time.perf_counter() - start) / count)
        return statistics.median(times[1:])

    return measure


def search(
    query: Query, precision: str, run: Callable[[str, bool], Any], native: bool, measure: Timer | None = None
) -> dict[str, Finding]:
    """Measure every candidate for `query`.

    Args:
        run: `run(backend, backward)` makes one call of a backend, with its backward if wanted.
        native: torch.nn's kernels can make the call, too.
    """
    limits, measure = _limits(query), measure or timer(query.device, index=query.device_index)
    found: dict[str, Finding] = {}
    with contextlib.ExitStack() as stack:
        for backward in (False, True)[: 1 + query.grad]:
            problem, times = problem_of(query, precision, backward), {}
            for candidate in candidates(problem, limits):
                with _force(problem, candidate):
                    times[candidate] = measure(functools.partial(run, "triton", backward))
            chosen = min(times, key=times.__getitem__)
            theirs = measure(functools.partial(run, "native", backward)) if native else float("inf")
            found[key(problem, query.cell)] = Finding(chosen, times[chosen], theirs)
            stack.enter_context(_force(problem, chosen))  # a training step is measured with the best forward
    return found
