"""Streams that are watched instead of run: who waits for whom, and who touches which memory.

Each lane has a vector clock: how far it knows each lane to have come. An event carries a clock, a wait takes it over.
Whoever reads memory must know of its last write, whoever writes must know of all uses before, and whoever uses what
another lane has allocated must have told the allocator. What no lane wrote, the caller wrote before it began.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support import KINDS, random_states, usable_backends
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import packing
from fastrnn.backends.base import Call, Gradients, Query, Result, Saved
from fastrnn.backends.cpu import Cpu
from fastrnn.wavefront.lanes import Lanes

T, B, I, H, P, CHUNK = 10, 5, 4, 9, 3, 3  # noqa: E741
MASKS: dict[str, dict[str, Any]] = {
    "dense": {},
    "lengths": {"lengths": torch.tensor([3, 10, 0, 7, 1])},
    "short": {"lengths": torch.tensor([2, 1, 3, 0, 1])},
    "resets": {"resets": torch.rand(T, B, generator=torch.Generator().manual_seed(5)) < 0.3},
    "both": {
        "lengths": torch.tensor([9, 6, 10, 0, 4]),
        "resets": torch.rand(T, B, generator=torch.Generator().manual_seed(6)) < 0.3,
    },
}
needs_engine = pytest.mark.skipif("cpu" not in usable_backends(), reason="needs the C++ engine")
CALLER = -1
_LOOKS = ("__get__", "data_ptr", "dim", "is_contiguous", "is_neg", "numel", "size", "stride")  # at no memory

Event = tuple[int, dict[int, int]]  # its lane, and the clock there


class Hazard(AssertionError):
    """Two lanes whose order nothing settles."""


class Watched(Lanes):
    """One for all calls of a test. `without` is the number of the wait that is left out."""

    def __init__(self, without: int | None = None, keeps: bool = True) -> None:
        self.without, self.keeps = without, keeps
        self.now = CALLER
        self.clocks: dict[int, dict[int, int]] = {CALLER: {CALLER: 1}}
        self.wrote: dict[int, tuple[int, int]] = {}
        self.used: dict[int, dict[int, int]] = {}
        self.owner: dict[int, int] = {}
        self.kept: set[tuple[int, int]] = set()
        self.alive: list[Tensor] = []  # or memory would come back as that of another tensor
        self.waits: list[str] = []  # "fork", "join", "task", or "nothing new"
        self.tasks: list[tuple[str, int, int, dict[int, int]]] = []  # way, layer, chunk, clock at the end

    def begin(self, layers: int) -> Watched:
        self.count = min(2 * layers, 8)
        return self

    def clock(self, lane: int) -> dict[int, int]:
        return self.clocks.setdefault(lane, {})

    @contextlib.contextmanager
    def on(self, lane: int) -> Iterator[None]:
        before, self.now = self.now, lane
        try:
            yield
        finally:  # as torch.cuda.stream
            self.now = before

    def record(self, lane: int) -> Event:
        return lane, dict(self.clock(lane))

    def wait(self, lane: int, recorded: Event) -> None:
        of, event = recorded
        own = self.clock(lane)
        kind = "join" if lane == CALLER else "fork" if of == CALLER else "task"
        self.waits.append(kind if any(own.get(other, 0) < n for other, n in event.items()) else "nothing new")
        if len(self.waits) - 1 != self.without:
            own.update({other: max(own.get(other, 0), n) for other, n in event.items()})

    def keep(self, lane: int, tensors: Sequence[Tensor | None]) -> None:
        if self.keeps:
            self.kept |= {(_memory(a), lane) for a in tensors if a is not None}

    def touch(self, what: str, tensors: Any, writes: bool = False) -> None:
        """The present lane uses `tensors`."""
        own = self.clock(self.now)
        own[self.now] = own.get(self.now, 0) + 1
        for a in tree_leaves(tensors):
            if not isinstance(a, Tensor) or not _memory(a):
                continue
            place = _memory(a)
            if place not in self.owner:
                self.alive.append(a)
                self.owner[place] = self.now if writes else CALLER
                self.wrote[place] = (self.now, own[self.now]) if writes else (CALLER, 1)
            others = {self.wrote[place][0]: self.wrote[place][1]} | (self.used.get(place, {}) if writes else {})
            for lane, n in others.items():
                if own.get(lane, 0) < n:
                    raise Hazard(f"{what} on lane {self.now} does not wait for lane {lane}")
            if self.owner[place] not in (CALLER, self.now) and (place, self.now) not in self.kept:
                raise Hazard(f"{what} on lane {self.now} uses memory of lane {self.owner[place]} that may be freed")
            self.used.setdefault(place, {})[self.now] = own[self.now]
            if writes:
                self.wrote[place] = (self.now, own[self.now])


def _memory(a: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return a.untyped_storage().data_ptr()


class Operations(TorchFunctionMode):
    """Tells `lanes` of all that torch does."""

    def __init__(self, lanes: Watched) -> None:
        super().__init__()
        self.lanes = lanes

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function))
        if name in _LOOKS:
            return function(*args, **kwargs)
        given = {_memory(a) for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        self.lanes.touch(name, (args, kwargs))
        out = function(*args, **kwargs)
        into = args[0] if name.endswith("_") and not name.endswith("__") else kwargs.get("out")
        fresh = [a for a in tree_leaves(out) if isinstance(a, Tensor) and _memory(a) not in given]
        self.lanes.touch(name, (into, fresh), writes=True)
        return out


class Padded(Cpu):
    """The CPU's engine in the form of the GPU's: batches with `lengths` stay padded, and what is saved of them, too."""

    ragged_layouts = ("padded", "packed")

    def forward(self, call: Call, save: str) -> Result:
        if call.lengths is None:
            return super().forward(call, save)
        y, finals, saved = packing.run(Cpu(), call, save)
        rows = packing.pack_call(call)[0]
        padded = [None if a is None else _rows(rows.unpack, a) for a in saved]
        return Result(y, tuple([a.clone() for a in finals]), Saved(*padded))

    def backward(
        self,
        call: Call,
        saved: Saved,
        y: Tensor,
        dy: Tensor,
        dfinals: tuple[Tensor | None, ...],
        needed: tuple[bool, ...],
        last: bool,
        dc: Tensor | None = None,
        gates: bool = False,
    ) -> Gradients:
        if call.lengths is None:
            return super().backward(call, saved, y, dy, dfinals, needed, last, dc, gates)
        rows, packed = packing.pack_call(call)
        size = (1, y.shape[0] * y.shape[1])
        if packed is None:  # the gradients of the states go through
            zeros = [
                torch.zeros_like(a) if d is None else d.clone() for a, d in zip(call.initial(), dfinals, strict=True)
            ]
            dgates = y.new_zeros(*size, call.cell.dgates * call.hidden)
            m = [None if call.weights[0].w_hr is None else y.new_zeros(*size, n) for n in (call.out, call.hidden)]
            return Gradients(dgates, tuple(zeros[: len(call.states)]), *m, torch.zeros_like(call.x))
        steps = y.shape[:2]
        kept = [None if a is None else torch.stack([rows.pack(b.view(*steps, -1)) for b in a]) for a in saved]
        ends = [None if d is None else rows.sort_live([d])[0] for d in dfinals]
        found = super().backward(
            packed, Saved(*kept), rows.pack(y), rows.pack(dy), tuple(ends), needed, True, None, True
        )
        dgates, dh, m = [None if a is None else _rows(rows.unpack, a) for a in (found.dgates, found.dh, found.m)]
        dstates = rows.unsort(found.dstates, dfinals[: len(call.states)])
        return Gradients(dgates, dstates, dh, m, None if found.dx is None else rows.unpack(found.dx))


def _rows(move: Any, a: Tensor) -> Tensor:
    """(S, N, n) to (S, T * B, n)."""
    return torch.stack([move(b).flatten(0, 1) for b in a])


class Engine(Padded):
    """Tells `lanes` of what it reads without torch, and when."""

    def __init__(self, lanes: Watched, layers: dict[int, int]) -> None:
        self.lanes, self.layers = lanes, layers
        self.seen: dict[tuple[str, int], int] = {}

    part = 1 / 16  # of the GPU, for each of its recurrences

    def share(self, query: Query) -> float:
        return self.part

    def _end(self, way: str, call: Call) -> None:
        layer = self.layers[call.weights[0].w_hh.data_ptr()]
        chunk = self.seen[way, layer] = self.seen.get((way, layer), -1) + 1
        self.lanes.tasks.append((way, layer, chunk, self.lanes.record(self.lanes.now)[1]))

    def forward_after(self, call: Call, save: str, ready: Any) -> Result:
        self.lanes.touch("the input's product", (call.x, call.weights))
        ready()
        self.lanes.touch("the recurrence", (call.states, call.lengths, call.resets))
        result = super().forward(call, save)
        self.lanes.touch("the recurrence's results", (result.y, result.finals, tuple(result.saved)), writes=True)
        self._end("forward", call)
        return result

    def backward(self, call: Call, saved: Saved, y: Tensor, *rest: Any, **options: Any) -> Gradients:
        self.lanes.touch("the recurrence's backward", (tuple(call[1:]), tuple(saved), y, rest))
        found = super().backward(call, saved, y, *rest, **options)
        self.lanes.touch("its results", (found.dgates, found.dstates, found.dx, found.dh), writes=True)
        self._end("backward", call)
        return found


def build(kind: str, dtype: torch.dtype = torch.float64, layers: int = 3, **options: Any) -> Any:
    name, extra = KINDS[kind]
    torch.manual_seed(1)
    extra = {"proj_size": P} if "proj_size" in extra else extra
    return getattr(fastrnn, name)(I, H, layers, dtype=dtype, backend="cpu", **extra, **options)


def inputs(module: Any, dtype: torch.dtype = torch.float64, states: bool = True) -> tuple[Any, Any]:
    torch.manual_seed(2)
    x = torch.randn(T, B, I, dtype=dtype, requires_grad=True)
    return x, random_states(module, B, dtype) if states else None
