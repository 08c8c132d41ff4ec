"""Other ways to run the same recurrence: what a user might pick instead of fastrnn.

A peer passes the parity gate with what it gives: all that torch.nn gives, or y, and in training the gradient of x that
has come through every step. A capture as CUDA graph is a peer of its own.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

import fastrnn
from fastrnn.backends import BACKENDS
from fastrnn.bench import adapters
from fastrnn.bench.adapters import DTYPES, Absent, plain_weights, subject
from fastrnn.bench.grids import Job
from fastrnn.bench.subjects import Subject, build, make_input
from fastrnn.cells import CELLS


class Peer(NamedTuple):
    """A way to run the recurrence of torch.nn's module `sides["torch.nn"]`."""

    name: str
    make: Callable[[Job, dict[str, Subject]], Subject]
    package: str = ""  # to import, if it is somebody else's
    cuda_only: bool = False
    slow: bool = False  # takes long in each case: only where it is asked for

    def why_absent(self, device: str) -> str | None:
        """Why it can run nothing here, or None."""
        if self.package and importlib.util.find_spec(self.package.partition(".")[0]) is None:
            return f"{self.package} is not installed"
        if self.cuda_only and device != "cuda":
            return "runs on a CUDA device only"
        return None


def table(device: str, names: tuple[str, ...] | None = None) -> list[tuple[str, str]]:
    """Each peer, and "runs", its version, or why it does not run."""
    rows = []
    for peer in PEERS:
        why = peer.why_absent(device)
        if why is None and names is not None and peer.name not in names:
            why = f"not asked for: --peers {peer.name}"
        rows.append((peer.name, f"absent: {why}" if why else f"there{_version(peer.package)}"))
    return rows


def _version(package: str) -> str:
    if not package:
        return ""
    try:
        return f", version {importlib.metadata.version(package.partition('.')[0])}"
    except importlib.metadata.PackageNotFoundError:
        return ", version unknown"


def default(device: str) -> tuple[str, ...]:
    """Those that are there and do not take long."""
    return tuple(p.name for p in PEERS if not p.slow and p.why_absent(device) is None)


# CUDA graphs


def graphed(job: Job, sides: dict[str, Subject], name: str) -> Subject:
    """`sides[name]` as the replay of a CUDA graph, which writes where the captured call has written."""
    side = sides[name]
    try:
        replay, returned = capture(side.iterate)
    except RuntimeError as error:  # cuDNN has calls that cannot be captured
        # A call that fails ends the capture, which then fails, too, and tells nothing of the cause.
        cause = error.__context__ or error
        raise Absent(f"cannot be captured: {next(iter(str(cause).splitlines()), type(cause).__name__)}") from None
    return Subject(side.module, replay, lambda _: side.read(returned), side.arguments, side.keywords)


def capture(call: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """A replay of `call` as a CUDA graph, and what the captured call has returned."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    before = torch.cuda.current_stream()
    before.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            returned = call()
    except RuntimeError:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own stream in place
        raise
    return graph.replay, returned


# fastrnn's own backends, and a loop that torch.compile makes


def by_backend(job: Job, sides: dict[str, Subject], backend: str) -> Subject:
    side = build(job.case, job.cell, job.mode, DTYPES[job.dtype], fastrnn, job.device, backend)
    try:
        with torch.set_grad_enabled(job.mode != "inference"):
            fastrnn.backends.choose(query_of(side), backend)
    except RuntimeError as error:
        raise Absent(str(error)) from None
    return side


def query_of(side: Subject) -> Any:
    """What the choice of a backend for this side's call depends on."""
    module: Any = side.module
    return module._prepare(*_four(side.arguments, side.keywords or {})).query


def _four(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    return arguments[0], arguments[1] if len(arguments) > 1 else None, keywords.get("lengths"), keywords.get("resets")


def compiled_loop(job: Job, sides: dict[str, Subject]) -> Subject:
    """One product for the input of all steps, then a loop in Python over a step that torch.compile has made."""
    w = plain_weights(job, sides)
    cell = CELLS[{"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}[job.cell]]
    step = _compiled_step(cell.name)
    x = make_input(job.case, DTYPES[job.dtype], job.device)

    def call() -> Tensor:
        states = tuple([x.new_zeros(job.case.B, job.case.H) for _ in range(cell.states)])
        xg = linear(x, w.w_ih, w.b_ih)
        y = []
        for t in range(job.case.T):
            states = step(xg[t], states, w.w_hh, w.b_hh)
            y.append(states[0])
        return torch.stack(y)

    return subject(job, sides, call, x, w._asdict())


@functools.lru_cache(maxsize=8)
def _compiled_step(name: str) -> Callable[..., Any]:
    cell = CELLS[name]

    def step(xg: Tensor, states: tuple[Tensor, ...], w_hh: Tensor, b_hh: Tensor) -> Any:
        r = linear(states[0], w_hh, b_hh).chunk(cell.gates, -1)
        return cell.step(xg.chunk(cell.gates, -1), r, states, (), torch.sigmoid, torch.tanh, torch.where)[0]

    return torch.compile(step, dynamic=False)


PEERS: tuple[Peer, ...] = (
    Peer("torch.nn graph", functools.partial(graphed, name="torch.nn"), cuda_only=True),
    Peer("fastrnn graph", functools.partial(graphed, name="fastrnn"), cuda_only=True),
    *(Peer(f"fastrnn {b}", functools.partial(by_backend, backend=b), slow=True) for b in BACKENDS),
    Peer("compiled loop", compiled_loop, slow=True),
    Peer("FlashRNN", adapters.flashrnn, "flashrnn", cuda_only=True),
    Peer("Haste", adapters.haste, "haste_pytorch", cuda_only=True),
    Peer("TorchRL", adapters.torchrl, "torchrl", cuda_only=True),
    Peer("XMA", adapters.xma, "xma", cuda_only=True),
)
