"""use_deterministic_algorithms(True): the same bits from run to run, dropout included, no environment variable."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import KINDS, B, H, I, T, leaves, usable_backends
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn

ROOT = Path(__file__).resolve().parents[1]
FORMS = ("equal", "lengths", "packed", "resets", "ragged with resets")


@pytest.fixture
def deterministic():
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def call(kind: str, form: str, seed: int = 5) -> list[torch.Tensor]:
    """Outputs, states and every gradient of a bidirectional stack with dropout, all from one seed."""
    torch.manual_seed(seed)
    name, extra = KINDS[kind]
    module = getattr(fastrnn, name)(I, H, 3, dropout=0.5, bidirectional=True, **extra)
    x = torch.randn(T, B, I, requires_grad=True)
    lengths, resets = torch.tensor([3, T, 0, 5, 4]), torch.rand(T, B) < 0.3
    keywords = {
        "equal": {},
        "lengths": {"lengths": lengths},
        "packed": {},
        "resets": {"resets": resets},
        "ragged with resets": {"lengths": lengths, "resets": resets},
    }[form]
    inputs = pack_padded_sequence(x, lengths.clamp(min=1), enforce_sorted=False) if form == "packed" else x
    outputs = leaves(module(inputs, **keywords))
    weighted = [(o * torch.randn_like(o)).sum() for o in outputs]
    return [*outputs, *torch.autograd.grad(sum(weighted), [x, *module.parameters()])]


def supported(form: str) -> list[str]:
    return usable_backends(ragged=form in ("lengths", "packed", "ragged with resets"), resets="resets" in form)


CASES = [(form, backend) for form in FORMS for backend in supported(form)]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(("form", "backend"), CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_from_run_to_run(kind, form, backend):
    with fastrnn.backend(backend):
        first, second, other = call(kind, form), call(kind, form), call(kind, form, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(a.isfinite().all() for a in first), "memory that was never written, which is NaN in this mode"
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True)), "the seed draws weights and dropout"


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(backend, name):
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        cell, x = getattr(fastrnn, name)(I, H), torch.randn(B, I, requires_grad=True)
        hx = None
        for _ in range(3):
            out = cell(torch.nn.functional.dropout(x), hx)
            hx = out
        outputs = leaves(out)
        results.append([*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), [x, *cell.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("form", FORMS)
def test_double_backward(form):
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        module = fastrnn.LSTM(I, H, 2, dropout=0.5)
        x = torch.randn(T, B, I, requires_grad=True)
        keywords = {"lengths": {"lengths": torch.tensor([3, T, 0, 5, 4])}}.get(form, {})
        if "resets" in form:
            keywords["resets"] = torch.rand(T, B) < 0.3
        inputs = pack_padded_sequence(x, torch.tensor([3, T, 1, 5, 4]), enforce_sorted=False) if form == "packed" else x
        (dx,) = torch.autograd.grad(leaves(module(inputs, **keywords))[0].square().sum(), x, create_graph=True)
        results.append([dx, *torch.autograd.grad(dx.square().sum(), list(module.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def digest(tensors: list[torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def main() -> None:
    """What the processes of the test below print."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    for form, backend in CASES:
        with fastrnn.backend(backend):
            print(form, backend, digest([t for kind in KINDS for t in call(kind, form)]))


def test_the_same_bits_from_process_to_process():
    environ = {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", "import test_determinism; test_determinism.main()"]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    printed = [process.communicate(timeout=120)[0].splitlines() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert len(printed[0]) == len(CASES)
    assert printed[0] == printed[1]
