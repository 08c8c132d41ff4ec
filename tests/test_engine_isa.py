"""Every instruction set that this machine can run passes the parity tests; FASTRNN_ISA chooses among them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_support import ENGINE

pytestmark = pytest.mark.skipif(ENGINE is None, reason="the engine is not built")
ROOT = Path(__file__).parent.parent
HERE = [] if ENGINE is None else ENGINE.isas()
PRINT = "from fastrnn.backends.cpu import load; print(load()[0].isa())"
FILES = ["tests/test_engine_parity.py", "tests/test_engine_text.py"]


def run(isa, *arguments):
    env = {**os.environ, "FASTRNN_ISA": isa, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )


def test_best_comes_first_and_baseline_is_always_there():
    assert HERE[-1] == "baseline"
    assert len(set(HERE)) == len(HERE)
    assert os.environ.get("FASTRNN_ISA") or ENGINE.isa() == HERE[0]


@pytest.mark.parametrize("isa", HERE)
def test_each_can_be_forced(isa):
    done = run(isa, "-c", PRINT)
    assert done.stdout.strip() == isa, done.stderr


@pytest.mark.parametrize("isa", ["sse9", "AVX2", " avx2"])
def test_unknown_one_is_an_error(isa):
    done = run(isa, "-c", PRINT)
    assert done.returncode != 0
    assert f"FASTRNN_ISA={isa}: there is no such instruction set" in done.stderr


@pytest.mark.parametrize("isa", [i for i in HERE if i != ENGINE.isa()])
def test_parity(isa):
    done = run(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *FILES)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "failed" not in done.stdout
