"""The roofline, the order of a grid, and counters of energy."""

import pytest
import torch
from torch import nn

from fastrnn.bench import energy, grids, measuring, options, report, roofline, run
from fastrnn.bench.shapes import CASES, CELLS, Case
from fastrnn.cli.parser import UsageError

# The roofline


def machine(**changes):
    return roofline.Machine(**{"flops": 1e9, "read": lambda size: 1e9, "memory": 1e30, **changes})


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("mode", ["inference", "forward", "training"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_parts_are_the_flops_of_the_case(case, cell, mode):
    total = sum(p.times * p.flops for p in roofline.parts(case, cell, mode, 4))
    assert total == pytest.approx(case.flops(cell, mode))


def test_one_row_is_bound_by_the_weights_and_many_by_the_products():
    for B, limit in ((1, "weights"), (64, "products")):
        case = Case("x", T=10, B=B, I=8, H=32)
        found = roofline.bound(case, "GRU", "inference", "float32", machine())
        assert found.limit == limit
        R, W = 3 * 32 * 32, 3 * 32 * 8
        want = 10 * max(2 * B * R, 4 * R) + max(2 * 10 * B * W, 4 * W)
        assert found.seconds == pytest.approx(want / 1e9)


def test_weights_on_the_chip_are_read_once_and_steps_wait():
    case = Case("x", T=50, B=1, I=1, H=64)
    R = 4 * 64 * 64 * 2
    for holds, times in ((0, 50), (R, 1)):
        m = machine(flops=1e30, holds=holds, wait=lambda size: 1e-6)
        found = roofline.bound(case, "LSTM", "inference", "bfloat16", m)
        assert found.parts["weights"] == pytest.approx((times * R + 4 * 64 * 2) / 1e9)
        assert found.parts["waiting"] == pytest.approx(50e-6)
    training = roofline.bound(case, "LSTM", "training", "bfloat16", m)
    assert training.parts["waiting"] == pytest.approx(100e-6)


def test_rates_of_this_machine_are_within_reason():
    m = roofline.cpu("float32")
    assert 1e8 < m.flops < 1e14
    assert 1e8 < m.read(1 << 20) < 1e13
    assert 1e8 < m.memory < 1e13


def facts(name, multiprocessors=132):
    return {"name": name, "capability": [9, 0], "multiprocessors": multiprocessors}


def test_a_gpu_is_known_by_its_name():
    dense = roofline.gpu("bfloat16", facts("NVIDIA H200"))
    assert (dense.flops, dense.memory) == pytest.approx((989.4e12, 4.8e12))
    assert roofline.gpu("float32", facts("NVIDIA H200")).flops == pytest.approx(66.9e12)
    assert dense.wait(1 << 10) < dense.wait(1 << 20) < dense.wait(1 << 25)
    assert roofline.gpu("float64", facts("NVIDIA H200")) is None
    assert roofline.unknown("float64", facts("NVIDIA H200")) == "the rate of float64 is not in fastrnn.bench.roofline"


@pytest.mark.parametrize(
    ("name", "bf16", "memory"),
    [
        ("NVIDIA L4", 121, 300),
        ("NVIDIA L40S", 362, 864),
        ("NVIDIA H100 80GB HBM3", 989.4, 3350),
        ("NVIDIA H100 NVL", 835.5, 3900),
        ("NVIDIA A100 80GB PCIe", 312, 1935),
        ("A100-SXM4-40GB", 312, 1555),
        ("NVIDIA GeForce RTX 4090", 165.2, 1008),
    ],
)
def test_a_gpu_is_not_taken_for_its_namesake(name, bf16, memory):
    found = roofline.gpu("bfloat16", facts(name))
    assert (found.flops, found.memory) == pytest.approx((bf16 * 1e12, memory * 1e9))


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A1000", "NVIDIA GH200 480GB", "NVIDIA A10G", "NVIDIA L40", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Abacus",
    ],
)  # fmt: skip
def test_a_gpu_without_a_data_sheet_has_a_note_instead_of_a_bound(name):
    assert roofline.gpu("bfloat16", facts(name)) is None
    planned = [grids.Job("timing", CASES[0], "GRU", "training", dtype, "cuda", 0) for dtype in ("bfloat16", "tf32")]
    (why,) = run._without_bound(planned, facts(name))
    assert why == f"the data sheet of {name} is not in fastrnn.bench.roofline"
    assert run._without_bound(planned, facts("NVIDIA H200")) == []
    assert run._without_bound([j._replace(device="cpu") for j in planned], facts(name)) == []


@pytest.mark.parametrize("name", roofline.DEVICES)
def test_rates_of_a_data_sheet_are_dense(name):
    s = roofline.DEVICES[name]
    assert s.half == pytest.approx(2 * s.tf32, rel=0.02)  # in all these generations
    assert s.fp32 <= s.tf32 <= s.half


# The order


@pytest.mark.parametrize("grid", grids.GRIDS)
def test_every_measurement_is_planned_once(grid):
    chosen = grids.cases(grid)
    found = grids.jobs(chosen, CELLS, ("inference", "training"), ("float32",), "cpu", (1, 2), ("timing",))
    want = {(c.name, cell, mode, n) for c in chosen for cell in c.cells for mode in c.modes for n in (1, 2)}
    assert len({c.name for c in chosen}) == len(chosen)
    assert len(found) == len(want)
    assert {(j.case.name, j.cell, j.mode, j.threads) for j in found} == want


def test_the_first_are_the_usual_ones():
    first = grids.jobs(grids.cases("gpu"), CELLS, grids.MODES, grids.GPU_DTYPES, "cuda", [0], ("timing",))[0]
    assert (first.cell, first.dtype, first.case.name) == ("LSTM", "bfloat16", "T512-B64-H256")
    found = grids.jobs(CASES, CELLS, grids.MODES, ("float32",), "cpu", [1, 2], ("timing", "memory", "latency"))
    assert {j.cell for j in found[:6]} == {"LSTM"}
    assert found[-1].mode == "forward" or found[-1].what == "memory"
    assert {j.what for j in found} == {"timing", "memory", "latency"}
    assert {j.threads for j in found if j.what == "memory"} == {2}
    assert {j.threads for j in found if j.what == "latency"} == {1, 2}


# Energy


def zone(root, number, name, energy, size=1_000_000):
    folder = root / f"intel-rapl:{number}"
    folder.mkdir()
    for file, value in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", size)):
        (folder / file).write_text(f"{value}\n")
    return folder / "energy_uj"


def test_the_processors_counters_are_summed_and_each_may_wrap(tmp_path):
    first, second = zone(tmp_path, 0, "package-0", 900_000), zone(tmp_path, 1, "package-1", 0, 2_000_000)
    core, board = zone(tmp_path, "0:0", "core", 5), zone(tmp_path, 2, "psys", 5)
    meter = energy.rapl(tmp_path)
    now = iter([0.0, 0.0, 1.0])
    meter._clock = lambda: next(now)

    def call():
        first.write_text("150000")  # 0.25 J, over the end of the counter
        second.write_text("500000")
        core.write_text("100000")
        board.write_text("750000")  # the packages once more

    assert meter.joules(call, lambda: None) == pytest.approx(0.25 + 0.5)


def test_why_there_is_no_counter(tmp_path):
    with pytest.raises(energy.Unmetered, match="not in"):
        energy.rapl(tmp_path)
    (tmp_path / "intel-rapl:0").mkdir()
    with pytest.raises(energy.Unmetered, match="cannot be read"):
        energy.rapl(tmp_path)


def test_joules_are_of_both_sides():
    class Meter:
        def joules(self, call, finish):
            call()
            return 2.5

    job = grids.Job("timing", Case("x", 3, 2, 5, 7), "GRU", "training", "float32", "cpu", 1)
    record = measuring.timing(job, measuring.Options(nn, sample=0.0, rounds=2, meter=Meter()))
    assert record["joules"] == {"torch.nn": 2.5, "fastrnn": 2.5}


# The commands


def test_threads_and_types_default_to_this_machine():
    args = options.parse_bench([])
    assert args.threads[0] == 1
    assert (args.grid, args.dtypes, args.backend, args.budget) == ("cpu", ["float32"], "auto", 300.0)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--device cuda: torch finds no GPU"):
            options.parse_bench(["--device", "cuda"])
    assert report.seconds(1.5e-3) == "1.5 ms"
