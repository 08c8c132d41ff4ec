"""Joules of an iteration, by the counter that the driver keeps: NVML of an NVIDIA GPU, RAPL of a processor.

Both count the whole device, whatever else runs there.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

RAPL = Path("/sys/class/powercap")
SECONDS = 0.5  # counters move in steps of some milliseconds: an iteration is repeated this long


class Unmetered(Exception):
    """There is no counter that can be read; the message says why."""


class Meter:
    """Counters of joules: `read` gives each of them, modulo its entry of `ranges`."""

    def __init__(
        self,
        read: Callable[[], Sequence[float]],
        ranges: Sequence[float],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._read, self._ranges, self._clock = read, ranges, clock

    def joules(self, call: Callable[[], Any], finish: Callable[[], Any], seconds: float = SECONDS) -> float:
        """Joules of one `call`, over calls that last `seconds` together; `finish` waits for the device."""
        finish()
        before, start, calls = self._read(), self._clock(), 0
        while self._clock() - start < seconds:
            call()
            finish()
            calls += 1
        counters = zip(self._read(), before, self._ranges, strict=True)
        return sum((after - early) % size for after, early, size in counters) / max(calls, 1)


def meter(device: str) -> Meter:
    """The counter of `device`.

    Raises:
        Unmetered: there is none, or it may not be read.
    """
    return nvml() if device == "cuda" else rapl()


def rapl(root: Path = RAPL) -> Meter:
    """All packages of the processor. Zones of other names (psys, the whole board) count the packages once more."""
    zones = sorted(p for p in root.glob("intel-rapl:*") if p.name.count(":") == 1)
    try:
        zones = [zone for zone in zones if (zone / "name").read_text().startswith("package-")]
        files = [zone / "energy_uj" for zone in zones]
        ranges = [int((zone / "max_energy_range_uj").read_text()) / 1e6 for zone in zones]
        for file in files:
            file.read_text()
    except OSError as error:
        raise Unmetered(f"{error.filename} cannot be read ({error.strerror}); root can allow it by chmod a+r") from None
    if not zones:
        raise Unmetered(f"the processor's counters (RAPL) are not in {root}: a virtual machine, or no driver for them")
    return Meter(lambda: [int(file.read_text()) / 1e6 for file in files], ranges)


def nvml() -> Meter:
    """torch's current CUDA device."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise Unmetered(f"NVML cannot be loaded: {error}") from None
    library.nvmlErrorString.restype = ctypes.c_char_p

    def check(code: int, refusal: str) -> None:
        if code:
            raise Unmetered(f"{refusal}: {library.nvmlErrorString(code).decode()}")

    handle, value = ctypes.c_void_p(), ctypes.c_ulonglong()
    uuid = f"GPU-{torch.cuda.get_device_properties().uuid}".encode()  # type: ignore[attr-defined, unused-ignore]
    check(library.nvmlInit_v2(), "NVML cannot be started")
    check(library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)), f"NVML does not find {uuid.decode()}")

    def read() -> list[float]:
        code = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value))
        check(code, "NVML gives no count of this device's energy (before Volta it keeps none)")
        return [value.value / 1e3]

    read()
    return Meter(read, [2.0**64 / 1e3])
