"""What a run measures, and in which order: the most important first, since a budget may end it at any time.

    cpu       the shapes of fastrnn.bench.shapes
    gpu       H x B at T = 512 and I = H: one layer, packed, two layers, both directions
    flashrnn  the shape with one head of FlashRNN's protocol (arXiv 2412.07752): bf16, B = 16, T = 1024. Its others have
              several heads, a block-diagonal W_hh, which torch.nn does not have
    haste     the grid of Haste's charts: fp32, T = 50, B from 1 to 128, H from 128 to 4096, I from 64 to 512

The product of the input is inside everything that is timed, on all sides.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from fastrnn.bench.shapes import CASES, Case

HIDDEN = (256, 512, 1024, 128, 64, 768, 160, 192, 640, 2048)  # the most important first
BATCHES = (64, 32, 16, 128, 8, 256, 1)
STEPS = 512
FORMS = ("", "packed", "2layers", "bi")
GPU_DTYPES = ("bfloat16", "tf32", "float16", "float32")
MODES = ("training", "inference", "forward")
_SHAPES = ("T1-B1-H128", "T100-B1-H256", "T35-B20-H200", "T100-B64-H256", "packed-B32-I100-H256", "T100-B16-H256")
_CELLS = ("LSTM", "GRU", "RNN")


class Job(NamedTuple):
    """One measurement to make."""

    what: str  # "timing", "latency" or "memory"
    case: Case
    cell: str
    mode: str
    dtype: str
    device: str
    threads: int  # 0 on a GPU

    def key(self) -> dict[str, Any]:
        """What a record is found by."""
        return {
            "case": self.case.name,
            "cell": self.cell,
            "mode": self.mode,
            "threads": self.threads,
            "dtype": self.dtype,
            "device": self.device,
        }

    def shape(self) -> dict[str, Any]:
        """The sizes, for whoever draws the record."""
        c = self.case
        sizes = {"T": c.T, "B": c.B, "I": c.I, "H": c.H, "layers": c.layers, "bidirectional": c.bidirectional}
        return {**sizes, "form": c.form, "tokens": c.tokens}


def gpu_cases(
    hidden: Sequence[int] | None = None, batches: Sequence[int] | None = None, T: int = STEPS
) -> Iterator[Case]:
    """The grid of H x B in each form, and for each H one step of one sequence."""
    for form in FORMS:
        for H in hidden or HIDDEN:
            for B in batches or BATCHES:
                yield gpu_case(T, B, H, form)
    for H in hidden or HIDDEN:
        yield gpu_case(1, 1, H)


def gpu_case(T: int, B: int, H: int, form: str = "") -> Case:
    name = "-".join(filter(None, (f"T{T}-B{B}-H{H}", form)))
    if form == "packed":
        rng = random.Random(B)
        lengths = tuple(rng.randint(max(1, T // 15), T) for _ in range(B))
        return Case(name, max(lengths), B, H, H, form="packed", lengths=lengths)
    return Case(name, T, B, H, H, layers=2 if form == "2layers" else 1, bidirectional=form == "bi")


def flashrnn_cases() -> Iterator[Case]:
    yield Case("flashrnn-T1024-B16-H768", 1024, 16, 768, 768)


def haste_cases() -> Iterator[Case]:
    for H in (128, 256, 512, 1024, 2048, 4096):
        for B in (1, 8, 32, 64, 128):
            for width in (64, 128, 256, 512):
                yield Case(f"haste-T50-B{B}-I{width}-H{H}", 50, B, width, H, cells=("LSTM", "GRU"))


def cases(
    grid: str, hidden: Sequence[int] | None = None, batches: Sequence[int] | None = None, steps: int = STEPS
) -> tuple[Case, ...]:
    """The cases of the grid named so; sizes other than its own for "gpu" only."""
    made: dict[str, Callable[[], Iterable[Case]]] = {
        "cpu": lambda: CASES,
        "gpu": lambda: gpu_cases(hidden, batches, steps),
        "flashrnn": flashrnn_cases,
        "haste": haste_cases,
    }
    return tuple(made[grid]())


GRIDS = ("cpu", "gpu", "flashrnn", "haste")


def jobs(
    chosen: Sequence[Case],
    cells: Sequence[str],
    modes: Sequence[str],
    dtypes: Sequence[str],
    device: str,
    threads: Sequence[int],
    parts: Sequence[str],
) -> list[Job]:
    """All measurements of these, ordered by importance.

    Memory is that of training, at the largest of `threads` only. Latency, at each of them, is that of the cases of one
    step, one row and one layer, where "inference" is among `modes`.
    """
    found: list[tuple[float, Job]] = []
    for place, case in enumerate(chosen):
        for cell in (c for c in cells if c in case.cells):
            for dtype in dtypes:
                for n in threads:
                    for job in _of(case, cell, modes, dtype, device, n, parts):
                        if job.what != "memory" or n == max(threads):
                            found.append((_rank(job, place, len(chosen), dtypes, threads), job))
    return [job for _, job in sorted(found, key=lambda pair: pair[0])]


def _of(
    case: Case, cell: str, modes: Sequence[str], dtype: str, device: str, threads: int, parts: Sequence[str]
) -> Iterator[Job]:
    trains = "training" in case.modes
    for mode in modes:
        if "timing" in parts and (mode in case.modes or (mode == "forward" and trains)):
            yield Job("timing", case, cell, mode, dtype, device, threads)
    if "latency" in parts and "inference" in modes and case.T == case.B == case.layers == 1:
        yield Job("latency", case, cell, "inference", dtype, device, threads)
    if "memory" in parts and "training" in modes and trains:
        yield Job("memory", case, cell, "training", dtype, device, threads)


def _rank(job: Job, place: int, of: int, dtypes: Sequence[str], threads: Sequence[int]) -> float:
    """Small is early. Cells, types and sizes that are used most, then the rest of each grid."""
    rank = _place(job.cell, _CELLS) + _place(job.dtype, dtypes) / 2 + _place(job.threads, sorted(threads)[::-1]) / 4
    rank += 2.5 * (job.mode == "forward") + {"timing": 0, "latency": 0.5, "memory": 3}[job.what]
    if job.case in CASES:
        return rank + _place(job.case.name, _SHAPES) / 4 + place / of / 8
    if job.case.name.startswith(("flashrnn", "haste")):
        return rank + 2 * place / of
    rank += FORMS.index(form_of(job.case))
    return rank + _place(job.case.H, HIDDEN) / 4 + _place(job.case.B, BATCHES) / 4


def form_of(case: Case) -> str:
    """Of FORMS."""
    return "packed" if case.form == "packed" else "2layers" if case.layers > 1 else "bi" if case.bidirectional else ""


def _place(value: Any, order: Sequence[Any]) -> int:
    return order.index(value) if value in order else len(order)
