"""Layers side by side in chunks: the numbers of layers one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from new_cell_support import NAME, page, peephole
from support import KINDS, assert_equal, error, leaves
from tolerances import ENGINE
from wavefront_support import CHUNK, MASKS, B, H, I, Padded, T, build, inputs, needs_engine

import fastrnn
from fastrnn import backends, wavefront
from fastrnn.backends import BACKENDS
from fastrnn.backends.base import Query
from fastrnn.wavefront import SETTING, decide
from fastrnn.wavefront import lanes as streams

__all__ = ["page"]  # a fixture
D = torch.float64
pytestmark = needs_engine
SORTS = [  # save, dtype, are initial states given, dropout
    ("gates", D, True, 0.4),
    ("gates", D, False, 0.0),
    ("states", D, True, 0.4),
    ("states", torch.float32, False, 0.4),
    ("gates", torch.float32, True, 0.0),
]


@pytest.fixture
def padded(monkeypatch):
    """The backend "cpu" takes padded batches, as those for GPUs do."""
    monkeypatch.setitem(BACKENDS, "cpu", Padded())
    backends.clear_choices()
    yield
    backends.clear_choices()


def run(monkeypatch, setting: str, module: Any, x: Any, hx: Any, seed: int = 3, **options: Any) -> dict[str, Any]:
    """Outputs and all gradients, by name, with FASTRNN_WAVEFRONT as `setting` says."""
    monkeypatch.setenv(SETTING, setting)
    torch.manual_seed(seed)
    outs = leaves(module(x, hx, **options))
    names = dict(module.named_parameters()) | {"input": x} | dict(zip(("h_0", "c_0"), leaves(hx), strict=False))
    names = {name: a for name, a in names.items() if a.requires_grad}
    torch.manual_seed(4)
    grads = torch.autograd.grad(outs, list(names.values()), [torch.randn_like(o) for o in outs])
    return dict(zip(("output", "h_n", "c_n"), outs, strict=False)) | {
        f"gradient of {name}": g for name, g in zip(names, grads, strict=True)
    }


@pytest.fixture
def counted(monkeypatch):
    """The number of stacks that ran as wavefronts."""
    calls: list[int] = []
    lanes_of = streams.lanes_of
    monkeypatch.setattr(streams, "lanes_of", lambda *a: calls.append(1) or lanes_of(*a))
    return calls


def compare(got: dict[str, Any], want: dict[str, Any], what: str) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_equal(f"{what} {name}", got[name], value)


@pytest.mark.usefixtures("padded", "poisoned")
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_those_of_layers_one_after_the_other(monkeypatch, counted, kind, masks):
    for save, dtype, states, dropout in SORTS:
        module = build(kind, dtype, save=save, dropout=dropout)
        x, hx = inputs(module, dtype, states)
        want = run(monkeypatch, "0", module, x, hx, **MASKS[masks])
        assert not counted
        got = run(monkeypatch, str(CHUNK), module, x, hx, **MASKS[masks])
        assert len(counted) == 2, "forward and backward"
        compare(got, want, f"{kind} {masks} {save} states={states} dropout={dropout}")
        with torch.no_grad():
            torch.manual_seed(3)
            outs = leaves(module(x, hx, **MASKS[masks]))
        assert len(counted) == 3
        counted.clear()
        assert all(torch.equal(a, b) for a, b in zip(outs, got.values(), strict=False)), "inference"


@pytest.mark.parametrize("chunk", [1, 4, 5, 9])
@pytest.mark.parametrize("layers", [1, 2, 6])
def test_chunks_and_layers_of_any_number(monkeypatch, counted, layers, chunk):
    module = build("lstm", layers=layers, batch_first=True)
    x, hx = inputs(module)
    x, resets = x.detach().transpose(0, 1).requires_grad_(), MASKS["resets"]["resets"].t()
    got, want = [run(monkeypatch, setting, module, x, hx, resets=resets) for setting in (str(chunk), "0")]
    compare(got, want, f"chunks of {chunk}")
    assert len(counted) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bits_are_as_near_the_truth_as_ever(monkeypatch, kind, dtype):
    module = build(kind, dtype)
    x, hx = inputs(module, dtype)
    got = run(monkeypatch, str(CHUNK), module, x, hx)
    wide = build(kind)
    wide.load_state_dict(module.state_dict())
    as_wide = [a.detach().double().requires_grad_() for a in leaves(hx)]
    truth = run(
        monkeypatch, "0", wide, x.detach().double().requires_grad_(), tuple(as_wide) if len(as_wide) > 1 else as_wide[0]
    )
    for name, want in truth.items():
        if name.startswith("gradient"):
            continue  # the gradients of outputs are other random numbers
        assert (e := error(got[name], want)) <= ENGINE[dtype], f"{kind} {name}: {e:.2e}"


@pytest.mark.parametrize(
    "wanted", [["input"], ["h_0"], ["weight_ih_l2"], ["bias_hh_l1", "weight_hh_l2"], ["c_0", "bias_ih_l0"]]
)
def test_only_what_is_asked_for(monkeypatch, wanted):
    module = build("lstm")
    x, hx = inputs(module)
    for name, a in (dict(module.named_parameters()) | {"input": x, "h_0": hx[0], "c_0": hx[1]}).items():
        a.requires_grad_(name in wanted)
    got, want = [run(monkeypatch, s, module, x, hx) for s in (str(CHUNK), "0")]
    assert sum(name.startswith("gradient") for name in got) == len(wanted)
    compare(got, want, str(wanted))


def test_one_output_alone(monkeypatch):
    module = build("lstm")
    x, hx = inputs(module)
    for pick in range(3):
        found = []
        for setting in (str(CHUNK), "0"):
            monkeypatch.setenv(SETTING, setting)
            out = leaves(module(x, hx))[pick]
            found.append(torch.autograd.grad(out.sum(), [x, *hx, *module.parameters()], allow_unused=True))
        for a, b in zip(*found, strict=True):
            assert_equal(f"output {pick}", a, b)


def test_second_derivatives_and_a_graph_walked_twice(monkeypatch):
    found = []
    module = build("gru", dropout=0.3)
    x, hx = inputs(module)
    for setting in (str(CHUNK), "0"):
        monkeypatch.setenv(SETTING, setting)
        torch.manual_seed(3)
        y, h = module(x, hx)
        once = torch.autograd.grad(y.square().sum() + h.sum(), [x, hx], retain_graph=True)
        again = torch.autograd.grad(y.square().sum() + h.sum(), [x, hx], create_graph=True)
        found.append([*once, *again, *torch.autograd.grad(again[0].square().sum(), [x, hx, *module.parameters()])])
    for k, (a, b) in enumerate(zip(*found, strict=True)):
        assert_equal(f"derivative {k}", a, b)


def test_saved_tensors_may_be_kept_elsewhere(monkeypatch):
    module = build("lstm")
    x, hx = inputs(module)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        got = run(monkeypatch, str(CHUNK), module, x, hx)
    compare(got, run(monkeypatch, "0", module, x, hx), "hooked")


def test_who_sees_operations_goes_the_ordinary_way(monkeypatch, counted):
    monkeypatch.setenv(SETTING, str(CHUNK))
    module = build("rnn_tanh")
    x, _ = inputs(module)
    torch.func.vmap(lambda a: module(a.unsqueeze(1))[0], in_dims=1)(x.detach())
    torch.func.grad(lambda a: module(a)[0].sum())(x.detach())
    torch.export.export(module, (x.detach(),))
    assert not counted


QUERY = Query("lstm", "cuda", torch.bfloat16, 512, 8, 64, 64, 64, 1)


class Half(type(BACKENDS["triton"])):  # type: ignore[misc]
    part = 0.5

    def share(self, query: Query) -> float:
        return self.part


def test_the_rule(monkeypatch):
    monkeypatch.delenv(SETTING, raising=False)
    monkeypatch.setattr(wavefront, "_captured", lambda query: False)
    engine = Half()
    assert decide(engine, QUERY, 2) == (256, "wavefront: 2 layers, 2 chunks of 256 steps", 2)
    assert decide(engine, QUERY, 3) == (256, "wavefront: 3 layers, 2 at a time, 2 chunks of 256 steps", 2)
    assert decide(engine, QUERY._replace(T=513), 2).steps == 171
    assert "one chunk" in decide(engine, QUERY._replace(T=256), 2).reason
    assert "this is cpu" in decide(engine, QUERY._replace(device="cpu"), 2).reason
    assert "two directions" in decide(engine, QUERY._replace(S=2), 2).reason
    assert "packed" in decide(engine, QUERY._replace(ragged=True), 2).reason
    assert decide(engine, QUERY._replace(ragged=True, lengths=True), 2).steps
    assert "all states" in decide(engine, QUERY, 2, trail=True).reason
    assert "native is not run in chunks" in decide(BACKENDS["native"], QUERY, 2).reason
    assert "unknown" in decide(engine, QUERY._replace(T=torch.SymInt), 2).reason  # anything that is no int
    engine.part = 0.75
    assert decide(engine, QUERY, 2)[:2] == (0, "layers one after the other: one of them takes 75% of the GPU")
    assert not decide(engine, QUERY._replace(T=0), 2).steps
    monkeypatch.setenv(SETTING, "64")
    assert decide(engine, QUERY._replace(device="cpu"), 2).steps == 64
    assert not decide(engine, QUERY._replace(S=2), 2).steps
    monkeypatch.setenv(SETTING, "0")
    assert decide(Half(), QUERY, 2)[:2] == (0, "layers one after the other: FASTRNN_WAVEFRONT=0")


def test_a_cell_with_parameters_of_its_units_says_why_not(monkeypatch, counted, page):
    """Also where chunks are forced, whatever backend takes such cells."""
    monkeypatch.setenv(SETTING, str(CHUNK))
    query, reason = QUERY._replace(cell=NAME), "layers one after the other: the cell has per-unit parameters"
    assert decide(Half(), query, 2)[:2] == (0, reason)
    assert decide(Half(), QUERY, 2).steps == CHUNK
    takes = {name: BACKENDS[name] for name in BACKENDS if BACKENDS[name].takes_params and name != "reference"}
    assert {decide(engine, query, 2)[:2] for engine in takes.values()} == {(0, reason)}
    module, x = peephole(page, I, H, num_layers=2), torch.randn(T, B, I, dtype=D)
    want = module(x)[0]
    monkeypatch.setattr(BACKENDS["reference"], "differentiable", False)
    got = module(x)[0]
    assert not counted
    assert_equal("y", got, want)


def test_chunks_are_short_where_a_graph_starts_them(monkeypatch):
    monkeypatch.delenv(SETTING, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert decide(Half(), QUERY, 2).steps == 64


@pytest.mark.parametrize("value", ["", "-1", "on", "1.5"])
def test_a_setting_that_is_none(monkeypatch, value):
    monkeypatch.setenv(SETTING, value)
    with pytest.raises(ValueError, match=f"FASTRNN_WAVEFRONT: expected .*got '{value}'"):
        build("gru")(torch.zeros(T, B, I, dtype=D))


def test_explain_says_it(monkeypatch, capsys):
    module, x = build("gru"), torch.zeros(T, B, I, dtype=D)
    monkeypatch.delenv(SETTING, raising=False)
    assert "; layers one after the other: a wavefront is for CUDA" in fastrnn.explain(module, x).reason
    monkeypatch.setenv(SETTING, str(CHUNK))
    assert "; wavefront: 3 layers, 1 at a time, 4 chunks of 3 steps" in fastrnn.explain(module, x).reason
    assert "wavefront" in capsys.readouterr().out
    assert "; the input's product beside the recurrence, 4 chunks" in fastrnn.explain(build("gru", layers=1), x).reason
    monkeypatch.setenv(SETTING, "0")
    assert "layers" not in fastrnn.explain(build("gru", layers=1), x).reason
