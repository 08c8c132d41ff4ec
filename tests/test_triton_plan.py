"""The rule that chooses a schedule and its tiles, and what a backend says of itself. No kernel runs."""

import importlib.util

import pytest
import torch

import fastrnn
from fastrnn.backends import BACKENDS, choose, clear_choices
from fastrnn.backends.base import Query
from fastrnn.backends.triton import device, precision
from fastrnn.backends.triton import plan as plans
from fastrnn.backends.triton.plan import PERSISTENT, RESIDENT, SCHEDULES, STEPWISE, Limits, Plan, Problem, plan

A100 = Limits("A100", (8, 0), 163 << 10, 108)
H100 = Limits("H100", (9, 0), 227 << 10, 132)
LSTM_16 = Problem(4, 128, 16, 1, 2, "ieee", False)
QUERY = Query("lstm", "cuda", torch.float32, 7, 5, 11, 19, 19, 1, True)


@pytest.fixture
def gpu(monkeypatch):
    """As if there were one."""
    monkeypatch.setattr(device, "unusable", lambda kind: None)
    monkeypatch.setattr(device, "limits", lambda *device: H100)
    monkeypatch.setattr("fastrnn.backends.triton.tuning.lookup", lambda *args: None)
    clear_choices()
    yield
    clear_choices()


@pytest.mark.parametrize(
    ("changes", "limits", "schedule"),
    [
        ({}, H100, RESIDENT),
        ({"backward": True}, H100, RESIDENT),
        ({"backward": True}, A100, PERSISTENT),  # 168 KiB of shared memory
        ({"itemsize": 4, "precision": "tf32"}, H100, PERSISTENT),
        ({"H": 129}, H100, PERSISTENT),
        ({"H": 1024}, H100, PERSISTENT),
        ({"H": 1025}, H100, STEPWISE),
        ({"H": 1024, "B": 64}, H100, PERSISTENT),
        ({"H": 1024, "B": 1024}, H100, STEPWISE),
        ({"H": 512, "B": 64, "S": 2}, A100, PERSISTENT),
        ({"H": 4099}, A100, STEPWISE),
        ({"H": 1}, A100, RESIDENT),
    ],
)
def test_rule(changes, limits, schedule):
    problem = LSTM_16._replace(**changes)
    found, reason = plan(problem, limits)
    assert found.schedule == schedule, reason
    assert plans.misfit(found, problem, limits) is None


@pytest.mark.parametrize("H", [1, 19, 128, 257, 1024, 5000])
@pytest.mark.parametrize("B", [1, 17, 256, 5000])
@pytest.mark.parametrize(
    ("itemsize", "kind"), [(2, "ieee"), (4, "tf32"), (4, "ieee"), (4, "tf32x3")], ids=lambda value: str(value)
)
def test_every_candidate_fits(H, B, itemsize, kind):
    for backward in (False, True):
        problem = Problem(4, H, B, 2, itemsize, kind, backward)
        found = plans.candidates(problem, H100)
        assert plan(problem, H100)[0] in found
        assert len(set(found)) == len(found) > 1
        for p in found:
            assert plans.misfit(p, problem, H100) is None
            assert p.schedule != PERSISTENT or plans.programs(p, problem) <= H100.multiprocessors


def test_a_grid_that_does_not_run_at_once_is_refused():
    problem = LSTM_16._replace(H=1024, B=10_000)
    with pytest.raises(RuntimeError, match=r"schedule 'persistent' cannot run this call: \d+ programs, of which 132"):
        plan(problem, H100, PERSISTENT)


def test_a_schedule_that_was_asked_for_runs_or_raises():
    assert plan(LSTM_16, H100, STEPWISE)[0].schedule == STEPWISE
    with pytest.raises(RuntimeError, match="schedule 'resident' cannot run this call: H=200 is beyond 128"):
        plan(LSTM_16._replace(H=200), H100, RESIDENT)
    with pytest.raises(ValueError, match=f"schedule: expected one of {', '.join(SCHEDULES)}, got 'fast'"):
        plan(LSTM_16, H100, "fast")


def test_reasons_tell_what_was_passed_over():
    _, reason = plan(LSTM_16._replace(H=2000), H100)
    assert reason == "not resident: H=2000 is beyond 128; not persistent: H=2000 is beyond 1024; takes any size"
    text = str(Plan(PERSISTENT, 16, 16, 128, 8))
    assert text == "persistent, 16 rows x 16 units, 128 at a time, 8 warps"


def test_auto_takes_it_where_torch_has_nothing(gpu):
    assert choose(QUERY).backend.name == "native"
    assert "triton: not measured against torch.nn's kernels on this device" in choose(QUERY).reason
    for changes in ({"resets": True}, {"ragged": True, "lengths": True}, {"trail": True}):
        choice = choose(QUERY._replace(**changes))
        assert choice.backend.name == "triton"
        assert "resident, 16 rows x 32 units, 4 warps (W_hh fits one program); " in choice.reason
    assert choose(QUERY._replace(ragged=True)).backend.name == "native"


def test_a_choice_goes_by_the_settings_of_its_time(gpu, monkeypatch):
    for name in ("ieee", "tf32", "tf32x3"):
        with fastrnn.fp32_precision(name):
            assert choose(QUERY, "triton").reason.endswith(f"; {name} products")
    assert "resident" in choose(QUERY, "triton").reason
    monkeypatch.setenv("FASTRNN_TRITON_SCHEDULE", "stepwise")
    assert "stepwise" in choose(QUERY, "triton").reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.float64}, "its kernels calculate in fp32, not in torch.float64"),
        ({"H": 23171, "P": 23171}, "its offsets in W_hh have 32 bits"),
        ({"P": 6}, r"its kernels have no projection \(proj_size\)"),
        ({"device": "meta"}, "its kernels run on CUDA tensors, these are on meta"),
    ],
)
def test_what_it_cannot_do(gpu, changes, message):
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run this call: {message}"):
        choose(QUERY._replace(**changes), "triton")
    assert choose(QUERY._replace(**changes)).backend.name != "triton"


@pytest.mark.skipif(torch.cuda.is_available() or device.interpreted(), reason="kernels can run here")
def test_without_a_gpu_the_error_names_the_way_out():
    device.unusable.cache_clear()
    installed = importlib.util.find_spec("triton") is not None
    way = "torch finds no CUDA device" if installed else "Triton is not installed: pip install triton"
    with pytest.raises(RuntimeError, match=way):
        choose(QUERY, "triton")
    with pytest.raises(RuntimeError, match="its kernels run on CUDA tensors, these are on cpu"):
        fastrnn.LSTM(3, 4, backend="triton")(torch.randn(2, 1, 3))


def _old_gpu(monkeypatch, **facts):
    device.unusable.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: facts.get("capability", (9, 0)))
    monkeypatch.setattr(torch.version, "hip", facts.get("hip"))
    reason = device.unusable("cuda")
    device.unusable.cache_clear()
    return reason


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_devices_that_will_not_do(monkeypatch):
    reason = _old_gpu(monkeypatch, capability=(7, 0))
    assert reason == "its kernels need compute capability 7.5, Old has 7.0: use backend 'native'"
    assert "has not been tested on ROCm" in _old_gpu(monkeypatch, hip="6.0")
    assert _old_gpu(monkeypatch) is None


def test_precision_follows_torch(monkeypatch):
    assert precision.of(torch.bfloat16) == "ieee"
    rnn = torch.backends.cudnn.rnn
    before = rnn.fp32_precision
    try:
        rnn.fp32_precision = "tf32"
        assert precision.of(torch.float32) == "tf32"
        rnn.fp32_precision = "ieee"
        assert precision.of(torch.float32) == "ieee"
    finally:
        rnn.fp32_precision = before
    with fastrnn.fp32_precision("tf32x3"):
        assert precision.of(torch.float32) == "tf32x3"
    with (
        pytest.raises(ValueError, match="fp32_precision: expected one of auto, ieee, tf32, tf32x3, got 'fp8'"),
        fastrnn.fp32_precision("fp8"),
    ):
        pass


def test_nothing_of_triton_is_imported_early(tmp_path):
    import subprocess
    import sys

    code = "import sys, fastrnn; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_saved_types():
    assert BACKENDS["triton"].saved_dtypes(torch.bfloat16) == (torch.bfloat16, torch.float32, torch.bfloat16)
