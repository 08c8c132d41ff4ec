"""Training with either library's layers, side by side through the harness."""

from __future__ import annotations

import dataclasses
import json

import pytest

pytest.importorskip("lightning")

from benchmarks import end_to_end

SMALL = ["lm,hidden_size=8,emb_size=8,batch_size=4,bptt=7", "classify,hidden_size=8,emb_size=8,batches=packed"]


def test_a_run_gives_equal_losses_and_both_rates(tmp_path, capsys):
    assert end_to_end.main([*SMALL, "--rounds", "1", "--steps", "2", "--save", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.rglob("*.jsonl")
    environment, *records = map(json.loads, path.read_text().splitlines())
    assert SMALL[0] in environment["command"]
    assert [r["run"] for r in records] == SMALL
    out = capsys.readouterr().out
    for record in records:
        assert record["run"] in out
        assert record["loss_difference"] < 1e-5
        assert all(rate["p50"] > 0 for rate in record["tokens_per_s"].values())
        assert 0 < record["share_of_layers"] < 1


def test_another_model_has_other_losses(monkeypatch):
    real = end_to_end.train

    def other(kind, config, data, steps):
        return real(kind, dataclasses.replace(config, seed=1 + (config.layer == "torch")), data, steps)

    monkeypatch.setattr(end_to_end, "train", other)
    (record,) = end_to_end.measure(SMALL[0], [1], rounds=1, steps=1)
    assert record["loss_difference"] > 1e-5


def test_the_precision_is_that_of_the_run():
    """bf16 beside fp32: losses of the same start that differ by its rounding, and are close on both sides."""
    coarse, exact = (
        end_to_end.measure(f"{SMALL[0]},precision={name}", [1], rounds=1, steps=1)[0] for name in ("bf16", "fp32")
    )
    assert coarse["last_losses"][1] != exact["last_losses"][1]
    assert coarse["last_losses"][1] == pytest.approx(exact["last_losses"][1], rel=2e-2)
    assert coarse["loss_difference"] < 1e-2


def test_a_run_is_a_preset_with_changes_and_data():
    name, kind, config = end_to_end.configuration("shakespeare-char,cell=gru,clip=0.5=some/text.txt")
    assert (name, kind.name, config.cell, config.clip) == ("shakespeare-char,cell=gru,clip=0.5", "lm", "gru", 0.5)
    assert (config.data, config.hidden_size) == ("some/text.txt", 512)
    assert end_to_end.configuration("imdb=aclImdb.tar.xz")[2].data == "aclImdb.tar.xz"
    assert end_to_end.configuration("lm")[2].data is None
    assert end_to_end.configuration("lm,cell=gru")[2].data is None
    assert end_to_end.configuration("lm,cell=gru=data/a=b")[2].data == "data/a=b"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["imbd=x"], "no preset imbd, did you mean 'imdb'?; there are: "),
        (["lm,cell"], "lm,cell: expected option=value after a comma, got cell"),
        (["lm", "lm,sell=gru"], "lm,sell=gru: there is no option sell here, did you mean 'cell'?"),
        (["lm,layer=torch"], "lm,layer=torch: there is no option layer here"),
        (["lm,print_config="], "lm,print_config=: there is no option print_config here"),
        (["lm,cell=gnu"], "--cell: expected one of "),
        (["lm", "lm,hidden_size=0"], "--hidden-size must be at least 1, got 0"),
        (["--steps", "0"], "argument --steps: expected a number of at least 1, got 0"),
        (["--round", "2"], "unknown option --round, did you mean '--rounds'?"),
    ],
)
def test_bad_runs_and_options_are_one_line_before_anything_is_measured(words, told, monkeypatch, capsys):
    monkeypatch.setattr(end_to_end, "measure", lambda *_: pytest.fail("measured"))
    assert end_to_end.main([*words, "--threads", "1"]) == 2
    seen = capsys.readouterr().err
    assert seen.startswith(f"python -m benchmarks.end_to_end: error: {told}")
    assert seen.count("\n") == 1


def test_data_that_is_not_there_is_one_line(capsys):
    assert end_to_end.main(["lm=no/such/file"]) == 2
    seen = capsys.readouterr().err
    assert "no/such/file" in seen
    assert seen.count("\n") == 1
