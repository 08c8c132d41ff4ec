"""docs/scaling.md: its counts are those of the models that `fastrnn train lm` builds, its tables those of its code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from docs_support import python_blocks

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
OPTIONS = {
    "Zaremba small": {"preset": "ptb-small"},
    "Zaremba medium": {"emb_size": 650, "hidden_size": 650, "layers": 2},
    "Zaremba large": {"emb_size": 1500, "hidden_size": 1500, "layers": 2},
    "AWD-LSTM": {"preset": "awd-ptb"},
}


@pytest.fixture(scope="module")
def page():
    scope = {}
    for block in python_blocks(PAGE):
        exec(compile(block, str(PAGE), "exec"), scope)
    return scope


@pytest.mark.parametrize("name", OPTIONS)
def test_parameters_are_those_of_the_model(page, name):
    pytest.importorskip("lightning", reason="needs the extra [train]")
    from fastrnn.text import LanguageModel, LmConfig

    options = dict(OPTIONS[name])
    if "preset" in options:
        preset = PAGE.parent.parent / "fastrnn" / "text" / "presets" / "lm" / f"{options.pop('preset')}.yaml"
        options = pytest.importorskip("yaml").safe_load(preset.read_text())
    assert page["MODELS"].keys() == OPTIONS.keys()
    with torch.device("meta"):
        model = LanguageModel(LmConfig(**options), page["VOCABULARY"])
    sizes = {key: p.numel() for key, p in model.named_parameters()}  # a shared one once
    layer = "rnn.layers.0." if any(key.startswith("rnn.layers.") for key in sizes) else "rnn."
    first = [key for key in sizes if key.startswith(layer) and key.removesuffix("_raw").endswith("_l0")]
    last = sum(sizes[key] for key in [*first, "embedding.weight"])
    assert page["parameters"](*page["MODELS"][name]) == (sum(sizes.values()), last)


@pytest.mark.parametrize("name", ["table", "small", "ratios"])
def test_tables_are_those_of_the_code(page, name):
    assert f"|\n{page[name]()}\n\n" in PAGE.read_text()


def test_the_step_that_was_measured_is_that_of_its_output(page):
    output = (PAGE.parent / "results" / "ptb.log").read_text()
    (milliseconds,) = re.findall(r"^training step of this model: fastrnn ([\d.]+) ms", output, re.MULTILINE)
    assert page["small"](float(milliseconds) / 1e3) == page["small"]()
    assert f"{milliseconds} ms" in PAGE.read_text()


def test_an_all_reduce_by_messages(page):
    """The formula against a ring played through: in each of 2 (N - 1) rounds every process sends a share of G."""
    n, size, bandwidth, latency = 7, 1e6, 3e8, 2e-5
    rounds = [latency + size / n / bandwidth for _ in ("reduce", "gather") for _ in range(n - 1)]
    assert page["all_reduce"](n, size, bandwidth, latency) == pytest.approx(sum(rounds))
    assert page["all_reduce"](1, size, bandwidth, latency) == 0


def test_strong_scaling_stays_below_its_serial_part(page):
    for n in (2, 8, 1000):
        assert n * page["strong"](0.1, n, 0.0, 0.2) < 1 / 0.2
        assert page["strong"](0.1, n, 0.0, 0.0) == pytest.approx(1)
        assert page["strong"](0.1, n, 0.01, 0.2) < page["weak"](0.1, n, 0.01) < 1
