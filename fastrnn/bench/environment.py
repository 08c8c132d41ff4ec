"""Where and with what a run was made, and the file that keeps it."""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastrnn.bench.passes import condensed
from fastrnn.bench.records import fault
from fastrnn.cli.parser import UsageError

PACKAGE = Path(__file__).resolve().parents[1]
IN_A_CLONE, ELSEWHERE = Path("benchmarks/results"), Path("fastrnn-bench")
_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
)
_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_SPINCOUNT", "MKL_NUM_THREADS", "FASTRNN_ISA")


def describe(library: Any, command: Sequence[str] = ()) -> dict[str, Any]:
    """The environment record. `library` is fastrnn, or torch.nn in a run against itself; `command`: as it was typed."""
    model, flags = _processor()
    return {
        "kind": "environment",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "cpu": model,
        "flags": [f for f in _FLAGS if f in flags],
        "clock": _clock(),
        "cores": cores(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "subject": library.__name__,
        "fastrnn": _version(),
        "info": library.info() if hasattr(library, "info") else None,
        "commit": _commit(),
        "gpu": gpu(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def heading(library: Any) -> str:
    """The line above a small table: CPU, torch, commit, torch's present threads, load."""
    facts, threads = describe(library), torch.get_num_threads()
    made_by = f"{facts['cpu']}; torch {facts['torch']}, commit {facts['commit']}"
    return f"{made_by}, {threads} thread{'s' if threads > 1 else ''}, load {facts['load']:.1f}"


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu() -> dict[str, Any] | None:
    """Name, multiprocessors, compute capability, driver and cuDNN of torch's current CUDA device; None without one."""
    if not torch.cuda.is_available():
        return None
    p: Any = torch.cuda.get_device_properties()
    return {
        "name": p.name,
        "multiprocessors": p.multi_processor_count,
        "capability": [p.major, p.minor],
        "memory": p.total_memory,
        "clock": getattr(p, "clock_rate", 0) / 1000,  # MHz at most, where torch tells
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def _clock() -> dict[str, float]:
    """MHz of the first core: at the moment, and at most, where the system tells."""
    folder, found = Path("/sys/devices/system/cpu/cpu0/cpufreq"), {}
    for name, file in (("now", "scaling_cur_freq"), ("most", "cpuinfo_max_freq")):
        if (folder / file).exists():
            found[name] = int((folder / file).read_text()) / 1000
    if not found and Path("/proc/cpuinfo").exists():
        told = re.search(r"^cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        found = {"now": float(told.group(1))} if told else {}
    return found


def results(out: str | None = None) -> Path:
    """The folder of results: `out`, or that of the clone in which the command runs, or a new one beside."""
    return Path(out) if out else IN_A_CLONE if IN_A_CLONE.is_dir() else ELSEWHERE


def _version() -> str | None:
    """fastrnn's version; None in a tree that is not installed."""
    try:
        return importlib.metadata.version("fastrnn")
    except importlib.metadata.PackageNotFoundError:
        return None


def slug(environment: dict[str, Any]) -> str:
    """The name of the hardware, as a folder: model, widest vectors, cores; of a run on a GPU, the GPU's."""
    if environment.get("device") == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", environment["gpu"]["name"].lower()).strip("-")
    flags = environment["flags"]
    isa = next(
        (name for flag, name in (("avx512f", "avx512"), ("avx2", "avx2"), ("asimd", "neon")) if flag in flags), ""
    )
    words = re.sub(r"\((r|tm)\)", " ", environment["cpu"].lower())
    return "-".join(filter(None, (re.sub(r"[^a-z0-9]+", "-", words).strip("-"), isa, f"{environment['cores']}-cores")))


def _processor() -> tuple[str, set[str]]:
    """The model's name and the feature flags, as Linux lists them."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    fields = dict(re.findall(r"^([^\t:]+)\s*:[ \t]*(.*)$", text, re.MULTILINE))
    flags = fields.get("flags") or fields.get("Features") or ""
    return fields.get("model name") or platform.processor() or platform.machine(), set(flags.split())


def _commit() -> str | None:
    """The commit of the tree, with "+" when tracked files differ from it; None outside a clone."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    try:
        return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=PACKAGE, capture_output=True, text=True, check=True).stdout.strip()


def keep_freed_memory() -> bool:
    """Tell the GNU C library never to give freed memory back; whether it could be told.

    By its own rules a large block that lies at the end of the heap is unmapped when it is freed, and
    mapped and cleared again at the next call, while the same block elsewhere is reused: torch.nn.LSTM
    with T = B = 1 and H = 512 takes three times as long in one place as in the other.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


class Store:
    """The records of a run, in memory and, with a path, as JSON lines that are whole at any time."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.path is not None:
            write(self.path, "".join(json.dumps(r, default=str) + "\n" for r in self.records))


def write(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file, one for each case: of several passes the middle one. UsageError as of `lines`."""
    return condensed(lines(path))


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file, as they stand in it.

    Raises:
        UsageError: it is not there, or not a file of records; the message names the line.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; fastrnn bench --save writes one")
    records = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
            why = fault(record)
        except (json.JSONDecodeError, RecursionError):
            why = "it is no JSON"
        if why:
            raise UsageError(f"{path}: line {number} is not a record of fastrnn bench: {why}")
        records.append(record)
    return records
