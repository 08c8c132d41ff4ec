"""NVML's counter of energy, against a library of C functions that keep NVML's interface."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from fastrnn.bench import energy

UUID = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
HANDLE = 0x7FED_1234_5678_9ABC  # no 32 bits hold it
CODES = STARTED, NOT_FOUND, NOT_SUPPORTED, LOST = 9, 6, 3, 15
TEXTS = {code: ctypes.create_string_buffer(f"reason {code}".encode()) for code in CODES}


class Nvml:
    """libnvidia-ml: called through the C convention, without prototypes, as ctypes.CDLL does."""

    def __init__(self, counter=0, init=0, keeps=0):
        self.counter, self.init, self.keeps = counter, init, keeps  # millijoules; what the functions return
        pointer, number = ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_ulonglong)
        self._callbacks = []
        self.nvmlInit_v2 = self._function(lambda: self.init)
        self.nvmlDeviceGetHandleByUUID = self._function(self.find, ctypes.c_char_p, pointer)
        self.nvmlDeviceGetTotalEnergyConsumption = self._function(self.energy, ctypes.c_void_p, number)
        self.nvmlErrorString = self._function(
            lambda code: ctypes.addressof(TEXTS[code]), ctypes.c_int, result=ctypes.c_void_p
        )

    def _function(self, python, *arguments, result=ctypes.c_int):
        self._callbacks.append(ctypes.CFUNCTYPE(result, *arguments)(python))
        return ctypes.CDLL(None)._FuncPtr(ctypes.cast(self._callbacks[-1], ctypes.c_void_p).value)

    def find(self, uuid, handle):
        if uuid != f"GPU-{UUID}".encode():
            return NOT_FOUND
        handle[0] = HANDLE
        return 0

    def energy(self, handle, value):
        assert handle == HANDLE
        if self.keeps:
            return self.keeps
        value[0] = self.counter
        return 0


@pytest.fixture
def install(monkeypatch):
    def put(library, uuid=UUID):
        def load(name):
            assert name == "libnvidia-ml.so.1"
            return library

        monkeypatch.setattr(energy.ctypes, "CDLL", load)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(uuid=uuid))
        return library

    return put


def spent(meter, call):
    """Joules of one of two calls."""
    now = iter([0.0, 0.0, 0.1, 1.0])
    meter._clock = lambda: next(now)
    return meter.joules(call, lambda: None)


@pytest.mark.parametrize("start", [123_456, 2**64 - 2_000_000])
def test_millijoules_of_the_device_that_torch_uses(install, start):
    library = install(Nvml(start))
    meter = energy.meter("cuda")

    def call():
        library.counter = (library.counter + 1_750_000) % 2**64  # over the end of the counter

    # A double holds a counter near its end to 2 J.
    assert spent(meter, call) == pytest.approx(1750.0, abs=1e-6 if start < 2**32 else 4.0)


@pytest.mark.parametrize(
    ("library", "uuid", "message"),
    [
        ({"init": STARTED}, UUID, f"NVML cannot be started: reason {STARTED}"),
        ({}, UUID[::-1], f"NVML does not find GPU-{UUID[::-1]}: reason {NOT_FOUND}"),
        ({"keeps": NOT_SUPPORTED}, UUID, f"NVML gives no count of this device's energy .*: reason {NOT_SUPPORTED}"),
    ],
)
def test_a_refusal_tells_its_reason(install, library, uuid, message):
    install(Nvml(**library), uuid)
    with pytest.raises(energy.Unmetered, match=f"^{message}$"):
        energy.nvml()


def test_no_library(monkeypatch):
    def load(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(energy.ctypes, "CDLL", load)
    with pytest.raises(energy.Unmetered, match=r"^NVML cannot be loaded: libnvidia-ml\.so\.1: cannot open"):
        energy.nvml()


def test_a_counter_that_fails_during_a_measurement_is_not_read_as_none_spent(install):
    library = install(Nvml(123_456))
    meter = energy.nvml()

    def call():
        library.keeps = LOST

    with pytest.raises(energy.Unmetered, match=f"reason {LOST}$"):
        spent(meter, call)
