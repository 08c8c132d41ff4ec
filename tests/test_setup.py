"""setup.py: when the CUDA kernels are built, and what becomes of an attempt that fails."""

from __future__ import annotations

import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools

SETUP = Path(__file__).resolve().parent.parent / "setup.py"
pytestmark = pytest.mark.skipif(not SETUP.exists(), reason="not in a source tree")


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The names of setup.py, in an environment of our own: no nvcc and no torch."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("FASTRNN_CUDA", "FASTRNN_CUDA_ARCHS", "FASTRNN_SANITIZE", "CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    names = runpy.run_path(str(SETUP))
    monkeypatch.setattr(names["importlib"].util, "find_spec", lambda name: None)
    monkeypatch.setattr(names["sysconfig"], "get_path", lambda name: str(tmp_path / "site"))
    return names


def install_nvcc(folder: Path) -> Path:
    folder.mkdir(parents=True)
    nvcc = folder / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    return nvcc


def install_torch(tmp_path: Path, cuda: str) -> None:
    (tmp_path / "site/torch").mkdir(parents=True)
    lines = ("from typing import Optional", "__version__ = '2.13.0'", f"cuda: Optional[str] = {cuda}", "hip = None", "")
    (tmp_path / "site/torch/version.py").write_text("\n".join(lines))


@pytest.mark.parametrize("place", ["PATH", "CUDA_HOME", "CUDACXX"])
def test_nvcc_is_found_where_users_have_it(script, monkeypatch, tmp_path, place):
    assert script["nvcc"]() is None
    folder = {"PATH": tmp_path / "bin", "CUDA_HOME": tmp_path / "toolkit/bin", "CUDACXX": tmp_path / "own"}[place]
    nvcc = install_nvcc(folder)
    if place != "PATH":
        monkeypatch.setenv(place, str(nvcc if place == "CUDACXX" else folder.parent))
    assert script["nvcc"]() == str(nvcc)


@pytest.mark.parametrize(
    ("asked", "nvcc", "cuda", "wanted"),
    [
        ("", True, "'12.8'", "TRY"),
        ("auto", True, "'12.8'", "TRY"),
        ("", True, "None", "OFF"),  # a torch for the CPU must not pay the minutes
        ("", True, "", "OFF"),  # no torch at all
        ("", False, "'12.8'", "OFF"),
        ("0", True, "'12.8'", "OFF"),
        ("1", True, "None", "ON"),
        ("1", False, "", "ON"),  # and CMake says that nvcc is missing
    ],
)
def test_when_kernels_are_built(script, monkeypatch, tmp_path, asked, nvcc, cuda, wanted):
    monkeypatch.setenv("FASTRNN_CUDA", asked)
    if nvcc:
        install_nvcc(tmp_path / "bin")
    if cuda:
        install_torch(tmp_path, cuda)
    assert script["kernels_wanted"]() == wanted


@pytest.mark.parametrize("wanted", ["ON", "TRY", "OFF"])
def test_kernels_that_do_not_compile(script, monkeypatch, tmp_path, capsys, wanted):
    """Those that nobody asked for are left out, and the install says so; those asked for fail it."""
    made = []

    def make(self, build, sanitize, kernels):
        made.append(kernels)
        if kernels == "ON":
            raise subprocess.CalledProcessError(1, "cmake")
        build.mkdir()
        (build / "_cpu.so").touch()

    build_engine = script["BuildEngine"]
    names = build_engine.build_extension.__globals__
    monkeypatch.setitem(names, "kernels_wanted", lambda: wanted)
    monkeypatch.setitem(names, "ROOT", tmp_path)
    (tmp_path / "build").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/_cuda.so").touch()  # of another version
    self = SimpleNamespace(plat_name="here", get_ext_fullpath=lambda name: tmp_path / "out/_cpu.so")
    self.make = lambda *arguments: make(self, *arguments)
    if wanted == "ON":
        with pytest.raises(subprocess.CalledProcessError):
            build_engine.build_extension(self, SimpleNamespace(name="fastrnn._cpu"))
        return
    build_engine.build_extension(self, SimpleNamespace(name="fastrnn._cpu"))
    assert made == {"TRY": ["ON", "OFF"], "OFF": ["OFF"]}[wanted]
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["_cpu.so"]
    assert ("WITHOUT its CUDA kernels" in capsys.readouterr().err) == (wanted == "TRY")


@pytest.mark.parametrize("wanted", ["ON", "OFF"])
def test_a_build_in_place_has_both_modules(script, monkeypatch, tmp_path, wanted):
    """As an editable install makes it, for which setuptools copies the modules that it knows."""
    build_engine = script["BuildEngine"]
    names = build_engine.build_extension.__globals__
    monkeypatch.setitem(names, "kernels_wanted", lambda: wanted)
    monkeypatch.setitem(names, "missing_compiler", lambda: None)
    monkeypatch.setitem(names, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    command = build_engine(
        setuptools.Distribution({
            "name": "fastrnn", "packages": ["fastrnn"],
            "ext_modules": [setuptools.Extension("fastrnn._cpu", sources=[])],
        })
    )  # fmt: skip
    command.inplace = True
    command.ensure_finalized()
    engine = Path(command.get_ext_fullpath("fastrnn._cpu")).name
    kernels = engine.replace("_cpu", "_cuda")

    def make(self, build, sanitize, kernels_too):
        build.mkdir(parents=True)
        for name in (engine, kernels) if kernels_too == "ON" else (engine,):
            (build / name).write_text("new")

    monkeypatch.setattr(build_engine, "make", make)
    (tmp_path / "fastrnn").mkdir()
    (tmp_path / "fastrnn" / kernels).write_text("of another version")
    command.run()
    found = {f.name: f.read_text() for f in (tmp_path / "fastrnn").iterdir()}
    assert found == dict.fromkeys([engine, kernels] if wanted == "ON" else [engine], "new")
