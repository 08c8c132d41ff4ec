"""A rehearsal of the benchmark of the Triton kernels; in the interpreter its times mean nothing."""

import triton_support
from triton_support import DEVICE

from fastrnn.bench import commands, environment

triton_support.require()


def test_the_grid_of_the_gpu_is_measured_with_triton(tmp_path, capsys):
    sizes = "--grid gpu --steps 3 --hidden 16 --batches 2 --cells GRU --dtypes float32 --modes training"
    how = "--threads 1 --sample 0 --rounds 1 --budget 0 --parts timing --backend triton --no-kernels --save"
    argv = [*sizes.split(), *how.split(), "--out", str(tmp_path), "--device", DEVICE]
    assert commands.bench(argv) == 0, capsys.readouterr().out
    (saved,) = tmp_path.glob("*/*.jsonl")
    records = [r for r in environment.read(saved) if r["kind"] == "measurement"]
    names = ["T1-B1-H16", "T3-B2-H16", "T3-B2-H16-2layers", "T3-B2-H16-bi", "T3-B2-H16-packed"]
    assert sorted(r["case"] for r in records) == names
    assert all(r["chosen"].startswith("triton") for r in records)
