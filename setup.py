"""Builds the C++ engine, and the CUDA kernels where they are of use, with CMake and Ninja.

Environment variables: CXX (the compiler), CMAKE_ARGS (more arguments for CMake), FASTRNN_SANITIZE=1
(AddressSanitizer and UndefinedBehaviorSanitizer), FASTRNN_CUDA (1: with the CUDA kernels, or the install fails;
0: without; otherwise with them if there is an nvcc and the installed torch is one for CUDA, as they take minutes to
compile), FASTRNN_CUDA_ARCHS ("80;90a;100;120").
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MISSING = """
{line}
fastrnn is being installed WITHOUT its C++ engine: {reason}.
It will work, on torch.nn's own kernels, and be no faster than they are. To get the engine, install a
C++17 compiler and Python's headers (Debian, Ubuntu: apt-get install g++ python3-dev), then fastrnn again:
    pip install --force-reinstall --no-deps --no-cache-dir <what you installed>
{line}
"""
NO_KERNELS = """
{line}
fastrnn is being installed WITHOUT its CUDA kernels: {nvcc} did not compile them, see above.
The GPU will be served by Triton. FASTRNN_CUDA=0 spares you the attempt, FASTRNN_CUDA=1 makes it an error.
{line}
"""


def missing_compiler() -> str | None:
    """What the machine lacks to compile C++ for Python, or None if nothing."""
    asked = shlex.split(os.environ.get("CXX", ""))
    names = asked[:1] or ["c++", "g++", "clang++"]  # what CMake looks for
    if not any(map(shutil.which, names)):
        return f"no C++ compiler was found ({', '.join(names)})"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.exists() else f"Python's headers are not installed ({header})"


def flag(name: str) -> str:
    return "ON" if os.environ.get(name, "").lower() in ("1", "on", "true", "yes") else "OFF"


def nvcc() -> str | None:
    """The compiler that cmake/cuda.cmake will find."""
    own = os.environ.get("CUDACXX")
    if own and Path(own).exists():
        return own
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None) or shutil.which("nvcc")


def cuda_of_torch() -> str | None:
    """The CUDA that the installed torch was built for; None if it was not, or if there is no torch.

    Read from its files: pip hides torch from an isolated build, but builds with the environment's own Python.
    """
    found = importlib.util.find_spec("torch")
    folders = [*(found.submodule_search_locations or ())] if found else []
    for folder in [*folders, str(Path(sysconfig.get_path("platlib"), "torch"))]:
        text = Path(folder, "version.py")
        if text.exists():
            version = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)", text.read_text(), re.M)
            return version[1] if version else None
    return None


def kernels_wanted() -> str:
    """ "ON" and "OFF" as asked for, otherwise "TRY" or "OFF"."""
    if os.environ.get("FASTRNN_CUDA", "").lower() not in ("", "auto"):
        return flag("FASTRNN_CUDA")
    return "TRY" if nvcc() and cuda_of_torch() else "OFF"


class BuildEngine(build_ext):
    """Hands the one extension module to CMake."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.missing = missing_compiler()
        if self.missing is not None:
            self.extensions = []

    def run(self) -> None:
        if self.missing is not None:
            print(MISSING.format(line="*" * 100, reason=self.missing), file=sys.stderr, flush=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        sanitize = flag("FASTRNN_SANITIZE")
        kernels = "OFF" if sanitize == "ON" else kernels_wanted()
        kind = "sanitize" if sanitize == "ON" else "release"
        # Not self.build_temp: an editable install gets a new one each time and would compile everything again.
        build = ROOT / "build" / f"{kind}-{self.plat_name}-{sys.implementation.cache_tag}"
        try:
            self.make(build, sanitize, "OFF" if kernels == "OFF" else "ON")
        except subprocess.CalledProcessError:
            if kernels != "TRY":
                raise
            print(NO_KERNELS.format(line="*" * 100, nvcc=nvcc()), file=sys.stderr, flush=True)
            kernels = "OFF"
            self.make(build, sanitize, kernels)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / target.name, target)
        module = target.with_name(target.name.replace("_cpu", "_cuda"))
        module.unlink(missing_ok=True)  # one of an earlier build
        if kernels != "OFF":
            shutil.copy2(build / module.name, module)
        self.module = module

    def copy_extensions_to_source(self) -> None:
        """Of an editable install; setuptools knows nothing of the second module."""
        super().copy_extensions_to_source()
        if self.extensions:
            there = ROOT / "fastrnn" / self.module.name
            there.unlink(missing_ok=True)  # one of another version
            if self.module.exists():
                shutil.copy2(self.module, there)

    def make(self, build: Path, sanitize: str, kernels: str) -> None:
        # Imported here: these are needed to build, not to make an sdist or to read the metadata.
        import cmake
        import ninja
        import pybind11

        command = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
        # --fresh: the cache of an earlier isolated build names tools that are gone.
        configure = [
            *(command, "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTRNN_SANITIZE={sanitize}",
            f"-DFASTRNN_CUDA={kernels}",
            *[f"-DFASTRNN_CUDA_ARCHS={archs}" for archs in [os.environ.get("FASTRNN_CUDA_ARCHS")] if archs],
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        subprocess.run(configure, check=True)
        subprocess.run([command, "--build", str(build)], check=True)


setup(
    ext_modules=[Extension("fastrnn._cpu", sources=[])],
    cmdclass={"build_ext": BuildEngine},
)
