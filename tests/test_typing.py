"""A user's typed code: mypy, strict, sees what the modules and functions take and give."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastrnn

ROOT = Path(__file__).resolve().parents[1]
TENSOR = "torch._tensor.Tensor"
PAIR = f"tuple[{TENSOR}, {TENSOR}]"
PACKED = "torch.nn.utils.rnn.PackedSequence"
START = """
from collections.abc import Mapping
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
import fastrnn
from fastrnn.functional import Weights
x, h = torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
packed = pack_sequence([x[:, 0]])
lstm, gru, rnn = fastrnn.LSTM(3, 4, backend="cpu"), fastrnn.GRU(3, 4, 2, dropout=0.5), fastrnn.RNN(3, 4, 1, "relu")
weights = [Weights(x, x, None, None, None)]
mask: Tensor | None = None
"""
# expression: its type, or the part of it that counts
REVEALED = {
    "lstm(x)": f"tuple[{TENSOR}, {PAIR}]",
    "lstm(x, (h, h), lengths=torch.tensor([5, 2]), resets=mask)[1][1]": TENSOR,
    "lstm(packed)[0]": PACKED,
    "lstm(packed)[1]": PAIR,
    "gru(x, h, lengths=[5, 2])": PAIR,
    "rnn(packed)[0]": PACKED,
    "lstm(x, return_states=True)": f"tuple[{TENSOR}, {PAIR}, tuple[{TENSOR}, ...]]",
    "fastrnn.functional.gru(x, h, weights, return_states=True)[2]": f"tuple[{TENSOR}, ...]",
    "fastrnn.LSTMCell(3, 4)(x[0], (h[0], h[0]))": PAIR,
    "fastrnn.GRUCell(3, 4)(x[0])": TENSOR,
    "fastrnn.RNNCell(3, 4, nonlinearity='relu')(x[0], h[0])": TENSOR,
    "fastrnn.functional.lstm(x, None, weights, lengths=[5, 2])": f"tuple[{TENSOR}, {PAIR}]",
    "fastrnn.functional.gru(packed, None, weights)[0]": PACKED,
    "fastrnn.functional.rnn(x, h, weights, nonlinearity='relu')": PAIR,
    "fastrnn.replace(nn.Sequential(lstm)).skipped[0].note": "str",
    "fastrnn.replace(lstm).model": "torch.nn.modules.module.Module",
    "fastrnn.explain(lstm, x).reason": "str",
    "fastrnn.info()": "dict[str, Any]",
    "fastrnn.__version__": "str",
    "lstm.hidden_size": "int",
    "gru.backend": "str",
}
# line: the code of mypy's error
REFUSED = {
    "lstm(x, h)": "call-overload",
    "gru(x, (h, h))": "call-overload",
    "rnn([1.0])": "call-overload",
    "lstm(x, lenghts=mask)": "call-overload",
    "lstm(x, resets=[True])": "call-overload",
    "fastrnn.LSTM('3', 4)": "arg-type",
    "fastrnn.GRU(3, 4, nonlinearity='relu')": "call-arg",
    "fastrnn.GRUCell(3, 4)(x, (h, h))": "arg-type",
    "fastrnn.functional.lstm(x, None, [(x, x)])": "list-item",
    "fastrnn.backend(3)": "arg-type",
    "fastrnn.explain(nn.LSTM(3, 4), x)": "arg-type",
    "fastrnn.Lstm": "attr-defined",
}


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy")
def test_types_of_a_users_code(tmp_path):
    lines = [*START.splitlines(), *(f"reveal_type({e})" for e in REVEALED), *REFUSED]
    (tmp_path / "user.py").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "--no-error-summary"]
    done = subprocess.run(
        [*command, tmp_path / "user.py"],
        cwd=ROOT,  # whose cache `make lint` fills
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    found = dict(re.findall(r"user\.py:(\d+): ((?:note: Revealed|error).*)", done.stdout))
    assert "user.py" in done.stdout, done.stdout
    start = len(START.splitlines())
    for number, (expression, want) in enumerate(REVEALED.items(), start + 1):
        got = re.fullmatch(r'note: Revealed type is "(.*)"', found.pop(str(number)))
        assert got, f"{expression}: {done.stdout}"
        assert got[1].endswith(f"fallback={want}]") if want == PACKED else got[1] == want, f"{expression}: {got[1]}"
    for number, (line, code) in enumerate(REFUSED.items(), start + len(REVEALED) + 1):
        assert found.pop(str(number)).endswith(f"[{code}]"), line
    assert not found, f"errors in what should be accepted: {found}"


def test_the_package_says_that_it_is_typed():
    """The wheel and the sdist hold it: tests/test_install.py compares their files with these."""
    assert (Path(fastrnn.__file__).parent / "py.typed").is_file()
    assert "strict = true" in (ROOT / "pyproject.toml").read_text()


def test_call_is_forward_for_type_checkers_only():
    """At run time modules keep torch.nn's __call__, which runs the hooks."""
    module = fastrnn.GRU(3, 4)
    seen = []
    module.register_forward_hook(lambda *_: seen.append("hook"))
    module(torch.randn(5, 2, 3))
    assert seen == ["hook"]
