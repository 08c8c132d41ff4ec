"""The backends, and the choice among them.

A backend that is asked for by name runs or raises with the reason. `auto` walks down a short list
and takes the first that can run; `Choice.reason` says why.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.compiler import is_compiling

from fastrnn.backends.base import Backend, Query
from fastrnn.backends.cpu import Cpu
from fastrnn.backends.cuda import Cuda
from fastrnn.backends.native import NATIVE
from fastrnn.backends.reference import REFERENCE
from fastrnn.backends.triton import Triton
from fastrnn.cells import CELLS
from fastrnn.ordinary import constant_when_compiled

BACKENDS: dict[str, Backend] = {b.name: b for b in (Cpu(), Cuda(), Triton(), NATIVE, REFERENCE)}
NAMES = ("auto", *BACKENDS)

# Twice: torch.compile cannot look into a ContextVar, but notices when a global of a module has changed.
_requested_last = "auto"
_requested: contextvars.ContextVar[str] = contextvars.ContextVar("fastrnn_backend", default="auto")


class Choice(NamedTuple):
    """A backend and why it was taken."""

    backend: Backend
    reason: str


def check_name(name: str) -> str:
    """`name` if it is a backend's; ValueError otherwise."""
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within this context, modules whose own `backend` is "auto" run on the backend `name`.

    It holds for the thread (or asyncio task) that enters it, and not for others that this one starts; code
    compiled by torch.compile goes by the latest that any thread has entered.
    """
    global _requested_last
    token, before = _requested.set(check_name(name)), _requested_last
    _requested_last = name
    try:
        yield
    finally:
        _requested.reset(token)
        _requested_last = before


def requested(name: str) -> str:
    """The backend asked for by a module whose own is `name`, and by the context that it runs in."""
    return name if name != "auto" else _requested.get()


def choose(query: Query, backend: str = "auto") -> Choice:
    """The backend for `query`: the one asked for, or the first of auto's list that can run it.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the backend asked for by name cannot run the call.
    """
    if is_compiling() or type(query.T + query.B) is not int:  # sizes may be unknown: no rule may depend on them
        name = backend if backend != "auto" else _requested_last
        fixed = (query.dtype, 1, 1, *query[5:])
        return Choice(BACKENDS[_name_of(name, query.cell, query.device, *fixed)], "chosen when compiled")
    return _choose(query, requested(backend), _settings(query))


@constant_when_compiled
def _name_of(name: str, *query: Any) -> str:
    return _choose(Query(*query), name, _settings(Query(*query))).backend.name


def _settings(query: Query) -> Any:
    return None if query.device == "cpu" else tuple([b.settings(query) for b in BACKENDS.values()])


def steps_natively(cell: str, batch: int, hidden: int) -> bool:
    """Is torch.nn's kernel the faster one at training a cell on the CPU, a step at a time?

    Measured at 1 and 2 threads, H from 16 to 512, B from 1 to 64 (times of torch.nn over the engine's). LSTM and GRU
    gain (1.0 to 2.0) but where the weights are large and the rows not few, for these are packed anew at every step
    (0.8 to 1.0). The RNN's step is two small products: up to 4 rows it is even or gains (0.95 to 1.4), beyond that it
    does not (0.86 to 1.0).
    """
    return batch > 4 if cell.startswith("rnn") else batch > 12 and hidden > 192


@functools.lru_cache(maxsize=4096)
def _choose(query: Query, name: str, settings: Any) -> Choice:
    # Remembered, because one call of a small module takes no longer than this walk. `clear_choices` forgets.
    # `settings` is part of the key alone.
    if name != "auto":
        why_not = unsupported(BACKENDS[check_name(name)], query)
        if why_not is not None:
            raise RuntimeError(f"backend {name!r} cannot run this call: {why_not}")
        return Choice(BACKENDS[name], f"asked for by name: {BACKENDS[name].how(query)}")
    if query.step and query.device == "cpu" and BACKENDS["native"].unsupported(query) is None:
        if query.cast:
            return Choice(BACKENDS["native"], "native: casts the weights once for all steps under autocast")
        if query.grad and steps_natively(query.cell, query.B, query.H):
            return Choice(BACKENDS["native"], "native: measured to be faster at training single steps of this size")
    skipped: list[str] = []
    for candidate in BACKENDS.values():
        why_not = unsupported(candidate, query) or candidate.passed_over(query)
        if why_not is None:
            return Choice(candidate, "; ".join([*skipped, f"{candidate.name}: {candidate.how(query)}"]))
        skipped.append(f"{candidate.name}: {why_not}")
    raise AssertionError("unreachable: the reference runs everything")


def unsupported(candidate: Backend, query: Query) -> str | None:
    """Why `candidate` cannot run `query`, or None if it can."""
    if CELLS[query.cell].params and not candidate.takes_params:
        return "it takes no cells with per-unit parameters, such as peepholes"
    return candidate.unsupported(query)


def clear_choices() -> None:
    """Forget choices made: needed only when something that a backend's rules read has changed."""
    _choose.cache_clear()
