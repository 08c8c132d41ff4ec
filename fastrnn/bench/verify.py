"""`fastrnn verify`: is what runs on this machine right? Every cell, type and backend against fp64.

The truth is torch.nn in fp64 on the same numbers, those of the type under test. Compared are outputs, final states, and
the gradients of inputs, initial states and all parameters, of layers in both directions, two of them stacked, dense and
with `lengths`; beside each error stands torch.nn's own in that type, and ours may be at most TORCH_FACTOR times as
large, or as large as FLOOR where torch.nn has happened to be better than that.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.backends import BACKENDS
from fastrnn.bench.tolerances import EXACT, FLOOR, TORCH_FACTOR
from fastrnn.cells import CELLS

# torch.nn's class and arguments for each cell of the registry.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
}
TYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
KINKED = ("rnn_relu",)  # where a pre-activation near zero is rounded to its other side, all of a gradient comes or goes
TF32_FLOOR = FLOOR[torch.float16]  # TF32 rounds operands as fp16 does


class Problem(NamedTuple):
    """One layer's sizes and numbers."""

    cell: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int  # 0: no projection
    lengths: tuple[int, ...]  # () for a dense batch
    seed: int


class Row(NamedTuple):
    """What came of one cell, type and backend: the tensor that is worst beside its limit."""

    device: str
    cell: str
    dtype: str
    backend: str
    status: str  # "ok", "WRONG", "FAILED" or "not here"
    worst: str = ""
    ours: float = 0.0
    theirs: float | None = None  # torch.nn's own error; None where it cannot run this
    limit: float = 0.0
    why: str = ""


def problems(cell: str, seed: int, projection: bool) -> list[Problem]:
    """Odd sizes that change with the seed, dense and with lengths, and one size of whole vectors and blocks."""
    rng = random.Random(seed)
    found = []
    for ragged in (False, True):
        T, B, width, H = rng.randint(5, 9), rng.randint(3, 7), rng.randint(3, 13), rng.randrange(17, 31, 2)
        lengths = tuple(rng.randint(1, T) for _ in range(B - 1))
        lengths = (*lengths, T) if ragged else ()
        found.append(Problem(cell, T, B, width, H, H // 3 if projection else 0, lengths, rng.randrange(1 << 30)))
    found.append(Problem(cell, 12, 20, 32, 64, 16 if projection else 0, (), rng.randrange(1 << 30)))
    return found


def results(problem: Problem, library: Any, dtype: str, device: str, exact: bool, backend: str = "auto") -> Any:
    """Outputs, states and gradients by name of a layer of `library`; `exact`: the same numbers in fp64."""
    module, x, states, kind = _numbers(problem, library, dtype, exact)
    module, x = module.to(device, kind), x.to(device, kind).requires_grad_()
    states = [a.to(device, kind).requires_grad_() for a in states]
    if library is fastrnn:
        module.backend = backend
    hx = tuple(states) if len(states) > 1 else states[0]
    lengths = torch.tensor(problem.lengths) if problem.lengths else None
    if lengths is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LSTM with projections")  # that oneDNN has none
            y, finals = module(x, hx)
    elif library is fastrnn:
        y, finals = module(x, hx, lengths=lengths.to(device))
    else:
        packed, finals = module(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
        y = pad_packed_sequence(packed)[0]
    outputs = [y, *(finals if isinstance(finals, tuple) else (finals,))]
    generator = torch.Generator().manual_seed(problem.seed + 1)
    seeds = [torch.randn(o.shape, generator=generator).to(TYPES[dtype]).to(device, kind) for o in outputs]
    leaves = {"x": x, **dict(zip(("h_0", "c_0"), states, strict=False)), **dict(module.named_parameters())}
    grads = torch.autograd.grad(outputs, list(leaves.values()), seeds)
    seen = dict(zip(("y", "h_n", "c_n"), outputs, strict=False))
    return {k: a.detach() for k, a in {**seen, **{f"grad {k}": g for k, g in zip(leaves, grads, strict=True)}}.items()}


@functools.lru_cache(maxsize=8)  # the problems of one cell and type, for all backends
def of_torch(problem: Problem, dtype: str, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The truth, and torch.nn's own results in the type; None where it has no kernel for this type here."""
    truth = results(problem, nn, dtype, "cpu", True)
    try:
        return truth, results(problem, nn, dtype, device, False)
    except RuntimeError:
        return truth, None


def _numbers(problem: Problem, library: Any, dtype: str, exact: bool) -> tuple[Any, Tensor, list[Tensor], torch.dtype]:
    """Module, input and initial states on the CPU, rounded to the type; the type in which they are to be used."""
    p = problem
    name, more = LAYERS[p.cell]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(p.seed)
        source = getattr(nn, name)(p.I, p.H, 2, bidirectional=True, **more, **({"proj_size": p.P} if p.P else {}))
        x = torch.randn(p.T, p.B, p.I)
        widths = [p.P or p.H, p.H][: CELLS[p.cell].states]
        states = [torch.randn(4, p.B, n) for n in widths]
    if p.cell in KINKED:
        _keep_from_zero(source)
    rounded = TYPES[dtype]
    source = source.to(rounded)
    if library is fastrnn:
        ours = getattr(fastrnn, name)(
            p.I, p.H, 2, bidirectional=True, **more, **({"proj_size": p.P} if p.P else {}), dtype=rounded
        )
        ours.load_state_dict(source.state_dict())
        source = ours
    return source, x.to(rounded), [a.to(rounded) for a in states], torch.float64 if exact else rounded


@torch.no_grad()
def _keep_from_zero(module: nn.Module) -> None:
    """Every unit far on one side of zero, half of them on each, whatever the input."""
    for name, a in module.named_parameters():
        if name.startswith("bias_ih"):
            a.fill_(3.0)[::2].neg_()
        else:
            a.mul_(0.3)


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


def check(device: str, cell: str, dtype: str, backend: str, seed: int, projection: bool = False) -> Row:
    """One cell in one type on one backend, over all problems."""
    label = f"{cell}, projected" if projection else cell
    rows: list[Row] = []
    for problem in problems(cell, seed, projection):
        why = unsupported(problem, dtype, device, backend)
        if why and any(row.status == "WRONG" for row in rows):
            break  # what cannot run does not excuse what ran
        if why:
            return Row(device, label, dtype, backend, "not here", why=why)
        truth, own = of_torch(problem, dtype, device)
        try:
            got = results(problem, fastrnn, dtype, device, False, backend)
        except Exception as failure:  # a backend that ends in an exception is a row, and the exit code tells
            return Row(device, label, dtype, backend, "FAILED", why=f"{type(failure).__name__}: {failure}")
        rows += [_row(device, label, dtype, backend, name, got.get(name), truth[name], own) for name in truth]
    return max(rows, key=severity)


def severity(row: Row) -> tuple[bool, float]:
    """Of two rows the larger is the worse one. NaN, which no comparison orders, counts as infinite."""
    share = row.ours / row.limit
    return row.status != "ok", math.inf if math.isnan(share) else share


def _row(
    device: str, cell: str, dtype: str, backend: str, name: str, got: Tensor | None, truth: Tensor, own: Any
) -> Row:
    theirs = None if own is None else error(own[name], truth)
    limit = limit_of(dtype, theirs)
    ours = math.inf if got is None else error(got, truth)
    status = "ok" if ours <= limit else "WRONG"
    return Row(device, cell, dtype, backend, status, name, ours, theirs, limit)


def unsupported(problem: Problem, dtype: str, device: str, backend: str) -> str | None:
    """Why `backend` cannot run this problem here, or None."""
    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU"
    module, x, states, kind = _numbers(problem, fastrnn, dtype, False)
    module, x = module.to(device, kind), x.to(device, kind)
    hx = tuple(a.to(device, kind) for a in states)
    lengths = torch.tensor(problem.lengths, device=device) if problem.lengths else None
    return BACKENDS[backend].unsupported(module._prepare(x, hx if len(hx) > 1 else hx[0], lengths, None).query)


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


def rows(backends: Sequence[str], seed: int) -> Iterator[Row]:
    """All of them, on the CPU and on the GPU if there is one."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for dtype in TYPES:
            if dtype == "tf32" and device == "cpu":
                continue
            with precision(dtype):
                for cell in CELLS:
                    for projection in (False, True) if cell == "lstm" else (False,):
                        for backend in backends:
                            yield check(device, cell, dtype, backend, seed, projection)


def line(row: Row) -> str:
    head = f"{row.device:5}{row.cell:17}{row.dtype:9}{row.backend:10}"
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
        every = len(group) == sum((r.device, r.backend) == (device, backend) for r in found)
        which = "everything" if every else ", ".join(sorted({f"{r.cell} {r.dtype}" for r in group}))
        lines.append(f"{device:5}{backend:10}not run: {which}: {why}")
    return lines


def command(backends: Sequence[str], seed: int, threads: int, echo: Callable[[str], None]) -> int:
    """Prints the table; exit code 1 if something is out of tolerance or failed, or nothing could run."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _command(backends, seed, echo)
    finally:
        torch.set_num_threads(before)


def _command(backends: Sequence[str], seed: int, echo: Callable[[str], None]) -> int:
    start = time.monotonic()
    columns = f"{'ours':>9}{'torch.nn':>10}{'limit':>9}"
    echo(f"errors against fp64, relative to the largest value; the worst tensor of each row; seed {seed}")
    echo(f"{'':5}{'cell':17}{'type':9}{'backend':10}{columns}")
    found = []
    for row in rows(backends, seed):
        found.append(row)
        if row.status != "not here":
            echo(line(row))
    for text in absences(found):
        echo(text)
    ran = [r for r in found if r.status != "not here"]
    bad = [r for r in ran if r.status != "ok"]
    verdict = f"{len(bad)} of {len(ran)} out of tolerance" if bad else f"all {len(ran)} within tolerance"
    echo(f"{verdict if ran else 'nothing ran'}, {time.monotonic() - start:.0f} s")
    return 1 if bad or not ran else 0
