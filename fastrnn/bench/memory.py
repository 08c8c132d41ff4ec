"""Peak memory of training, one fresh process per measurement.

The C library is told to hand freed blocks back at once, so that the resident set follows the live
memory; the kernel's high-water mark is reset just before the first iteration. Counted is what two
training iterations add to it: activations, gradients, scratch and any cache of packed weights. Not
counted are the module, its input, and the code of the libraries (file pages).
"""

from __future__ import annotations

import ctypes
import gc
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from fastrnn.bench import apart
from fastrnn.bench.measure import gemm_rate
from fastrnn.bench.shapes import Case, tiny
from fastrnn.bench.subjects import build

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt
_PR_SET_THP_DISABLE = 41  # of prctl: a touched page counts 4 KiB, not 2 MiB
_ITERATIONS = 2


def unavailable() -> str | None:
    """Why memory cannot be measured here, or None."""
    if not sys.platform.startswith("linux"):
        return "the resident set's high-water mark is read from /proc, which this system does not have"
    try:
        Path("/proc/self/clear_refs").write_text("5")
        ctypes.CDLL(None).mallopt  # noqa: B018
    except (OSError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def peak(case: Case, cell: str, dtype: torch.dtype, library: str, backend: str, threads: int) -> int:
    """Bytes that training `cell` of `library` ("torch.nn" or "fastrnn") adds at its peak."""
    return int(apart.call(_measure, case, cell, dtype, library, backend, threads))


def _measure(case: Case, cell: str, dtype: torch.dtype, library: str, backend: str, threads: int) -> int:
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    libc.mallopt(_M_TRIM_THRESHOLD, 1 << 16)
    torch.set_num_threads(threads)
    module = import_module(library)
    if library != "torch.nn":
        with module.backend(backend):
            return _growth(case, cell, dtype, module, libc)
    return _growth(case, cell, dtype, module, libc)


def _growth(case: Case, cell: str, dtype: torch.dtype, module: ModuleType, libc: ctypes.CDLL) -> int:
    gemm_rate(dtype, repeats=1)  # threads and the scratch of the matrix library
    build(tiny(case), cell, "training", dtype, module).iterate()
    subject = build(case, cell, "training", dtype, module)
    gc.collect()
    libc.malloc_trim(0)
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(_ITERATIONS):
        subject.iterate()
    after = _resident()
    files = after["RssFile"] - before["RssFile"]
    return max(0, after["VmHWM"] - before["VmRSS"] - files)


def _resident() -> dict[str, int]:
    """The memory lines of /proc/self/status, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
