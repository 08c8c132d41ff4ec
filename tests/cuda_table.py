"""What the compiler made of each CUDA kernel: registers, tensor-core instructions, bytes of static shared memory.

    python tests/cuda_table.py build/cuda   # after `make cuda`: writes tests/cuda_kernels.json; several folders add up

A kernel is named by its template and the arguments of it, numbers as they come: see forward.cuh, backward.cuh. Kernels
for clusters are empty for architectures without them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

TABLE = Path(__file__).with_name("cuda_kernels.json")
_NAME = re.compile(r"_ZN7fastrnn\d+([a-z_]+?)I((?:NS_\d+\w+?E|L[a-z]n?\d+E)+)EEv")
_ARGUMENT = re.compile(r"NS_\d+(\w+?)E|L[a-z](n?\d+)E")
_ARCH = re.compile(r"arch = (sm_\w+)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def tool() -> str | None:
    """cuobjdump of the CUDA toolkit, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    spec = find_spec("triton")
    if found or spec is None or not spec.submodule_search_locations:
        return found
    own = Path(next(iter(spec.submodule_search_locations))) / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(own) if own.exists() else None


def nvcc_version(build: Path) -> str:
    """Of the compiler that CMake found for the folder `build`."""
    (facts,) = build.glob("CMakeFiles/*/CMakeCUDACompiler.cmake")
    return re.search(r'CMAKE_CUDA_COMPILER_VERSION "([\d.]+)"', facts.read_text())[1]  # type: ignore[index]


def kernel_name(symbol: str) -> str | None:
    """As "forward Lstm Bf16 1 8 1 0"; None for what is no kernel of ours."""
    found = _NAME.search(symbol)
    if found is None:
        return None
    return " ".join([found[1], *(kind or value.replace("n", "-") for kind, value in _ARGUMENT.findall(found[2]))])


Usage = dict[str, dict[str, dict[str, int]]]


def read(objects: Path) -> Usage:
    """kernel -> architecture -> registers; bytes of stack, shared (static) and local memory; counts of HMMA and of
    accesses to local memory."""
    found: Usage = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # it is other processes that work
        for one in pool.map(_read_one, sorted(objects.rglob("*.cu.o"))):
            found.update(one)
    return found


def _read_one(path: Path) -> Usage:
    found: Usage = {}
    arch = name = None
    for line in _dump("-res-usage", path):
        arch = m[1] if (m := _ARCH.search(line)) else arch
        if "Function" in line:
            name = kernel_name(line)
        if name and arch and (m := _USAGE.search(line)):
            usage = dict(zip(("registers", "stack", "shared", "local"), map(int, m.groups()), strict=True))
            usage |= {"hmma": 0, "spills": 0}
            found.setdefault(name, {})[arch] = usage
    arch = name = None
    use: dict[str, int] = {}
    for line in _dump("-sass", path) if found else ():
        if "HMMA" in line:
            use["hmma"] += 1
        elif " LDL" in line or " STL" in line:
            use["spills"] += 1
        elif "Function :" in line:
            name = kernel_name(line)
            use = found[name][str(arch)] if name else {"hmma": 0, "spills": 0}  # that of no kernel of ours
        elif m := _ARCH.search(line):
            arch = m[1]
    return found


def _dump(what: str, path: Path) -> list[str]:
    return subprocess.run(
        [str(tool()), what, str(path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def counted(use: dict[str, int]) -> list[int]:
    """What the table holds of a kernel; all else is zero."""
    return [use["registers"], use["hmma"], use["shared"]]


def main(folders: list[str]) -> None:
    table: dict[str, dict[str, list[int]]] = {}
    for folder in folders:
        for name, row in read(Path(folder)).items():
            table.setdefault(name, {}).update({arch: counted(use) for arch, use in row.items()})
    rows = [f"    {json.dumps(name)}: {json.dumps(dict(sorted(table[name].items())))}" for name in sorted(table)]
    TABLE.write_text(
        f'{{\n  "nvcc": "{nvcc_version(Path(folders[0]))}",\n  "kernels": {{\n' + ",\n".join(rows) + "\n  }\n}\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
