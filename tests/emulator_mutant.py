"""What the emulator of changed kernels does wrong, for a process that has loaded no emulator yet."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def first_wrong(folder: Path, kernel: int) -> str:
    """The error that the module in `folder` leads to, its first line; "" for the right kernels, which pass all runs.

    `kernel` is 1 for K1, 2 for K2.
    """
    os.environ["FASTRNN_EMULATOR_PATH"] = str(folder)
    from emulator_support import EMULATOR, Emulated
    from engine_support import Case
    from test_emulator_grid import SHAPES
    from test_emulator_kernels import BOTH, PAIRS, assert_parity, make

    assert Path(EMULATOR.__file__).parent == folder, EMULATOR.__file__
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    k2 = kernel == 2
    sizes = Case("lstm", T=4 if k2 else 8, B=11 if k2 else 5, I=3, lengths=True, resets=True, reverse=BOTH)
    shapes = [(f[::-1], b[::-1], hidden) for f, b, hidden in SHAPES] if k2 else [(*pair, 72) for pair in PAIRS]
    for forward, backward, hidden in shapes:
        call = make(sizes._replace(H=hidden), "bf16")
        for seed in range(3):
            for races in (True, False):
                backend = Emulated()
                backend.forced = {False: forward, True: backward}
                backend.asked = {"groups": 1, "warps": 1} if k2 else {}
                EMULATOR.schedule(seed=seed, races=races)
                try:
                    assert_parity(backend, call, "bf16")
                except (RuntimeError, AssertionError) as error:
                    return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""
