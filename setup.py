"""Builds the C++ engine, and the CUDA kernels where asked to, with CMake and Ninja; all else is in pyproject.toml.

Environment variables: CXX (the compiler), CMAKE_ARGS (more arguments for CMake), FASTRNN_SANITIZE=1
(AddressSanitizer and UndefinedBehaviorSanitizer), FASTRNN_CUDA=1 (the CUDA kernels, too, which need nvcc and take
minutes to compile), FASTRNN_CUDA_ARCHS ("80;90a;100;120").
"""

from __future__ import annotations

import os
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
        # Imported here: these are needed to build, not to make an sdist or to read the metadata.
        import cmake
        import ninja
        import pybind11

        command = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        sanitize, kernels = flag("FASTRNN_SANITIZE"), flag("FASTRNN_CUDA")
        kind = "sanitize" if sanitize == "ON" else "release"
        # Not self.build_temp: an editable install gets a new one each time and would compile everything again.
        build = ROOT / "build" / f"{kind}-{self.plat_name}-{sys.implementation.cache_tag}"
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
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / target.name, target)
        module = target.with_name(target.name.replace("_cpu", "_cuda"))
        module.unlink(missing_ok=True)  # one of another version, in an editable install
        if kernels == "ON" and sanitize == "OFF":
            shutil.copy2(build / module.name, module)


setup(
    ext_modules=[Extension("fastrnn._cpu", sources=[])],
    cmdclass={"build_ext": BuildEngine},
)
