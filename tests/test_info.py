"""`fastrnn.info()`: what is there, what is missing and what that costs; and what an import brings along."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

import fastrnn
from fastrnn.backends import cuda
from fastrnn.info import cpu_model, engine, format_info, missing_extras


def test_info_gives_the_versions_and_the_machine() -> None:
    facts = fastrnn.info()
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cpu"] == cpu_model() != ""
    assert facts["cores"] >= 1


def test_info_names_the_engine_and_its_instruction_sets() -> None:
    facts = engine()
    assert facts["available"], "these tests are for an installation with the engine"
    assert facts["isa"] in facts["isas"]
    assert "baseline" in facts["isas"]
    assert f"built; runs {facts['isa']}" in format_info(fastrnn.info())


def test_an_engine_that_is_not_there_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, p=None: None if n == "fastrnn._cpu" else find(n, p))
    facts = engine()
    assert facts["available"] is False
    assert "compiler" in facts["reason"]
    shown = format_info(fastrnn.info())
    assert "MISSING" in shown
    assert "cost: " in shown
    assert "pip install" in shown


def test_an_engine_that_does_not_load_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastrnn._cpu", None)  # makes its import fail
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())
    facts = engine()
    assert facts["available"] is False
    assert "could not be loaded" in facts["reason"]


def test_cuda_kernels_are_named_or_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = fastrnn.info()
    facts["cuda"] = {"built": True, "architectures": "80 90a"}
    assert "built for 80 90a" in format_info(facts)
    monkeypatch.setitem(sys.modules, "fastrnn._cuda", None)
    cuda.load.cache_clear()
    assert "reinstall fastrnn with FASTRNN_CUDA=1" in format_info(fastrnn.info())
    cuda.load.cache_clear()


def test_missing_extras_say_what_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, package=None: None if name == "lightning" else object()
    )
    (text,) = missing_extras().values()
    assert text.startswith("lightning not installed")
    assert "fastrnn[train]" in text


def test_import_brings_nothing_heavy_and_stays_silent() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import fastrnn\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "heavy = new & {'lightning', 'tokenizers', 'jsonargparse', 'triton', 'matplotlib', 'scipy', 'pandas'}\n"
        "assert not heavy, heavy\n"
        "assert callable(fastrnn.info)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
