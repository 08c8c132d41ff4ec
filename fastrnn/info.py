"""What this installation can do: `fastrnn.info()`, `fastrnn info`.

`fastrnn/__init__.py` imports `info` from here when it is loaded: the function shadows this module as
`fastrnn.info`, and a later first import of the module would undo that. So nothing heavy is imported here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

_EXTRAS = {
    "train": (("lightning", "jsonargparse", "tokenizers"), "`fastrnn train` needs it"),
    "plot": (("matplotlib",), "plots of benchmarks need it"),
    "triton": (("triton",), "kernels for GPUs need it, where torch has not brought it along"),
    "privacy": (("opacus",), "`fastrnn.opacus` needs it"),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "`torch.onnx.export`, and whoever runs what it makes, need it"),
}
_NOT_BUILT = (
    "it is not part of this installation: no C++ compiler or no Python headers were found when fastrnn was installed, "
    "or this is a source tree that was not installed"
)
_COST = (
    "everything works, on torch.nn's own kernels and at their speed at best; resets= and what else they lack runs in "
    "a Python loop, far slower. Install a C++17 compiler and Python's headers (Debian, Ubuntu: apt-get install g++ "
    "python3-dev), then: pip install --force-reinstall --no-deps --no-cache-dir fastrnn"
)


def info() -> dict[str, Any]:
    """Facts about this installation, for a bug report or a puzzled user.

    Returns:
        A dict of plain values: `fastrnn`, `python`, `torch`, `numpy`, `triton` (versions); `cpu`, `cores`, `threads`
        (what torch will use), `gpu` (its name, or None); `engine` (a dict: `available`, `isa` in use and `isas`
        that can run here, or `reason` and `cost` of its absence); `cuda` (the kernels of `backend="cuda"`: `built`, and
        `architectures` or the `reason` of their absence); `missing` (extras that are not installed, each
        with what needs it).
    """
    import torch

    from fastrnn.backends import BACKENDS

    return {
        "fastrnn": version("fastrnn"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "triton": version("triton"),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "engine": engine(),
        "cuda": BACKENDS["cuda"].info(),
        "missing": missing_extras(),
    }


def version(package: str) -> str:
    """The installed version of `package`, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def engine() -> dict[str, Any]:
    """Whether the C++ engine is there, with the instruction set it uses, or why not and what that costs."""
    if importlib.util.find_spec("fastrnn._cpu") is None:
        return {"available": False, "reason": _NOT_BUILT, "cost": _COST}
    try:
        cpu = importlib.import_module("fastrnn._cpu")
    except ImportError as error:
        return {"available": False, "reason": f"it could not be loaded: {error}", "cost": _COST}
    try:
        isa = cpu.isa()
    except RuntimeError as error:  # FASTRNN_ISA names one that is not there
        return {"available": False, "reason": f"{error}; this processor can: {', '.join(cpu.isas())}", "cost": _COST}
    return {"available": True, "isa": isa, "isas": list(cpu.isas())}


def cpu_model() -> str:
    """The processor's name as the operating system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def missing_extras() -> dict[str, str]:
    """The extras of which a package is not installed, and what each would be needed for."""
    missing = {}
    for extra, (packages, purpose) in _EXTRAS.items():
        absent = [p for p in packages if importlib.util.find_spec(p) is None]
        if absent:
            missing[extra] = f"{', '.join(absent)} not installed; {purpose}: pip install 'fastrnn[{extra}]'"
    return missing


def format_info(facts: dict[str, Any]) -> str:
    """`facts`, as `info()` returns them, as lines for a person to read."""
    e = facts["engine"]
    rows = [
        ("fastrnn", facts["fastrnn"]),
        ("python", facts["python"]),
        ("torch", facts["torch"]),
        ("numpy", facts["numpy"]),
        ("triton", facts["triton"]),
        ("platform", facts["platform"]),
        ("cpu", f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads in use"),
        ("gpu", facts["gpu"] or "none that torch can use"),
    ]
    if e["available"]:
        rows.append(("engine", f"built; runs {e['isa']} (this processor can: {', '.join(e['isas'])})"))
    else:
        rows += [("engine", f"MISSING: {e['reason']}"), ("", f"cost: {e['cost']}")]
    cuda = facts["cuda"]
    rows.append(("cuda", f"built for {cuda['architectures']}" if cuda["built"] else f"not there: {cuda['reason']}"))
    rows += [(f"[{extra}]", text) for extra, text in facts["missing"].items()]
    return "\n".join(f"{name:<10}{text}" for name, text in rows)
