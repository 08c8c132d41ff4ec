"""What `fastrnn verify` compares: layers, their numbers, and what torch.nn makes of them in fp64 and in their type.

torch.nn has no `lengths` and no `resets`. Where a batch has them, it is cut into the pieces that they delimit: each
piece is a sequence of its own, which begins with the initial state at an end of its row and with zeros elsewhere, in
all layers and both directions alike. torch.nn runs the pieces as one PackedSequence.
"""

from __future__ import annotations

import functools
import itertools
import random
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import fastrnn
from fastrnn.backends.base import Query
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
INPUTS = ("dense", "lengths", "resets")  # "resets" with `lengths`, too
KINKED = ("rnn_relu",)  # where a pre-activation near zero is rounded to its other side, all of a gradient comes or goes
DEPTH = 2  # layers
cached = functools.lru_cache(maxsize=8)  # the problems of one cell, type and input, for all backends


class Problem(NamedTuple):
    """One layer's sizes and numbers."""

    cell: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int  # 0: no projection
    directions: int
    lengths: tuple[int, ...]  # () for rows of T steps each
    resets: tuple[tuple[int, ...], ...]  # the steps before which each row's state is cleared; () for none
    seed: int


def problems(cell: str, kind: str, seed: int, projection: bool) -> list[Problem]:
    """Those of one of INPUTS: sizes that change with the seed, odd but for one of whole vectors and blocks.

    But for the first, they are so large that the engine's threads share them (`plan` in csrc/cpu/plan.h): two threads
    the directions of "blocks", the units of "units", which is wide and has few rows, and the rows of "rows".
    """
    rng = random.Random(f"{seed} {kind}")
    sizes = {
        "odd": (rng.randint(5, 9), rng.randint(3, 7), rng.randint(3, 13), rng.randrange(17, 31, 2), 2),
        "blocks": (12, 20, 32, 64, 2),
        "units": (rng.randint(6, 8), 5, rng.randint(3, 13), rng.randrange(95, 103, 2), 1),
        "rows": (rng.randint(6, 8), rng.randint(25, 31), rng.randint(3, 13), rng.randrange(41, 47, 2), 1),
    }
    taken = {"dense": tuple(sizes), "lengths": ("odd", "rows"), "resets": ("odd", "units")}[kind]
    found = []
    for T, B, width, H, directions in (sizes[name] for name in taken):
        lengths = () if kind == "dense" else (*(rng.randint(1, T) for _ in range(B - 1)), T)
        resets = tuple(tuple(t for t in range(T) if rng.random() < 0.3) for _ in range(B)) if kind == "resets" else ()
        P = H // 3 if projection else 0
        found.append(Problem(cell, T, B, width, H, P, directions, lengths, resets, rng.randrange(1 << 30)))
    return found


def layer(problem: Problem, library: Any, dtype: str, exact: bool) -> tuple[Any, Tensor, list[Tensor], torch.dtype]:
    """Module, input and initial states on the CPU, rounded to the type; the type in which they are to be used."""
    p = problem
    name, more = LAYERS[p.cell]
    more = {**more, "bidirectional": p.directions == 2, **({"proj_size": p.P} if p.P else {})}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(p.seed)
        source = getattr(nn, name)(p.I, p.H, DEPTH, **more)
        x = torch.randn(p.T, p.B, p.I)
        widths = [p.P or p.H, p.H][: CELLS[p.cell].states]
        states = [torch.randn(DEPTH * p.directions, p.B, n) for n in widths]
    if p.cell in KINKED:
        _keep_from_zero(source)
    rounded = TYPES[dtype]
    source = source.to(rounded)
    if library is fastrnn:
        ours = getattr(fastrnn, name)(p.I, p.H, DEPTH, **more, dtype=rounded)
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


def masks(problem: Problem, device: str) -> tuple[Tensor | None, Tensor | None]:
    """`lengths` (B,) and `resets` (T, B) as fastrnn takes them, or None."""
    p = problem
    lengths = torch.tensor(p.lengths, device=device) if p.lengths else None
    if not p.resets:
        return lengths, None
    return lengths, torch.tensor([[t in row for row in p.resets] for t in range(p.T)], device=device)


def results(
    problem: Problem, library: Any, dtype: str, device: str, exact: bool, backend: str = "auto"
) -> dict[str, Tensor]:
    """Outputs, states and gradients by name of a layer of `library`; `exact`: the same numbers in fp64."""
    module, x, states, kind = layer(problem, library, dtype, exact)
    module, x = module.to(device, kind), x.to(device, kind).requires_grad_()
    states = [a.to(device, kind).requires_grad_() for a in states]
    if library is fastrnn:
        module.backend = backend
        lengths, resets = masks(problem, device)
        y, finals = module(x, bundle(states), lengths=lengths, resets=resets)
    else:
        y, finals = _of_torch(problem, module, x, states)
    outputs = [y, *(finals if isinstance(finals, (tuple, list)) else (finals,))]
    generator = torch.Generator().manual_seed(problem.seed + 1)
    seeds = [torch.randn(o.shape, generator=generator).to(TYPES[dtype]).to(device, kind) for o in outputs]
    leaves = {"x": x, **dict(zip(("h_0", "c_0"), states, strict=False)), **dict(module.named_parameters())}
    grads = torch.autograd.grad(outputs, list(leaves.values()), seeds)
    seen = dict(zip(("y", "h_n", "c_n"), outputs, strict=False))
    return {k: a.detach() for k, a in {**seen, **{f"grad {k}": g for k, g in zip(leaves, grads, strict=True)}}.items()}


def bundle(states: Sequence[Tensor]) -> Any:
    """As modules take them: a tuple of h and c, or h alone."""
    return tuple(states) if len(states) > 1 else states[0]


def _of_torch(problem: Problem, module: Any, x: Tensor, states: list[Tensor]) -> tuple[Tensor, Any]:
    """torch.nn's output and final states, piece by piece where rows are cut."""
    p = problem
    if not p.lengths and not p.resets:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LSTM with projections")  # that oneDNN has none
            y, finals = module(x, bundle(states))
        return y, finals
    pieces = [piece for b in range(p.B) for piece in _pieces(p, b)]
    rows = torch.tensor([b for b, _, _ in pieces], device=x.device)
    begins = torch.tensor([t == 0 and not (p.resets and 0 in p.resets[b]) for b, t, _ in pieces], device=x.device)
    ends = torch.tensor([t == (p.lengths[b] if p.lengths else p.T) for b, _, t in pieces], device=x.device)
    live = torch.stack([begins, ends][: p.directions]).repeat(DEPTH, 1)  # (layers * directions, pieces)
    started = [torch.where(live[..., None], a[:, rows], 0) for a in states]
    packed = pack_padded_sequence(
        pad_sequence([x[t0:t1, b] for b, t0, t1 in pieces]),
        torch.tensor([t1 - t0 for _, t0, t1 in pieces]),
        enforce_sorted=False,
    )
    out, finals = module(packed, bundle(started))
    padded = pad_packed_sequence(out)[0]
    cut = [padded[: t1 - t0, k] for k, (_, t0, t1) in enumerate(pieces)]
    y = pad_sequence([torch.cat([c for c, q in zip(cut, pieces, strict=True) if q[0] == b]) for b in range(p.B)])
    # Forward ends in a row's last piece, the other way in its first.
    first = [next(k for k, q in enumerate(pieces) if q[0] == b) for b in range(p.B)]
    last = [k - 1 for k in (*first[1:], len(pieces))]
    places = [(last, first)[i % p.directions] for i in range(DEPTH * p.directions)]
    finals = finals if isinstance(finals, tuple) else (finals,)
    return y, [torch.stack([a[i, k] for i, k in enumerate(places)]) for a in finals]


def _pieces(problem: Problem, row: int) -> list[tuple[int, int, int]]:
    """(row, begin, end) of each piece of a row."""
    end = problem.lengths[row] if problem.lengths else problem.T
    cuts = [t for t in problem.resets[row] if 0 < t < end] if problem.resets else []
    return [(row, a, b) for a, b in itertools.pairwise((0, *cuts, end))]


@cached
def query(problem: Problem, dtype: str, device: str) -> Query:
    """What backends are asked whether they can run."""
    module, x, states, kind = layer(problem, fastrnn, dtype, False)
    hx = bundle([a.to(device, kind) for a in states])
    found: Query = module.to(device, kind)._prepare(x.to(device, kind), hx, *masks(problem, device)).query
    return found


@cached
def of_torch(problem: Problem, dtype: str, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The truth, and torch.nn's own results in the type; None where it has no kernel for this type here."""
    truth = results(problem, nn, dtype, "cpu", True)
    try:
        return truth, results(problem, nn, dtype, device, False)
    except RuntimeError:
        return truth, None
