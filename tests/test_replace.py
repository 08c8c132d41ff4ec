"""fastrnn.replace: what is swapped, what is shared, what is reported."""

import pytest
import torch
from support import B, H, I, T, leaves
from torch import nn
from torch.nn.utils import parametrize, prune

import fastrnn

ALL = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, I)
        self.encoder = nn.LSTM(I, H, 2, bidirectional=True, batch_first=True, dropout=0.3)
        self.blocks = nn.ModuleList([nn.GRU(2 * H, H, batch_first=True), nn.RNN(H, H, nonlinearity="relu")])
        self.cell = nn.LSTMCell(H, H)
        self.again = self.blocks[0]  # one module in two places
        self.head = nn.Linear(H, 3)

    def forward(self, ids):
        x, _ = self.encoder(self.embed(ids))
        for block in self.blocks:
            x, _ = block(x)
        h, c = self.cell(x[:, 0])
        return self.head(h + c)


def test_model_keeps_its_numbers_and_parameters():
    model = Tagger().eval()
    ids = torch.randint(50, (B, T))
    want, parameters, keys = model(ids), dict(model.named_parameters()), list(model.state_dict())
    report = fastrnn.replace(model)
    assert [s.name for s in report] == ["encoder", "blocks.0", "blocks.1", "cell"]
    assert [s.kind for s in report] == [f"torch.nn.{k}" for k in ("LSTM", "GRU", "RNN", "LSTMCell")]
    assert report.model is model
    assert not report.skipped
    assert isinstance(model.encoder, fastrnn.LSTM)
    assert isinstance(model.blocks[1], fastrnn.RNN)
    assert model.again is model.blocks[0]
    assert list(model.state_dict()) == keys
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[n] is parameters[n] for n in after)
    torch.testing.assert_close(model(ids), want)
    assert "4 swapped, 0 skipped" in repr(report)
    assert "swapped blocks.1: torch.nn.RNN" in repr(report)
    assert not fastrnn.replace(model)  # nothing is left


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("training", [True, False])
def test_model_itself(name, training):
    old = getattr(nn, name)(I, H, bias=False).train(training)
    old.note = "kept"
    report = fastrnn.replace(old, backend="reference")
    new = report.model
    assert type(new) is getattr(fastrnn, name)
    assert type(old) is getattr(nn, name)
    assert repr(new) == repr(old)[:-1] + ", backend='reference')"
    assert new.training is training
    assert new.note == "kept"
    x = torch.randn(B, I) if "Cell" in name else torch.randn(T, B, I)
    for a, b in zip(leaves(new(x)), leaves(old(x)), strict=True):
        torch.testing.assert_close(a, b)
    assert "(the model itself)" in repr(report)
    new.load_state_dict(old.state_dict())
    old._parameters.clear()  # ours does not look at the old module any more
    assert len(list(new.parameters())) == 2


def test_optimizer_made_before_stays_valid():
    model = nn.Sequential(nn.GRU(I, H))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastrnn.replace(model)
    before = model[0].weight_hh_l0.detach().clone()
    model(torch.randn(T, B, I))[0].sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight_hh_l0, before)


def test_subclasses_are_left_alone_and_reported():
    class MyLSTM(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0] * 2

    parametrized = nn.GRU(I, H)
    parametrize.register_parametrization(parametrized, "weight_hh_l0", nn.Identity())
    model = nn.ModuleDict({"mine": MyLSTM(I, H), "par": parametrized, "plain": nn.GRU(I, H), "ours": fastrnn.GRU(I, H)})
    report = fastrnn.replace(model)
    assert [s.name for s in report] == ["plain"]
    assert [(s.name, s.kind) for s in report.skipped] == [("mine", "MyLSTM"), ("par", "ParametrizedGRU")]
    assert type(model["mine"]) is MyLSTM
    assert "skipped mine: MyLSTM (a subclass of torch.nn's module)" in repr(report)


def test_hooks_are_kept_and_a_lost_one_is_reported():
    module = nn.LSTM(I, H)
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append(type(m)))
    module.register_forward_hook(lambda m, args, out: seen.append("after"))
    module.register_load_state_dict_pre_hook(lambda m, *args: seen.append("loaded"))
    report = fastrnn.replace(nn.Sequential(module))
    new = report.model[0]
    new(torch.randn(T, B, I))
    assert seen == [fastrnn.LSTM, "after"]
    assert "lost load_state_dict_pre_hooks" in report[0].note
    del module
    new.load_state_dict(new.state_dict())  # does not meet the hook of a dead module
    assert "loaded" not in seen


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weight_norm_and_prune_survive():
    for wrap in (
        lambda m: nn.utils.weight_norm(m, "weight_hh_l0"),
        lambda m: prune.random_unstructured(m, "weight_hh_l0", 0.5),
    ):
        model = nn.Sequential(wrap(nn.GRU(I, H)))
        x = torch.randn(T, B, I)
        want = model(x)[0]
        assert len(fastrnn.replace(model)) == 1
        torch.testing.assert_close(model(x)[0], want)
        model(x)[0].sum().backward()
        assert all(p.grad is not None for p in model.parameters())
