"""fastrnn's Triton kernels against torch.nn (cuDNN) on a GPU: `python -m benchmarks.gpu`, `make gpu-bench`.

Every cell of the grid is timed in interleaved rounds, most important first, until the budget is spent: torch.nn and
fastrnn, called and replayed from a CUDA graph. Nothing is timed before both gave the same numbers. Times are of
T steps, host clock around a synchronisation; memory is the allocator's peak above what was there before the call.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from benchmarks import parity
from benchmarks.environment import ROOT, Store, describe
from benchmarks.measure import Call, interleave, summary

HIDDEN = (256, 512, 1024, 128, 64, 768, 160, 192, 640, 2048)  # the most important first
BATCHES = (64, 32, 16, 128, 8, 256, 1)
CELLS = ("LSTM", "GRU", "RNN")
KINDS = {
    "bf16": (torch.bfloat16, False),
    "tf32": (torch.float32, True),
    "fp16": (torch.float16, False),
    "fp32": (torch.float32, False),
}
MODES = ("training", "inference")
FORMS = ("dense", "packed", "bidirectional", "2 layers")


class Cell(NamedTuple):
    """One measurement."""

    cell: str
    kind: str
    H: int
    B: int
    form: str
    mode: str
    T: int

    def __str__(self) -> str:
        return f"{self.cell:5}{self.kind:5} H={self.H:<5}B={self.B:<4}{self.form:14}{self.mode:10}"


def grid(args: argparse.Namespace) -> list[Cell]:
    """The cells in the order in which they are measured."""
    found = []
    for form in args.forms:
        for cell, kind, H, B, mode in itertools.product(args.cells, args.kinds, args.hidden, args.batches, args.modes):
            rank = FORMS.index(form) + CELLS.index(cell) + _place(kind, list(KINDS)) / 2
            rank += _place(H, HIDDEN) / 4 + _place(B, BATCHES) / 4
            found.append((rank, Cell(cell, kind, H, B, form, mode, args.steps)))
    return [cell for _, cell in sorted(found, key=lambda pair: pair[0])]


def _place(value: Any, order: Sequence[Any]) -> int:
    return order.index(value) if value in order else len(order)


def precision(tf32: bool) -> None:
    """TF32 for all products, or for none."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


def side(c: Cell, library: Any, device: str) -> tuple[nn.Module, Call, Callable[[], dict[str, Tensor]]]:
    """A module of nn or fastrnn, a call of it as it is timed, and one that names its results."""
    torch.manual_seed(0)
    dtype = KINDS[c.kind][0]
    layers, both = 2 if c.form == "2 layers" else 1, c.form == "bidirectional"
    module = getattr(nn, c.cell)(c.H, c.H, layers, bidirectional=both)
    if library is fastrnn:
        ours = getattr(fastrnn, c.cell)(c.H, c.H, layers, bidirectional=both, backend="triton")
        ours.load_state_dict(module.state_dict())
        module = ours
    module = module.to(device, dtype)
    torch.manual_seed(1)
    x = torch.randn(c.T, c.B, c.H).to(device, dtype)
    dy = torch.randn(c.T, c.B, c.H * (1 + both)).to(device, dtype)
    given: Any = x
    if c.form == "packed":
        lengths = torch.randint(max(1, c.T // 15), c.T + 1, (c.B,))
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        x, dy = packed.data, torch.randn(len(packed.data), c.H).to(device, dtype)
        given = PackedSequence(x, *packed[1:])
    training = c.mode == "training"
    x.requires_grad_(training)
    wanted = [x, *module.parameters()]

    def call() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(training):
            y = module(given)[0]
        y = y.data if isinstance(y, PackedSequence) else y
        return (y, *torch.autograd.grad(y, wanted, dy)) if training else (y,)

    def observe() -> dict[str, Tensor]:
        y, *grads = call()
        names = ["x", *[name for name, _ in module.named_parameters()]]
        return {"y": y} | {f"grad {name}": g for name, g in zip(names, grads, strict=False)}

    return module, call, observe


def graphed(call: Call) -> Call:
    """`call` as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak(call: Call) -> int:
    """Bytes that the allocator held at most during a call, above those before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(c: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """Times of both sides, called and replayed; parity.Mismatch if their results differ."""
    dtype, tf32 = KINDS[c.kind]
    precision(tf32)
    gpu = args.device == "cuda"
    _, theirs, see_theirs = side(c, nn, args.device)
    module, ours, see_ours = side(c, fastrnn, args.device)
    gate = dtype if dtype is not torch.float32 or not tf32 else torch.float16  # TF32 rounds as coarsely
    errors = parity.check(see_theirs(), see_ours(), gate)
    calls = {"torch.nn": theirs, "fastrnn": ours}
    record = {"kind": "measurement", **c._asdict(), "parity": max(errors.values())}
    if gpu:
        record["peak"] = {name: peak(call) for name, call in calls.items()}
        for name in list(calls):
            try:
                calls[f"{name} graph"] = graphed(calls[name])
            except RuntimeError as error:  # cuDNN has calls that cannot be captured
                record[f"{name} graph"] = str(error).splitlines()[0]

    def clock() -> float:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    samples = interleave(list(calls.values()), args.sample, 3, clock=clock)
    record["seconds"] = {name: summary(taken) for name, taken in zip(calls, samples, strict=True)}
    record["plan"] = fastrnn.backends.BACKENDS["triton"].how(module._prepare(_like(c, args), None, None, None).query)
    return record


def _like(c: Cell, args: argparse.Namespace) -> Tensor:
    return torch.empty(c.T, c.B, c.H, dtype=KINDS[c.kind][0], device=args.device)


def line(r: dict[str, Any]) -> str:
    """Microseconds a step, and how much faster fastrnn is than torch.nn: called, and replayed."""
    c, t = Cell(*[r[f] for f in Cell._fields]), {k: v["p50"] for k, v in r["seconds"].items()}
    steps = "".join(f"{name} {1e6 * s / c.T:.2f}  " for name, s in t.items())
    ratio = t["torch.nn"] / t["fastrnn"]
    graph = t.get("torch.nn graph", 0) / t["fastrnn graph"] if "fastrnn graph" in t else 0
    memory = f"  memory {r['peak']['fastrnn'] / max(1, r['peak']['torch.nn']):.2f}" if "peak" in r else ""
    replayed = f", replayed {graph:.2f}" if graph else ""
    return f"{c}us a step: {steps} called {ratio:.2f}{replayed}{memory}  {r['plan'].partition(',')[0]}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=480, help="seconds for everything (%(default)s)")
    parser.add_argument("--sample", type=float, default=0.3, help="seconds of samples per measurement (%(default)s)")
    parser.add_argument("--steps", type=int, default=512, metavar="T")
    parser.add_argument("--hidden", type=int, nargs="+", default=list(HIDDEN), metavar="H")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), metavar="B")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal in the interpreter")
    parser.add_argument("--save", action="store_true", help="keep the records in benchmarks/results/<gpu>/")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    start, failures = time.monotonic(), 0
    environment = describe(fastrnn, "benchmarks.gpu")
    name = torch.cuda.get_device_name() if args.device == "cuda" else "rehearsal"
    folder = ROOT / "results" / "-".join(name.lower().split())
    store = Store(folder / f"triton-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.jsonl" if args.save else None)
    store.add({**environment, "gpu": name, "cudnn": torch.backends.cudnn.version()})
    cells = grid(args)
    for done, c in enumerate(cells):
        if time.monotonic() - start > args.budget:
            print(f"budget spent: {done} of {len(cells)} measured")
            break
        try:
            record = measure(c, args)
            print(line(record), flush=True)
        except Exception as error:  # one cell must not end the run; the exit status tells
            failures += 1
            record = {"kind": "failure", **c._asdict(), "message": f"{type(error).__name__}: {error}"}
            print(f"{c}FAILED {record['message'].splitlines()[0]}", flush=True)
        store.add(record)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
