"""The module of CUDA kernels on the CPU emulator, built by `make .venv/.emulator`."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load() -> Any:
    sys.path.insert(0, os.environ.get("FASTRNN_EMULATOR_PATH", str(ROOT / "build" / "emulator")))
    try:
        return importlib.import_module("_emulator")
    except ImportError:
        return None
    finally:
        del sys.path[0]


EMULATOR = load()
needs_emulator = pytest.mark.skipif(EMULATOR is None, reason="the emulator is not built: make .venv/.emulator")
needs_races = pytest.mark.skipif(
    EMULATOR is None or not EMULATOR.detects_races, reason="no detector of races in this build"
)
