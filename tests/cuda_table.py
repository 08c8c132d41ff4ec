"""What the compiler made of each CUDA kernel: registers, stack, tensor-core instructions.

    python tests/cuda_table.py build/cuda   # after `make cuda`: writes tests/cuda_kernels.json; several folders add up

Kernels for clusters are empty for architectures without them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

TABLE = Path(__file__).with_name("cuda_kernels.json")
_NAME = re.compile(
    r"_ZN7fastrnn\d+(forward|backward)INS_\d+(\w+?)ENS_\d+(\w+?)ELi(\d+)ELi(\d+)ELi(\d+)ELi([012])EEEvNS_\d+\w+"
)
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


def nvcc_version() -> str:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text)[1]  # type: ignore[index]


def kernel_name(symbol: str) -> str | None:
    """As "forward Lstm Bf16 split=1 tiles=8 batch=1": None for what is no kernel of ours."""
    found = _NAME.search(symbol)
    if found is None:
        return None
    direction, cell, number, a, b, batch, exchange = found.groups()
    first = "split" if direction == "forward" else "row_tiles"
    return f"{direction} {cell} {number} {first}={a} tiles={b} batch={batch}" + ("", " cluster", " grid")[int(exchange)]


def read(objects: Path) -> dict[str, dict[str, dict[str, int]]]:
    """kernel -> architecture -> registers, stack and local bytes, counts of HMMA and of accesses to local memory."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for path in sorted(objects.rglob("*ward_*.cu.o")):
        arch = name = None
        for line in _dump("-res-usage", path):
            arch = m[1] if (m := _ARCH.search(line)) else arch
            if "Function" in line:
                name = kernel_name(line)
            if name and arch and (m := _USAGE.search(line)):
                usage = {"registers": int(m[1]), "stack": int(m[2]), "local": int(m[4]), "hmma": 0, "spills": 0}
                found.setdefault(name, {})[arch] = usage
        arch = name = None
        for line in _dump("-sass", path):
            if m := _ARCH.search(line):
                arch = m[1]
            elif "Function :" in line:
                name = kernel_name(line)
            elif name and arch and arch in found.get(name, {}):
                found[name][arch]["hmma"] += "HMMA" in line
                found[name][arch]["spills"] += " LDL" in line or " STL" in line
    return found


def _dump(what: str, path: Path) -> list[str]:
    return subprocess.run(
        [str(tool()), what, str(path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def main(folders: list[str]) -> None:
    table: dict[str, dict[str, list[int]]] = {}
    for folder in folders:
        for name, row in read(Path(folder)).items():
            table.setdefault(name, {}).update({arch: [use["registers"], use["hmma"]] for arch, use in row.items()})
    rows = [f"    {json.dumps(name)}: {json.dumps(dict(sorted(table[name].items())))}" for name in sorted(table)]
    TABLE.write_text(f'{{\n  "nvcc": "{nvcc_version()}",\n  "kernels": {{\n' + ",\n".join(rows) + "\n  }\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
