"""Every script in examples/, run with small settings: it ends, and has learnt or shown what it says."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
Outcome = dict[str, float]


class Run(NamedTuple):
    """A script with options that make it small, the packages that it needs, and what must hold of what it returns."""

    options: str
    needs: tuple[str, ...]
    holds: Callable[[Outcome], bool]


EXAMPLES = {
    "language_model": Run(
        "--steps 60 --size 48 --batch 16 --bptt 24 --sample 20", (), lambda o: o["loss"] < o["unigram"] - 0.4
    ),
    "lstm_classifier": Run(
        "--epochs 1 --max-length 12", ("lightning", "tokenizers"), lambda o: o["accuracy"] > 2.5 / o["classes"]
    ),
    "translation": Run("--steps 20 --size 32 --batch 16", (), lambda o: o["last"] < 0.7 * o["first"]),
    "recurrent_policy": Run("--iterations 25 --longest 4 --steps 24 --size 24", (), lambda o: o["return"] > 0.5),
    "streaming": Run(
        "--steps 40 --size 32 --batch 16 --frames 200",
        (),
        lambda o: o["loss"] < 0.4 and o["wrong"] < 0.15 and o["difference"] < 2e-5,
    ),
    "ensemble": Run(
        "--steps 40 --size 16 --members 3",
        (),
        lambda o: o["last"] < 0.2 * o["first"] and o["strange"] > 2 * o["known"],
    ),
    "private_classifier": Run(
        "--epochs 2 --examples 384 --noise 0.6", ("opacus",), lambda o: o["accuracy"] > 0.6 and 0 < o["epsilon"] < 50
    ),
    "onnx_export": Run("", ("onnx", "onnxscript", "onnxruntime"), lambda o: o["difference"] < 2e-5),
}


def test_every_example_is_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing",  # what Opacus and torch.onnx warn of within
    "ignore:Secure RNG turned off",
    "ignore:Optimal order is the",
    "ignore:.isinstance.treespec, LeafSpec.:FutureWarning",
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
)
def test_an_example(name, tmp_path, monkeypatch, capsys):
    for package in EXAMPLES[name].needs:
        pytest.importorskip(package, reason=f"needs {package}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)
    script = importlib.import_module(name)
    outcome = script.main(EXAMPLES[name].options.split())
    print(outcome)
    assert EXAMPLES[name].holds(outcome), outcome
    assert capsys.readouterr().out.count("\n") > 1, "says what it did"
    assert not list(tmp_path.iterdir()), "leaves nothing behind"
