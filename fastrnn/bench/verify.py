"""`fastrnn verify`: is what runs on this machine right? Every cell, type and backend against fp64.

The truth is torch.nn in fp64 on the same numbers, those of the type under test (fastrnn/bench/truth.py). Compared are
outputs, final states, and the gradients of inputs, initial states and all parameters, of two layers in one direction
and in both, dense, with `lengths` and with `resets`, the engine's by one thread and by all. Beside each error stands
torch.nn's own in that type, and ours may be at most TORCH_FACTOR times as large, or as large as FLOOR where torch.nn
has happened to be better than that.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import fastrnn
from fastrnn.backends import BACKENDS
from fastrnn.bench.tolerances import EXACT, FLOOR, TORCH_FACTOR
from fastrnn.bench.truth import INPUTS, TYPES, Problem, of_torch, problems, query, results
from fastrnn.cells import CELLS

TF32_FLOOR = FLOOR[torch.float16]  # TF32 rounds operands as fp16 does


class Row(NamedTuple):
    """What came of one cell, type, input, backend and number of threads: the tensor that is worst beside its limit."""

    device: str
    cell: str
    dtype: str
    input: str  # of INPUTS
    backend: str
    threads: int  # of the engine; 0 where they are not what is tested
    status: str  # "ok", "WRONG", "FAILED" or "not here"
    worst: str = ""
    ours: float = 0.0
    theirs: float | None = None  # torch.nn's own error; None where it cannot run this
    limit: float = 0.0
    why: str = ""


def error(got: Tensor, truth: Tensor) -> float:
    """The largest difference over the truth's largest value; infinite if shapes differ or one of them is not finite."""
    if got.shape != truth.shape or not all(bool(torch.isfinite(a).all()) for a in (got, truth)):
        return math.inf
    a, b = got.double().cpu(), truth.double().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def limit_of(dtype: str, theirs: float | None) -> float:
    """What is granted, given torch.nn's own error; one that is not finite grants no more than none."""
    if dtype == "float64":
        return EXACT[torch.float64]
    floor = TF32_FLOOR if dtype == "tf32" else FLOOR[TYPES[dtype]]
    return max(floor, TORCH_FACTOR * theirs) if theirs is not None and math.isfinite(theirs) else floor


def check(head: Row, seed: int, projection: bool = False) -> Row:
    """`head` with what comes of all its problems."""
    dtype, device, backend = head.dtype, head.device, head.backend
    rows: list[Row] = []
    for problem in problems(head.cell, head.input, seed, projection):
        why = unsupported(problem, dtype, device, backend)
        if why and any(row.status == "WRONG" for row in rows):
            break  # what cannot run does not excuse what ran
        if why:
            return head._replace(status="not here", why=why)
        truth, own = of_torch(problem, dtype, device)
        try:
            got = results(problem, fastrnn, dtype, device, False, backend)
        except Exception as failure:  # a backend that ends in an exception is a row, and the exit code tells
            return head._replace(status="FAILED", why=f"{type(failure).__name__}: {failure}")
        rows += [compared(head, name, got.get(name), truth[name], own) for name in truth]
    return max(rows, key=severity)


def severity(row: Row) -> tuple[bool, float]:
    """Of two rows the larger is the worse one. NaN, which no comparison orders, counts as infinite."""
    share = row.ours / row.limit
    return row.status != "ok", math.inf if math.isnan(share) else share


def compared(head: Row, name: str, got: Tensor | None, truth: Tensor, own: dict[str, Tensor] | None) -> Row:
    """`head` with the error of one tensor."""
    theirs = None if own is None else error(own[name], truth)
    limit = limit_of(head.dtype, theirs)
    ours = math.inf if got is None else error(got, truth)
    status = "ok" if ours <= limit else "WRONG"
    return head._replace(status=status, worst=name, ours=ours, theirs=theirs, limit=limit)


def unsupported(problem: Problem, dtype: str, device: str, backend: str) -> str | None:
    """Why `backend` cannot run this problem here, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU"
    return BACKENDS[backend].unsupported(query(problem, dtype, device))


@contextlib.contextmanager
def threads_of_torch(number: int) -> Iterator[None]:
    """As before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """TF32 for all products of fp32, or for none; as before afterwards."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def heads(backends: Sequence[str], threads: Sequence[int]) -> Iterator[Row]:
    """What is to be verified, on the CPU and on the GPU if there is one; the engine by each number of `threads`."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in TYPES:
            if dtype == "tf32" and device == "cpu":
                continue
            for cell in CELLS:
                for kind in INPUTS:
                    for backend in backends:
                        engine = (backend, device) == ("cpu", "cpu")
                        for n in threads if engine else (0,):
                            yield Row(device, cell, dtype, kind, backend, n, "")


def rows(backends: Sequence[str], seed: int, threads: Sequence[int]) -> Iterator[Row]:
    """All of them. What is not the engine's runs by the first number of `threads`."""
    for head in heads(backends, threads):
        with precision(head.dtype), threads_of_torch(head.threads or threads[0]):
            found = [check(head, seed, projection) for projection in (False, True)[: 1 + (head.cell == "lstm")]]
        for row, label in zip(found, (head.cell, f"{head.cell}, projected"), strict=False):
            yield row._replace(cell=label)


COLUMNS = f"{'':5}{'cell':17}{'type':9}{'input':8}{'backend':10}{'ours':>9}{'torch.nn':>10}{'limit':>9}"


def line(row: Row) -> str:
    backend = f"{row.backend} x{row.threads}" if row.threads else row.backend
    head = f"{row.device:5}{row.cell:17}{row.dtype:9}{row.input:8}{backend:10}"
    if row.status == "FAILED":
        return f"{head}FAILED  {row.why.splitlines()[0]}"
    theirs = "-" if row.theirs is None else f"{row.theirs:.1e}"
    return f"{head}{row.ours:>9.1e}{theirs:>10}{row.limit:>9.1e}  {row.status:6} {row.worst}"


def absences(found: Sequence[Row]) -> list[str]:
    """What did not run, and why, a line for each reason."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in found:
        if row.status == "not here":
            groups.setdefault((row.device, row.backend, row.why), []).append(row)
    lines = []
    for (device, backend, why), group in groups.items():
        all_of_it = [r for r in found if (r.device, r.backend) == (device, backend)]
        kinds = [kind for kind in INPUTS if kind in {r.input for r in group}]
        if len(group) == len(all_of_it):
            which = "everything"
        elif len(group) == sum(r.input in kinds for r in all_of_it):
            which = ", ".join(kinds)
        else:
            which = ", ".join(sorted({f"{r.cell} {r.dtype} {r.input}" for r in group}))
        lines.append(f"{device:5}{backend:10}not run: {which}: {why}")
    return lines


def command(backends: Sequence[str], seed: int, threads: Sequence[int], echo: Callable[[str], None]) -> int:
    """Prints the table; exit code 1 if something is out of tolerance or failed, or nothing could run."""
    start = time.monotonic()
    echo("errors against fp64, relative to the largest value; the worst tensor of each row")
    echo(f"seed {seed}; cpu xN: the engine on N threads")
    echo(COLUMNS)
    found = []
    for row in rows(backends, seed, threads):
        found.append(row)
        if row.status != "not here":
            echo(line(row))
    for text in absences(found):
        echo(text)
    ran = [r for r in found if r.status != "not here"]
    bad = [r for r in ran if r.status != "ok"]
    for row in bad:
        echo(line(row))
    verdict = f"{len(bad)} of {len(ran)} out of tolerance" if bad else f"all {len(ran)} within tolerance"
    echo(f"{verdict if ran else 'nothing ran'}, {time.monotonic() - start:.0f} s")
    return 1 if bad or not ran else 0
