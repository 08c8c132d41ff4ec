"""Several layers side by side on the Triton kernels."""

import pytest
import torch
import triton_support
from support import leaves
from triton_support import DEVICE, assert_equal

import fastrnn
from fastrnn.wavefront import SETTING

triton_support.require()


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_results_are_those_of_layers_one_after_the_other(monkeypatch, cell):
    module = getattr(fastrnn, cell)(3, 5, 2, backend="triton").to(DEVICE)
    x = torch.randn(5, 3, 3, device=DEVICE, requires_grad=True)
    lengths = torch.tensor([5, 0, 4], device=DEVICE)
    resets = torch.rand(5, 3, device=DEVICE) < 0.3
    found = []
    for setting in ("0", "2"):
        monkeypatch.setenv(SETTING, setting)
        outs = leaves(module(x, lengths=lengths, resets=resets))
        loss = sum((k + 1) * o.square().sum() for k, o in enumerate(outs))
        found.append([*outs, *torch.autograd.grad(loss, [x, *module.parameters()])])
    for k, (want, got) in enumerate(zip(*found, strict=True)):
        assert_equal(f"{cell} result {k}", got, want)


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_in_a_cuda_graph(monkeypatch):
    monkeypatch.setenv(SETTING, "16")
    module = fastrnn.LSTM(8, 16, 2, backend="triton").to(DEVICE)
    x = torch.randn(50, 4, 8, device=DEVICE)
    with torch.no_grad():
        want = module(x)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = module(x)[0]
    graph.replay()
    torch.cuda.synchronize()
    assert_equal("replayed", got, want)
