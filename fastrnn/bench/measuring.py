"""One measurement: built, compared, and only then timed. The same core for CPUs and GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

from fastrnn.bench import apart, energy, memory, parity, peers, roofline
from fastrnn.bench.adapters import DTYPES, Absent
from fastrnn.bench.environment import keep_freed_memory
from fastrnn.bench.grids import Job
from fastrnn.bench.measure import blocks, compare_all, gemm_rate, quantile
from fastrnn.bench.shapes import GATES
from fastrnn.bench.subjects import Subject, build, pair

LARGE_BATCH = 16  # from here on the share of the matrix product's rate is reported
PEER_FAILURES = (parity.Mismatch, RuntimeError, ValueError, TypeError, AssertionError, AttributeError, ImportError)


@dataclass
class Options:
    """How to measure."""

    library: ModuleType
    backend: str = "auto"
    sample: float = 0.3  # seconds of samples per measurement
    rounds: int = 5
    peers: tuple[str, ...] = ()
    kernels: bool = False
    meter: energy.Meter | None = None
    facts: dict[str, Any] | None = None  # of the GPU
    compare: Callable[..., dict[str, Any]] = field(default=compare_all)
    apart: bool = False  # times of a CPU in a fresh process each
    keep: bool = False  # malloc, there
    bounded: bool = True  # with the roofline's bound


@contextlib.contextmanager
def settings(job: Job, options: Options) -> Iterator[None]:
    """torch's threads and precision, autograd's mode and fastrnn's backend; as before afterwards."""
    threads = torch.get_num_threads()
    products, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    if job.threads:
        torch.set_num_threads(job.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = job.dtype == "tf32"
    try:
        with contextlib.ExitStack() as stack:
            if options.library is not nn:
                stack.enter_context(options.library.backend(options.backend))
            if job.mode == "inference":
                stack.enter_context(torch.inference_mode())
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, cudnn


def finish(job: Job) -> None:
    """Wait for the device."""
    if job.device == "cuda":
        torch.cuda.synchronize()


def clock(job: Job) -> float:
    finish(job)
    return time.perf_counter()


def timing(job: Job, options: Options) -> dict[str, Any]:
    """Times of torch.nn, fastrnn and the peers, behind the parity gate; parity.Mismatch if ours differs."""
    dtype = DTYPES[job.dtype]
    with settings(job, options):
        baseline, subject = pair(job.case, job.cell, job.mode, dtype, options.library, job.device)
        expected = baseline.observe()
        errors = parity.check(expected, subject.observe(), gate_of(job))
        sides = {"torch.nn": baseline, "fastrnn": subject}
        others, absent = _others(job, options, sides, expected)
        record = {
            "kind": "measurement",
            **job.key(),
            **job.shape(),
            "backend": options.backend,
            "chosen": chosen(job, options, subject),
            "parity": max(errors.values()),
            "flops": job.case.flops(job.cell, job.mode),
            "gemm": gemm_rate(dtype) if job.device == "cpu" and job.case.B >= LARGE_BATCH else None,
        }
        calls = {name: side.iterate for name, side in {**sides, **others}.items()}
        record |= options.compare(calls, options.sample, options.rounds, clock=lambda: clock(job))
        for name, reason in absent.items():
            record["peers"][name] = {"absent": reason}
        record["bound"] = bound(job, options, record) if options.bounded else None
        record |= _extras(job, options, sides)
    return record


def gate_of(job: Job) -> torch.dtype:
    """The type whose tolerance holds: TF32 rounds as coarsely as fp16."""
    return torch.float16 if job.dtype == "tf32" else DTYPES[job.dtype]


def _others(
    job: Job, options: Options, sides: dict[str, Subject], expected: dict[str, Any]
) -> tuple[dict[str, Subject], dict[str, str]]:
    """The peers that gave torch.nn's numbers, and why others did not."""
    there, absent = {}, {}
    for peer in (p for p in peers.PEERS if p.name in options.peers):
        why = peer.why_absent(job.device)
        if why is None:
            try:
                side = peer.make(job, sides)
                seen = side.observe()
                parity.check({name: expected[name] for name in seen}, seen, gate_of(job))
            except Absent as reason:
                why = str(reason)
            except PEER_FAILURES as error:  # a peer's fault must not end the run; the record tells
                why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            else:
                there[peer.name] = side
                continue
        absent[peer.name] = why
    return there, absent


def chosen(job: Job, options: Options, subject: Subject) -> str:
    """The backend that the subject's first layer runs on, and on a GPU how."""
    if options.library is nn:
        return "torch.nn"
    with contextlib.redirect_stdout(io.StringIO()):
        choice = options.library.explain(subject.module, *subject.arguments, **(subject.keywords or {}))
    return str(choice.backend.name) if job.device == "cpu" else f"{choice.backend.name}: {choice.reason}"


def bound(job: Job, options: Options, record: dict[str, Any]) -> dict[str, Any] | None:
    """The roofline's seconds, what they are for, and the share of them in our time and torch.nn's."""
    machine = roofline.cpu(job.dtype) if job.device == "cpu" else roofline.gpu(job.dtype, options.facts or {})
    if machine is None:
        return None
    least = roofline.bound(job.case, job.cell, job.mode, job.dtype, machine)
    shares = {side: least.seconds / record[side]["p50"] for side in ("baseline", "subject")}
    weights = GATES[job.cell] * job.case.H**2 * roofline.BYTES[job.dtype]
    rates = {"flops": machine.flops, "read": machine.read(weights), "memory": machine.memory}
    return {"seconds": least.seconds, "limit": least.limit, "parts": least.parts, "rates": rates, "share": shares}


def _extras(job: Job, options: Options, sides: dict[str, Subject]) -> dict[str, Any]:
    """Names of kernels, and joules."""
    found: dict[str, Any] = {}
    if options.kernels:
        found["kernels"] = {name: kernels(job, side.iterate) for name, side in sides.items()}
    if options.meter is not None:
        spent = {name: options.meter.joules(side.iterate, lambda: finish(job)) for name, side in sides.items()}
        found["joules"] = spent
    return found


def kernels(job: Job, call: Callable[[], Any], most: int = 6) -> list[str]:
    """What took the most time of an iteration, by torch's profiler: kernels of a GPU, or operators of a CPU."""
    from torch.profiler import ProfilerActivity, profile

    gpu = job.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU], acc_events=True) as seen:
        call()
        finish(job)
    time_of = "self_device_time_total" if gpu else "self_cpu_time_total"
    events = sorted(seen.key_averages(), key=lambda e: -getattr(e, time_of))
    return [str(e.key) for e in events[:most] if getattr(e, time_of) > 0]


def latency(job: Job, options: Options) -> dict[str, Any]:
    """Seconds of single steps whose state goes on from one to the next, as in streaming: p50 and p99 of both sides."""
    dtype = DTYPES[job.dtype]
    with settings(job, options):
        sides = pair(job.case, job.cell, job.mode, dtype, options.library, job.device)
        parity.check(sides[0].observe(), sides[1].observe(), gate_of(job))
        steps = [_stream(side) for side in sides]
        times = blocks(steps, options.sample, clock=lambda: clock(job))
    record = {"kind": "latency", **job.key(), **job.shape(), "steps": len(times[0])}
    for side, taken in zip(("baseline", "subject"), times, strict=True):
        record[side] = {"p50": quantile(taken, 0.5), "p99": quantile(taken, 0.99)}
    return record


def _stream(side: Subject) -> Callable[[], None]:
    module, x = side.module, side.arguments[0]
    single = isinstance(module, (nn.LSTMCell, nn.GRUCell, nn.RNNCell)) or type(module).__name__.endswith("Cell")
    state: list[Any] = [side.arguments[1] if len(side.arguments) > 1 else None]

    def step() -> None:
        out = module(x, state[0])
        state[0] = out if single else out[1]

    return step


def peak_memory(job: Job, options: Options) -> dict[str, Any]:
    """Bytes that training adds at its peak, of both sides."""
    names = ("torch.nn", options.library.__name__)
    if job.device == "cpu":
        dtype = DTYPES[job.dtype]
        found = [memory.peak(job.case, job.cell, dtype, name, options.backend, job.threads) for name in names]
    else:
        found = [_peak_on_gpu(job, options, library) for library in (nn, options.library)]
    return {"kind": "memory", **job.key(), **job.shape(), "baseline": found[0], "subject": found[1]}


def _peak_on_gpu(job: Job, options: Options, library: Any) -> int:
    """Bytes that the allocator held at most during a call, above those before it."""
    with settings(job, options):
        side = build(job.case, job.cell, job.mode, DTYPES[job.dtype], library, job.device)
        side.iterate()
        gc.collect()  # what is freed only during the call would be taken off its peak
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side.iterate()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)


def measure(job: Job, options: Options) -> dict[str, Any]:
    """The record of `job`, from a process of its own if that is asked for; memory on a CPU always has its own."""
    if not options.apart or job.device != "cpu" or job.what == "memory":
        return MEASURE[job.what](job, options)
    here = options.library.__name__, str(options.library.__file__)
    there = dataclasses.replace(options, library=cast(ModuleType, None), bounded=False, meter=None)
    record: dict[str, Any] = apart.call(_there, job, there, *here, options.meter is not None)
    if job.what == "timing":
        with settings(job, options):  # here, where the machine's rates are measured once
            record["bound"] = bound(job, options, record)
    return record


def _there(job: Job, options: Options, library: str, file: str, metered: bool) -> dict[str, Any]:
    found = import_module(library)
    if found.__file__ != file:
        raise RuntimeError(f"the measuring process found {found.__file__}, not {file}: start in another folder")
    if options.keep:
        keep_freed_memory()
    meter = energy.meter("cpu") if metered else None
    return MEASURE[job.what](job, dataclasses.replace(options, library=found, meter=meter))


MEASURE: dict[str, Callable[[Job, Options], dict[str, Any]]] = {
    "timing": timing,
    "latency": latency,
    "memory": peak_memory,
}
