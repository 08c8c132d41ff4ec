"""A model of a case's time: its products at the machine's rate, its bytes at the memory's, its steps in turn.

    bound = input and output + sum over the parts of max(flops / rate, bytes / bandwidth) + steps * wait

The parts are the GEMM of the input, the recurrent product of each step (forward and, in training, backward), and the
GEMMs of the gradients. A step waits for the one before it: its product of B rows takes its flops at the rate of a large
GEMM, or one reading of W_hh, whichever is longer. `share` is bound over time: what the model explains of it.

It is no lower bound: parts, layers, directions, and the reading of x and writing of y are summed as if nothing of one
ran beside another, so that who overlaps them can come below it; and elementwise work, the tape and autograd are left
out, so that 1 may be out of reach.

Of a CPU both rates are measured on the machine, beside the measurement: torch.mm, and the faster of two loops that do
nothing but read (memchr of the C library, and torch.sum) on a memory of W_hh's size; n threads are taken to read n
times as fast as one reads its share. Of a GPU the rates are its data sheet's, that of L2 and the waits of a step are
assumptions; W_hh is read once if registers and shared memory can hold it.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastrnn.bench.shapes import GATES, Case

BYTES = {"float64": 8, "float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}


class Part(NamedTuple):
    """`times` equal pieces of work that wait for one another, or one for all steps."""

    name: str
    times: int
    flops: float  # of each
    bytes: float  # of weights, of each
    resident: bool = False  # the same weights at every step


@dataclass(frozen=True)
class Machine:
    """What the bound is reckoned with."""

    flops: float  # per second, in large products
    read: Callable[[float], float]  # bytes/s at which weights of this many bytes are read again and again
    memory: float  # bytes/s of inputs and outputs
    wait: Callable[[float], float] = lambda size: 0.0  # seconds between two steps, by the bytes of W_hh
    holds: float = 0.0  # bytes of weights that stay where the products are made


class Bound(NamedTuple):
    """The model's seconds, and what most of them are for: "products", "weights", "waiting" or "input and output"."""

    seconds: float
    limit: str
    parts: dict[str, float]


def parts(case: Case, cell: str, mode: str, size: int) -> list[Part]:
    """The work of one iteration in a type of `size` bytes."""
    directions, gates = 2 if case.bidirectional else 1, GATES[cell]
    rows, found = case.tokens / case.T, []
    for layer in range(case.layers):
        width = case.I if layer == 0 else directions * case.H
        wide, square = gates * case.H * width, gates * case.H * case.H
        for _ in range(directions):
            entire = 2.0 * case.tokens * wide
            found.append(Part("input", 1, entire, wide * size))
            step = Part("recurrence", case.T, 2.0 * rows * square, square * size, True)
            found.append(step)
            if mode == "training":
                found.append(step._replace(name="recurrence, backward"))
                found += [Part("dx", 1, entire, wide * size), Part("dW", 1, entire, wide * size)]
                found.append(Part("dR", 1, 2.0 * case.tokens * square, square * size))
    return found


def traffic(case: Case, mode: str, size: int) -> float:
    """Bytes of x and y, and in training of their gradients."""
    directions = 2 if case.bidirectional else 1
    values = case.tokens * (case.I + case.H * directions)
    return float(values * size * (2 if mode == "training" else 1))


def bound(case: Case, cell: str, mode: str, dtype: str, machine: Machine) -> Bound:
    """The model's time of one iteration on `machine`. Layers and directions are taken to run one after another."""
    seconds = {"products": 0.0, "weights": 0.0, "waiting": 0.0}
    for part in parts(case, cell, mode, BYTES[dtype]):
        products = part.flops / machine.flops
        stays = part.resident and part.bytes <= machine.holds
        weights = part.bytes / machine.read(part.bytes) / (part.times if stays else 1)
        seconds["products" if products >= weights else "weights"] += part.times * max(products, weights)
        if part.resident:
            seconds["waiting"] += part.times * machine.wait(part.bytes)
    seconds["input and output"] = traffic(case, mode, BYTES[dtype]) / machine.memory
    return Bound(sum(seconds.values()), max(seconds, key=lambda name: seconds[name]), seconds)


# The CPU: measured


def cpu(dtype: str) -> Machine:
    """This machine with torch's present number of threads. The rates are measured once in a process, in 0.2 seconds."""
    threads = torch.get_num_threads()
    flops = _gemm(getattr(torch, "float32" if dtype == "tf32" else dtype), threads)

    def read(size: float) -> float:
        return threads * _read(_rounded(size / threads))

    return Machine(flops, read, threads * _read(_MEMORY))


_MEMORY = 1 << 26  # bytes: beyond the caches of a core


@functools.lru_cache(maxsize=16)
def _gemm(dtype: torch.dtype, threads: int, size: int = 768) -> float:
    """FLOP/s of torch.mm on square matrices, of the fastest call."""
    a, b, out = (torch.randn(size, size).to(dtype) for _ in range(3))
    with torch.inference_mode():
        return 2.0 * size**3 / _fastest(lambda: torch.mm(a, b, out=out), 0.2)


def _rounded(size: float) -> int:
    """A power of two near `size`, so that few sizes are measured; the caches' steps are coarser."""
    return int(2 ** round(math.log2(min(max(size, 1 << 16), _MEMORY))))


@functools.lru_cache(maxsize=32)
def _read(size: int) -> float:
    """Bytes/s of one thread that reads `size` bytes, of the faster loop; the call's own time is not counted."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        memory, little = torch.zeros(size // 4), torch.zeros(16)
        loops: list[Callable[[torch.Tensor], Any]] = [torch.sum]
        if sys.platform != "win32":
            loops.append(_memchr)
        best = 0.0
        for loop in loops:
            whole = _fastest(lambda f=loop: f(memory))  # type: ignore[misc]
            call = _fastest(lambda f=loop: f(little))  # type: ignore[misc]
            best = max(best, size / max(whole - call, whole / 4))  # by no more than a factor of four: clocks jitter
        return best
    finally:
        torch.set_num_threads(before)


def _memchr(a: torch.Tensor) -> Any:
    """Look for a byte that is not there."""
    return _libc().memchr(a.data_ptr(), 1, a.numel() * 4)


@functools.lru_cache(maxsize=1)
def _libc() -> Any:
    libc = ctypes.CDLL(None)
    libc.memchr.argtypes, libc.memchr.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    return libc


def _fastest(call: Callable[[], Any], seconds: float = 0.02) -> float:
    """Seconds of the fastest call within `seconds`, five calls at least."""
    best, calls, start = math.inf, 0, time.perf_counter()
    while calls < 5 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - before)
        calls += 1
    return best


# GPUs: from what their makers say


class Sheet(NamedTuple):
    """Of a data sheet: TFLOP/s of dense products that add up in fp32, GB/s of memory, MHz of the boost clock."""

    half: float  # bf16 and fp16
    tf32: float
    fp32: float
    memory: float
    clock: float


_A100 = Sheet(312, 156, 19.5, 1555, 1410)
_H100 = Sheet(989.4, 494.7, 66.9, 3350, 1980)
_H100_NVL = Sheet(835.5, 417.5, 60, 3900, 1785)
# NVIDIA's data sheets, dense where they give sparse figures. By the driver's whole name without NVIDIA: a part of it is
# not enough, since RTX 4090 D, A10G, GH200 or a MIG slice of an A100 are other devices.
DEVICES = {
    "A100-SXM4-40GB": _A100,
    "A100-PCIE-40GB": _A100,
    "A100-SXM4-80GB": _A100._replace(memory=2039),
    "A100 80GB PCIe": _A100._replace(memory=1935),
    "H100 80GB HBM3": _H100,
    "H100 PCIe": Sheet(756, 378, 51.2, 2000, 1755),
    "H100 NVL": _H100_NVL,
    "H200": _H100._replace(memory=4800),
    "H200 NVL": _H100_NVL._replace(memory=4800),
    "B200": Sheet(2250, 1125, 75, 8000, 1965),
    "L4": Sheet(121, 60.5, 30.3, 300, 2040),
    "L40S": Sheet(362, 183, 91.6, 864, 2520),
    "A10": Sheet(125, 62.5, 31.2, 600, 1695),
    "GeForce RTX 4090": Sheet(165.2, 82.6, 82.6, 1008, 2520),
}
L2_BYTES = 64  # assumed: a clock and multiprocessor, from L2
ON_CHIP = 256 << 10  # bytes of registers of a multiprocessor, and about as many of shared memory
WAITS = (1e-7, 3.5e-7, 7e-7)  # assumed: within a multiprocessor; a cluster of up to 16; through L2
CLUSTER = 16


def sheet(name: str) -> Sheet | None:
    """That of a GPU by the driver's name."""
    return DEVICES.get(" ".join(name.split()).removeprefix("NVIDIA "))


def unknown(dtype: str, facts: dict[str, Any]) -> str | None:
    """Why there is no bound for a type on the GPU of `facts`; None if there is one."""
    if sheet(facts["name"]) is None:
        return f"the data sheet of {facts['name']} is not in fastrnn.bench.roofline"
    return f"the rate of {dtype} is not in fastrnn.bench.roofline" if dtype == "float64" else None


def gpu(dtype: str, facts: dict[str, Any]) -> Machine | None:
    """The GPU of `facts` (fastrnn.bench.environment.gpu), or None where `unknown` tells why."""
    found = sheet(facts["name"])
    if found is None or unknown(dtype, facts):
        return None
    count = facts["multiprocessors"]

    def wait(size: float) -> float:
        needed = size / (ON_CHIP * 1.5)
        return WAITS[0] if needed <= 1 else WAITS[1] if needed <= CLUSTER else WAITS[2]

    return Machine(
        flops=1e12 * {"tf32": found.tf32, "float32": found.fp32}.get(dtype, found.half),
        read=lambda size: L2_BYTES * found.clock * 1e6 * count,
        memory=found.memory * 1e9,
        wait=wait,
        holds=1.5 * ON_CHIP * count,
    )
