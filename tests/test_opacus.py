"""fastrnn.opacus: Opacus sees each sample's gradient, through outputs and final states alike, and trains."""

from __future__ import annotations

import copy

import pytest
import torch
from support import KINDS, B, H, I, T, assert_equal, leaves
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

pytest.importorskip("opacus", reason="needs Opacus")

from opacus import PrivacyEngine
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator

import fastrnn
import fastrnn.opacus

CELLS = ("RNNCell", "LSTMCell", "GRUCell")
LENGTHS = [3, T, 1, 5, 4]
OPTIONS = [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"num_layers": 3, "bias": False}]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha"),
]


def fixed(module: nn.Module) -> nn.Module:
    return ModuleValidator.fix(nn.Sequential(module))[0]


def draw(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input, h_0, c_0 and resets, in the module's layout."""
    streams = module.num_layers * (2 if module.bidirectional else 1)
    shape = (B, T) if module.batch_first else (T, B)
    h = torch.randn(streams, B, module.proj_size or H, dtype=torch.float64)
    c = torch.randn(streams, B, H, dtype=torch.float64)
    return torch.randn(*shape, I, dtype=torch.float64), h, c, torch.rand(shape) < 0.3


def calls(module: nn.Module, drawn: tuple[torch.Tensor, ...], rows: slice = slice(None)):
    """The same batch, or rows of it, in every form; a sample alone is a batch of one."""
    x, h, c, resets = drawn
    x, resets = (x[rows], resets[rows]) if module.batch_first else (x[:, rows], resets[:, rows])
    hx = (h[:, rows], c[:, rows]) if module.mode == "LSTM" else h[:, rows]
    lengths = torch.tensor(LENGTHS)[rows]
    packed = pack_padded_sequence(x, lengths, module.batch_first, enforce_sorted=False)
    yield "padded", lambda m: m(x)
    yield "states", lambda m: m(x, hx)
    yield "ragged", lambda m: m(x, hx, lengths=lengths, resets=resets)
    yield "packed", lambda m: m(packed, hx)


def objective(outputs) -> torch.Tensor:
    """Of every output and state, and a sum over the samples."""
    return sum(k * o.square().sum() + o.sum() for k, o in enumerate(leaves(outputs), 1))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_each_sample(kind, options):
    name, extra = KINDS[kind]
    plain = getattr(fastrnn, name)(I, H, **extra, **options, dtype=torch.float64)
    private = fixed(plain)
    assert isinstance(private, getattr(fastrnn, name))
    assert list(private.state_dict()) == list(plain.state_dict())
    wrapped, drawn = GradSampleModule(private, loss_reduction="sum"), draw(plain)
    for form, call in calls(plain, drawn):
        outputs = call(wrapped)
        for a, b in zip(leaves(outputs), leaves(call(plain)), strict=True):
            assert_equal(f"{form}: output or state", a, b)
        objective(outputs).backward()
        for b in range(B):
            alone = dict(calls(plain, drawn, slice(b, b + 1)))[form]
            want = torch.autograd.grad(objective(alone(plain)), list(plain.parameters()))
            for (key, p), w in zip(private.named_parameters(), want, strict=True):
                assert_equal(f"{form}: sample {b}, {key}", p.grad_sample[b], w)
        wrapped.zero_grad()


@pytest.mark.parametrize("name", CELLS)
def test_gradients_of_each_sample_through_a_cell_called_twice(name):
    plain = getattr(fastrnn, name)(I, I, dtype=torch.float64)
    wrapped = GradSampleModule(fixed(plain), loss_reduction="sum")
    x = torch.randn(B, I, dtype=torch.float64)
    hx = (x + 1, x - 1) if name == "LSTMCell" else x + 1

    def twice(cell, x, hx):
        return objective(cell(x.cos(), cell(x, hx)))

    twice(wrapped, x, hx).backward()
    for b in range(B):
        own = tuple(a[b] for a in hx) if name == "LSTMCell" else hx[b]
        want = torch.autograd.grad(twice(plain, x[b], own), list(plain.parameters()))
        for (key, p), w in zip(wrapped.named_parameters(), want, strict=True):
            assert_equal(f"sample {b}, {key}", p.grad_sample[b], w)


def test_the_same_dropout_in_the_hook_as_in_the_forward():
    """The mean of the samples' gradients is the batch's, masks included."""
    private = fixed(fastrnn.LSTM(I, H, 3, dropout=0.5, dtype=torch.float64))
    wrapped = GradSampleModule(private, loss_reduction="sum")
    objective(wrapped(torch.randn(T, B, I, dtype=torch.float64))).backward()
    for key, p in private.named_parameters():
        assert_equal(key, p.grad_sample.sum(0), p.grad)
    x = torch.randn(T, B, I, dtype=torch.float64)
    assert not torch.equal(wrapped(x)[0], wrapped(x)[0])
    assert torch.equal(wrapped.eval()(x)[0], wrapped(x)[0])


def test_frozen_parameters_unbatched_input_and_empty_batches():
    private = fixed(fastrnn.GRU(I, H))
    private.weight_hh_l0.requires_grad_(False)
    wrapped = GradSampleModule(private)
    objective(wrapped(torch.randn(T, I))).backward()
    assert private.weight_ih_l0.grad_sample.shape == (1, 3 * H, I)
    assert getattr(private.weight_hh_l0, "grad_sample", None) is None
    wrapped.zero_grad()
    objective(wrapped(torch.randn(T, 0, I))).backward()  # which Poisson sampling may draw
    assert private.weight_ih_l0.grad_sample.shape == (0, 3 * H, I)


def test_what_opacus_says():
    """It refuses torch.nn's LSTM and ours, and names what ModuleValidator.fix puts in their place."""
    for name in ("RNN", "LSTM", "GRU", *CELLS):
        model = nn.Sequential(getattr(fastrnn, name)(I, H, backend="reference"))
        (refusal,) = ModuleValidator.validate(model)
        assert f"fastrnn.opacus.DP{name}" in str(refusal)
        repaired = ModuleValidator.fix(model)
        assert ModuleValidator.validate(repaired) == []
        assert repaired[0].backend == "reference"
        copy.deepcopy(repaired)
    assert len(ModuleValidator.validate(nn.Sequential(nn.LSTM(I, H)))) == 1


def test_the_other_layout_of_opacus_is_refused():
    wrapped = GradSampleModule(fixed(fastrnn.RNN(I, H)), batch_first=False)
    with pytest.raises(ValueError, match="batch_first=True"):
        objective(wrapped(torch.randn(T, B, I))).backward()


class Classifier(nn.Module):
    """By the final state, from embedded tokens of different lengths; to be learnt is what the last token was."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, I)
        self.lstm = fastrnn.LSTM(I, H, batch_first=True)
        self.head = nn.Linear(H, 2)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(tokens), lengths=lengths)[1][0][0])


def test_dp_sgd_trains_a_classifier():
    tokens, lengths = torch.randint(20, (128, T)), torch.randint(2, T + 1, (128,))
    data = torch.utils.data.TensorDataset(tokens, lengths, (tokens[torch.arange(128), lengths - 1] > 9).long())
    model = ModuleValidator.fix(Classifier())
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.02),
        data_loader=torch.utils.data.DataLoader(data, batch_size=32),
        noise_multiplier=0.6,
        max_grad_norm=1.0,
    )
    losses = []
    for _ in range(10):
        total = []
        for x, n, target in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x, n), target)
            loss.backward()
            assert model._module.lstm.weight_hh_l0.grad_sample.shape == (len(x), 4 * H, H)
            optimizer.step()
            total.append(loss.item())
        losses.append(sum(total) / len(total))
    assert losses[-1] < 0.7 * losses[0], losses
    assert 0 < engine.get_epsilon(1e-3) < 100
