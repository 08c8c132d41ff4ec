"""What the benchmark suite does on a GPU only: waiting, peak memory, names of kernels, flags; against stand-ins."""

import gc
from types import SimpleNamespace

import pytest
import torch
import torch.profiler
from bench_support import STEP, OtherLibrary, options
from torch import nn

from fastrnn.bench import measuring, run
from fastrnn.bench.grids import Job
from fastrnn.bench.subjects import Subject


def job(device="cuda", what="memory"):
    return Job(what, STEP, "LSTM", "training", "float32", device, 0 if device == "cuda" else 1)


class Allocator:
    """torch's allocator of a GPU on which work is done only when it is waited for."""

    def __init__(self, monkeypatch):
        self.now = self.peak = 0
        self.queue = []
        self.waits = 0
        for name, stand_in in {
            "synchronize": self.synchronize,
            "memory_allocated": lambda: self.now,
            "max_memory_allocated": lambda: self.peak,
            "reset_peak_memory_stats": lambda: setattr(self, "peak", self.now),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def synchronize(self):
        self.waits += 1
        while self.queue:
            self.take(self.queue.pop(0))

    def take(self, amount):
        self.now += amount
        self.peak = max(self.peak, self.now)


@pytest.fixture
def allocator(monkeypatch):
    return Allocator(monkeypatch)


def test_waiting_is_for_a_gpu_only(allocator):
    allocator.queue = [5]
    measuring.finish(job("cpu"))
    assert (allocator.now, allocator.waits) == (0, 0)
    measuring.finish(job())
    assert (allocator.now, allocator.waits) == (5, 1)
    allocator.queue = [2]
    assert measuring.clock(job()) > 0
    assert allocator.now == 7


class Circle:
    """Memory that only the collector of cycles gives back."""

    def __init__(self, allocator, amount):
        self.allocator, self.amount, self.me = allocator, amount, self
        allocator.take(amount)

    def __del__(self):
        self.allocator.take(-self.amount)


def test_peak_memory_is_what_one_call_adds(allocator, monkeypatch):
    """Not what the module holds, nor what a first call keeps, was at its peak, or has left to the collector."""
    adds, library = {nn: 1000, "other": 300}, OtherLibrary()
    built = []

    def build(case, cell, mode, dtype, of, device):
        built.append((case, cell, mode, dtype, of, device))
        allocator.take(50_000)  # weights and input
        calls = []

        def iterate():
            gc.collect()
            if not calls:
                Circle(allocator, 40)
                allocator.queue += [9000, -9000, 70]  # the search for an algorithm, a workspace that stays
            calls.append(None)
            amount = adds[nn if of is nn else "other"]
            allocator.queue += [amount, -amount]

        return Subject(None, iterate, None)

    monkeypatch.setattr(measuring, "build", build)
    record = measuring.peak_memory(job(), options(library, backend="triton"))
    assert (record["baseline"], record["subject"]) == (1000, 300)
    assert built == [(STEP, "LSTM", "training", torch.float32, of, "cuda") for of in (nn, library)]
    assert library.requested == ["triton"] * 2
    assert record["kind"] == "memory"
    assert record["device"] == "cuda"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_kernels_are_those_that_took_the_most_time_of_the_device(allocator, monkeypatch, device):
    order = []

    class Profile:
        def __init__(self, activities, acc_events):
            order.append([a.name for a in activities])

        def __enter__(self):
            order.append("on")
            return self

        def __exit__(self, *_):
            order.append(f"off, queue {allocator.queue}")

        def key_averages(self):
            on_gpu, on_cpu = (3, 0, 9, 1, 2, 4, 5, 6), (1, 9, 0, 8, 7, 6, 5, 4)
            return [
                SimpleNamespace(key=f"k{n}", self_device_time_total=gpu, self_cpu_time_total=cpu)
                for n, (gpu, cpu) in enumerate(zip(on_gpu, on_cpu, strict=True))
            ]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    gpu = device == "cuda"
    found = measuring.kernels(job(device), lambda: order.append("called") or allocator.queue.append(1))
    assert found == (["k2", "k7", "k6", "k5", "k0", "k4"] if gpu else ["k1", "k3", "k4", "k5", "k6", "k7"])
    assert order == [["CUDA" if gpu else "CPU"], "on", "called", "off, queue []" if gpu else "off, queue [1]"]
    assert "k1" not in measuring.kernels(job(), lambda: None, most=8)  # it has run on the processor alone


def test_a_kernel_that_gave_up_in_a_measurement_is_a_failure(monkeypatch):
    monkeypatch.setitem(measuring.MEASURE, "latency", lambda *_: {"kind": "latency", **job(what="latency").key()})

    def gave_up():
        raise RuntimeError("a kernel gave up")

    printed = []
    monkeypatch.setattr(run, "check_device", gave_up)
    record = run.measure(job(what="latency"), options(OtherLibrary()), printed.append)
    assert record["kind"] == "failure"
    assert record["message"] == "RuntimeError: a kernel gave up"
    assert len(printed) == 1
