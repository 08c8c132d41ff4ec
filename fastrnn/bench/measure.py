"""The timing core: several calls measured in turn, so that a drift of the machine meets them all."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
Clock = Callable[[], float]


def quantile(samples: Sequence[float], q: float) -> float:
    """The q-quantile of `samples`, interpolated linearly."""
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = math.ceil(at)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def summary(samples: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    return {"p20": quantile(samples, 0.2), "p50": quantile(samples, 0.5), "p80": quantile(samples, 0.8)}


def geomean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(v) for v in values))


def warm_up(call: Call, seconds: float, clock: Clock = time.perf_counter) -> float:
    """Call until `seconds` have passed, at least once; the time of the fastest call."""
    start = clock()
    best = math.inf
    while True:
        before = clock()
        call()
        after = clock()
        best = min(best, after - before)
        if after - start >= seconds:
            return best


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Python's collector does not run, after it has run once; its pauses are of all that the process holds."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleave(
    calls: Sequence[Call],
    budget: float,
    min_rounds: int = 5,
    sample_seconds: float = 2e-3,
    clock: Clock = time.perf_counter,
) -> list[list[float]]:
    """Seconds per iteration of each call, sampled in turn: A B A B ...

    Every call is warmed up first. A sample repeats its call until it is about `sample_seconds` long,
    so that the clock's own cost does not count. Rounds go on until `budget` seconds of samples were
    taken, `min_rounds` at least. The collector is off meanwhile.
    """
    repeats = [max(1, math.ceil(sample_seconds / max(warm_up(c, budget / 20, clock), 1e-9))) for c in calls]
    samples: list[list[float]] = [[] for _ in calls]
    spent = 0.0
    with collector_off():
        while spent < budget or len(samples[0]) < min_rounds:
            for call, n, taken in zip(calls, repeats, samples, strict=True):
                start = clock()
                for _ in range(n):
                    call()
                elapsed = clock() - start
                taken.append(elapsed / n)
                spent += elapsed
    return samples


def blocks(
    calls: Sequence[Call],
    budget: float,
    size: int = 50,
    cold: int = 5,
    least: int = 100,
    clock: Clock = time.perf_counter,
) -> list[list[float]]:
    """Seconds of each single call, in turns of `size` calls of one after `cold` that are not counted.

    So each finds the caches as it has left them itself, as a stream does that runs alone, and a drift still meets all.
    Turns go on until `budget` seconds were counted, and `least` calls of each.
    """
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        warm_up(call, budget / 20, clock)
    spent = 0.0
    with collector_off():
        while spent < budget or len(samples[0]) < least:
            for call, taken in zip(calls, samples, strict=True):
                for k in range(-cold, size):
                    start = clock()
                    call()
                    elapsed = clock() - start
                    if k >= 0:
                        taken.append(elapsed)
                        spent += elapsed
    return samples


def compare(baseline: Call, subject: Call, budget: float, min_rounds: int = 5, **options: Any) -> dict[str, Any]:
    """Times of both in seconds, and the ratio baseline / subject: above 1, the subject is faster."""
    return compare_all({"torch.nn": baseline, "fastrnn": subject}, budget, min_rounds, **options)


def compare_all(calls: dict[str, Call], budget: float, min_rounds: int = 5, **options: Any) -> dict[str, Any]:
    """Times in seconds, and ratios of the first of `calls`, the baseline, over each: above 1, the other is faster.

    A ratio is taken within each round, between neighbours in time; its median and its p20 and p80 are over the rounds.
    The second of `calls` is the subject, those after it are peers.
    """
    samples = interleave(list(calls.values()), budget, min_rounds, **options)

    def ratio(taken: list[float]) -> dict[str, float]:
        return summary([x / y for x, y in zip(samples[0], taken, strict=True)])

    others = zip(list(calls)[2:], samples[2:], strict=True)
    return {
        "rounds": len(samples[0]),
        "baseline": summary(samples[0]),
        "subject": summary(samples[1]),
        "ratio": ratio(samples[1]),
        "peers": {name: {"seconds": summary(taken), "ratio": ratio(taken)} for name, taken in others},
    }


def gemm_rate(dtype: torch.dtype, size: int = 1024, repeats: int = 7) -> float:
    """FLOP/s of torch.mm on square matrices of `size`, with torch's present number of threads."""
    a, b, out = (torch.randn(size, size).to(dtype) for _ in range(3))
    with torch.inference_mode():
        (times,) = interleave([lambda: torch.mm(a, b, out=out)], budget=0.0, min_rounds=repeats)
    return 2.0 * size**3 / statistics.median(times)
