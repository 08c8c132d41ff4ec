"""fastrnn.tune: what is measured, kept and looked up. In the interpreter, with a clock of the test's own."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton_support
from triton_support import DEVICE, TRITON

import fastrnn
from fastrnn.backends import BACKENDS, choose, clear_choices
from fastrnn.backends.triton import device, plan, tuning
from fastrnn.backends.triton.plan import STEPWISE

triton_support.require()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTRNN_CACHE", str(tmp_path))
    tuning.forget()
    clear_choices()
    yield tmp_path
    tuning.forget()
    clear_choices()


class Clock:
    """Calls each function once, and says that it took what `seconds` says of the plan in force."""

    def __init__(self, native=5.0):
        self.native, self.seen = native, []

    def __call__(self, function):
        function()
        forced = {k.backward: v for k, v in tuning._forced.items()}
        if function.args[0] == "native":
            return self.native
        self.seen.append((function.args[1], forced[function.args[1]]))
        return 1.0 if forced[function.args[1]].schedule == STEPWISE else 2.0


def _module():
    return fastrnn.LSTM(3, 5, 2).to(DEVICE), torch.randn(2, 3, 3, device=DEVICE)


def test_the_best_plan_is_kept_and_taken(cache):
    module, x = _module()
    with torch.no_grad():
        query = module._prepare(x, None, None, None).query
    before = tuning.decide(tuning.problem_of(query, "tf32", False), "lstm", device.limits(DEVICE))
    assert before[0].schedule == "resident"
    clock = Clock()
    found = fastrnn.tune(module, x, timer=clock)
    assert {backward for backward, _ in clock.seen} == {False, True}
    assert {p.schedule for _, p in clock.seen} == set(plan.SCHEDULES)
    assert {f.plan.schedule for f in found.values()} == {STEPWISE}
    tuning.forget()  # as a new process
    after, reason = tuning.decide(tuning.problem_of(query, "tf32", False), "lstm", device.limits(DEVICE))
    assert (after.schedule, reason) == (STEPWISE, "measured, 1000000 us")
    assert not tuning._forced
    (file,) = cache.glob("*.json")
    assert set(json.loads(file.read_text())) == set(found)
    other = tuning.problem_of(query._replace(H=6), "tf32", False)
    assert tuning.decide(other, "lstm", device.limits(DEVICE))[0].schedule == "resident"


@pytest.mark.parametrize(("native", "faster"), [(5.0, True), (0.5, False)])
def test_auto_goes_by_the_measurement(cache, monkeypatch, native, faster):
    module, x = _module()
    query = module._prepare(x, None, None, None).query
    assert "not measured" in TRITON.passed_over(query)
    fastrnn.tune(module, x, timer=Clock(native))
    assert tuning.faster_than_native(query, "tf32") is faster
    monkeypatch.setattr(BACKENDS["cpu"], "unsupported", lambda query: "not in this test")
    clear_choices()
    assert choose(query).backend.name == ("triton" if faster else "native")
    assert faster or "measured to be slower" in choose(query).reason


def test_inference_alone(cache):
    module, x = _module()
    with torch.no_grad():
        found = fastrnn.tune(module, x, timer=Clock())
    assert [key.split()[1] for key in found] == ["forward"]


def test_resets_have_no_counterpart(cache):
    module, x = _module()
    resets = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    with torch.no_grad():
        (finding,) = fastrnn.tune(module, x, resets=resets, timer=Clock()).values()
    assert finding.native == float("inf")


def test_findings_of_several_writers_are_all_kept(cache):
    limits = device.limits(DEVICE)
    finding = tuning.Finding(plan.Plan(STEPWISE, 16, 32, 32, 4), 1.0, 2.0)
    for name in "abc":
        tuning.record({name: finding}, limits)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda k: tuning.record({f"d{k}": finding}, limits), range(20)))
    assert set(tuning._read(tuning.path(limits))) == {*"abc", *(f"d{k}" for k in range(20))}
    assert not [name for name in os.listdir(cache) if name.startswith(".")]


def test_a_foreign_file_is_named(cache):
    limits = device.limits(DEVICE)
    for text in ("{", '{"a": [1]}', "[]"):
        tuning.path(limits).write_text(text)
        tuning.forget()
        with pytest.raises(RuntimeError, match=r"\.json: expected what fastrnn.tune has found"):
            tuning._read(tuning.path(limits))


def test_other_shapes_keep_their_plan_while_one_is_measured(cache):
    """A plan of another hidden size would leave units out."""
    problem = plan.Problem(4, 16, 3, 1, 4, "tf32", False)
    limits = device.limits(DEVICE)
    forced = plan.plan(problem, limits, "resident")[0]
    with tuning._force(problem, forced):
        assert tuning.decide(problem, "lstm", limits) == (forced, "being measured")
        for other in (problem._replace(H=64), problem._replace(backward=True), problem._replace(B=200)):
            assert tuning.decide(other, "lstm", limits)[0] == plan.plan(other, limits)[0]


def test_gradients_of_the_input_alone(cache):
    module, x = _module()
    module.requires_grad_(False)
    found = fastrnn.tune(module, x.requires_grad_(), timer=Clock())
    assert [key.split()[1] for key in found] == ["forward", "backward"]


def test_what_cannot_be_tuned(cache):
    with pytest.raises(TypeError, match=r"module: expected fastrnn.RNN, LSTM or GRU, got LSTM"):
        fastrnn.tune(torch.nn.LSTM(3, 4), torch.randn(2, 1, 3))
    with pytest.raises(ValueError, match=r"module.backend: expected 'auto', got 'triton'"):
        fastrnn.tune(fastrnn.LSTM(3, 4, backend="triton").to(DEVICE), torch.randn(2, 1, 3, device=DEVICE))
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run this call: its kernels calculate in fp32"):
        fastrnn.tune(fastrnn.LSTM(3, 4).double().to(DEVICE), torch.randn(2, 1, 3, device=DEVICE).double())


def test_the_clock_measures():
    measure = tuning.timer("cpu", seconds=0.01, rounds=3)
    fast, slow = measure(lambda: None), measure(lambda: torch.randn(200_000).sort())
    assert 0 < fast < slow


def test_the_clock_waits_for_the_device_of_the_call(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    tuning.timer("cuda", seconds=0.0, rounds=2, index=1)(lambda: None)
    assert waits == [1, 1, 1]
