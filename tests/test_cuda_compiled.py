"""What nvcc makes of the CUDA kernels, for every architecture: no spill, no stack, tensor cores in use.

`make cuda` compiles them; tests/cuda_kernels.json is the table of registers and tensor-core instructions.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
from cuda_table import TABLE, counted, nvcc_version, read, tool

from fastrnn.cells import CELLS

BUILD = Path(os.environ.get("FASTRNN_CUDA_BUILD", Path(__file__).resolve().parent.parent / "build" / "cuda"))
MODULES = sorted(BUILD.glob("_cuda*.so"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODULES, reason="the CUDA kernels are not compiled: make cuda"),
]
NUMBERS = 4
RESERVED = 1024  # bytes of shared memory of a block that CUDA keeps for itself


@pytest.fixture(scope="module")
def kernels():
    if tool() is None:
        pytest.skip("no cuobjdump: pip install triton, or the CUDA toolkit")
    return read(BUILD)


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("_cuda", MODULES[0])
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_every_kernel_keeps_to_registers_and_uses_tensor_cores(kernels, module):
    table = json.loads(TABLE.read_text())
    assert set(kernels) == set(table["kernels"]), "python tests/cuda_table.py build/cuda"
    pairs = {tuple(name.split()[1:3]) for name in kernels}
    assert len(pairs) == len(CELLS) * NUMBERS
    same = table["nvcc"] == nvcc_version(BUILD)
    assert all(set(row) == {f"sm_{arch}" for arch in module.architectures.split()} for row in kernels.values())
    for name, row in kernels.items():
        for arch, use in row.items():
            what = f"{name} for {arch}: {use}"
            assert use["stack"] == use["local"] == use["spills"] == 0, what
            assert use["registers"] <= 255, what
            assert use["shared"] <= RESERVED, what  # all else is the plan's, in dynamic shared memory
            if arch != "sm_80":  # which has no clusters: their kernels are empty there, as the table says
                assert use["hmma"], what
            else:
                assert bool(use["hmma"]) == bool(table["kernels"][name][arch][1]), what
            if same and arch in table["kernels"].get(name, {}):
                assert counted(use) == table["kernels"][name][arch], what


def test_the_module_is_small_and_loads_without_a_gpu(module):
    assert MODULES[0].stat().st_size < 25 << 20
    assert module.plan(0, 0, False, 1, 16, 128, module.Limits(90, 227 << 10, 16, 132)).error == ""
    with pytest.raises(RuntimeError, match="CUDA: cudaDeviceGetAttribute"):
        module.limits(99)
    assert re.fullmatch(r"\d+a?( \d+a?)*", module.architectures)
