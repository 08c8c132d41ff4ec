"""The op around the backends: what autograd, transformations and careless callers may do to it."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

import fastrnn

CELLS = ["LSTMCell", "GRUCell", "RNNCell"]


def pair(name, *sizes, **options):
    """Our module and torch.nn's, with the same weights."""
    ours, theirs = getattr(fastrnn, name)(*sizes, **options), getattr(nn, name)(*sizes, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("batch", [1, 3, 12, 13, 20])
@pytest.mark.parametrize("name", CELLS)
def test_cell_gradients_at_any_batch(name, batch):
    ours, theirs = pair(name, 7, 9, dtype=torch.float64)
    x = torch.randn(batch, 7, dtype=torch.float64)
    for m in (ours, theirs):
        first(m(x)).pow(2).sum().backward()
    for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("sizes", [[500, 400, 300], [3, 900], [4, 6], [5, 0, 5]])
def test_packed_sequences_that_lie_about_their_rows_are_refused(sizes):
    with pytest.raises(RuntimeError, match="batch_sizes"):
        fastrnn.LSTM(3, 4)(PackedSequence(torch.randn(10, 3), torch.tensor(sizes)))


def test_packed_batch_sizes_of_another_dtype_are_refused():
    with pytest.raises(RuntimeError, match="int64"):
        fastrnn.LSTM(3, 4)(PackedSequence(torch.randn(10, 3), torch.tensor([5, 5], dtype=torch.int32)))


def test_batch_sizes_changed_after_forward_do_not_matter():
    m = fastrnn.LSTM(3, 4)
    sizes = torch.tensor([3, 2])
    y, _ = m(PackedSequence(torch.randn(5, 3), sizes))
    sizes[0] = 900
    y.data.sum().backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())


def test_projection_of_another_cell_is_refused():
    w = fastrnn.functional.Weights(
        torch.randn(12, 3), torch.randn(12, 2), torch.randn(12), torch.randn(12), torch.randn(2, 4)
    )
    with pytest.raises(RuntimeError, match="w_hr"):
        fastrnn.functional.gru(torch.randn(5, 2, 3), None, [w])


@pytest.mark.parametrize("name", CELLS)
def test_no_features(name):
    ours, theirs = pair(name, 0, 5)
    x = torch.zeros(20, 0)
    torch.testing.assert_close(first(ours(x)), first(theirs(x)))


def test_resets_changed_in_place_are_noticed():
    resets = torch.zeros(5, 2, dtype=torch.bool)
    y, _ = fastrnn.LSTM(3, 4)(torch.randn(5, 2, 3), resets=resets)
    resets[2] = True
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_outputs_may_be_edited_in_place_where_torch_allows_it(name):
    grads = []
    start = torch.randn(5, 2, 3)
    for m in pair(name, 3, 4):
        x = start.clone().requires_grad_()
        m(x)[0].mul_(2).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_gradients_of_the_two_biases_are_two_tensors():
    m = fastrnn.LSTM(3, 4)
    for rows in (2, 20):  # in the engine, and by a sum over all steps
        grads = torch.autograd.grad(m(torch.randn(rows, 1, 3))[0].sum(), list(m.parameters()))
        assert grads[2].data_ptr() != grads[3].data_ptr()


def test_retained_graph_gives_the_same_gradients_again():
    m = fastrnn.LSTM(3, 4)
    loss = m(torch.randn(20, 2, 3))[0].pow(2).sum()
    a = torch.autograd.grad(loss, list(m.parameters()), retain_graph=True)
    b = torch.autograd.grad(loss, list(m.parameters()))
    for u, v in zip(a, b, strict=True):
        assert torch.equal(u, v)


def test_saved_tensor_hooks_keep_what_they_were_given():
    kept = []

    def pack(t):
        kept.append((t, t.clone()))
        return t

    m = fastrnn.LSTM(3, 4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = m(torch.randn(20, 2, 3))[0].sum()
    loss.backward()
    assert kept
    assert all(torch.equal(t, copy) for t, copy in kept)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use, in forward mode
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_transformations_run_on_the_reference(name):
    ours, theirs = pair(name, 3, 4, dtype=torch.float64)
    x, t = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)
    for p in ours.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        slope = (theirs(x + 1e-6 * t)[0] - theirs(x - 1e-6 * t)[0]) / 2e-6
        want = theirs(x)[0]
    _, forward = torch.func.jvp(lambda v: ours(v)[0], (x,), (t,))
    torch.testing.assert_close(forward, slope, rtol=1e-6, atol=1e-8)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, t))[0]).tangent
    torch.testing.assert_close(dual, slope, rtol=1e-6, atol=1e-8)
    reverse = torch.func.grad(lambda v: (ours(v)[0] * t[..., :1]).sum())(x)
    y = x.clone().requires_grad_()
    (theirs(y)[0] * t[..., :1]).sum().backward()
    torch.testing.assert_close(reverse, y.grad)
    batched = torch.vmap(lambda v: ours(v)[0])(torch.stack([x, 2 * x]))
    torch.testing.assert_close(batched[0], want)


def test_negated_views_have_their_sign():
    ours, theirs = pair("LSTM", 3, 4)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(ours(torch._neg_view(x))[0], theirs(-x)[0])


def test_backward_inside_autocast_keeps_its_dtype():
    ours, theirs = pair("LSTM", 16, 16)
    x = torch.randn(20, 4, 16)
    for m in (ours, theirs):
        loss = m(x)[0].pow(2).sum()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss.backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_tanh_over_its_whole_range():
    """Through an RNN that does nothing else, against fp64, in units in the last place."""
    m = fastrnn.RNN(1, 1)
    with torch.no_grad():
        for p in m.parameters():
            p.zero_()
        m.weight_ih_l0.fill_(1.0)
        x = torch.cat([torch.linspace(-12, 12, 100001), torch.logspace(-20, 1, 10001)])
        y = m(x.view(1, -1, 1))[0].view(-1)
        odd = m(-x.view(1, -1, 1))[0].view(-1)
    want = np.tanh(x.double().numpy())
    ulp = np.spacing(np.maximum(np.abs(want), 1e-37).astype(np.float32)).astype(np.float64)
    assert (np.abs(y.double().numpy() - want) / ulp).max() < 2
    assert torch.equal(y, -odd)
