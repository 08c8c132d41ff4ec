"""The emulator with a part of csrc changed: a copy of it, what depends on the change, and all other objects."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

from emulator_support import EMULATOR, ROOT

CELL = "Lstm"  # whose commands those of a new cell's source files are made from


def sources(folder: Path) -> Path:
    """A copy of csrc in `folder`, to be changed; where it is."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    return folder / "csrc"


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path.name} has no {old!r}"
    path.write_text(text.replace(old, new))


def build(folder: Path, changed: list[str]) -> Path:
    """The emulator of the copy in `folder`, of whose source files those whose names are in `changed` are compiled.

    Returns:
        The module, which has the name of the whole one.
    """
    made = Path(EMULATOR.__file__)
    commands = json.loads((made.parent / "compile_commands.json").read_text())
    objects = {p.name: p for p in (made.parent / "CMakeFiles" / "_emulator.dir").rglob("*.o")}
    compiler = ""
    for name in changed:
        words, where = _command(commands, folder, name)
        compiler, objects[f"{name}.o"] = words[0], folder / f"{name}.o"
        words[words.index("-o") + 1] = str(objects[f"{name}.o"])
        subprocess.run(words, check=True, cwd=where)
    out = folder / made.name
    subprocess.run([compiler, "-shared", "-o", str(out), *map(str, objects.values()), "-ldl"], check=True)
    return out


def _command(commands: list[dict[str, str]], folder: Path, name: str) -> tuple[list[str], str]:
    """How to compile the copy's file `name`, an instance of a cell of its own (DIRECTION_CELL_NUMBER.cpp) included."""
    known = {Path(entry["file"]).name: entry for entry in commands if "_emulator.dir" in entry["command"]}
    own = None
    if name not in known:
        direction, cell, number = name.removesuffix(".cpp").split("_")
        own = folder / name
        template = (folder / "csrc" / "cuda" / "instance.cu.in").read_text()
        values = {"direction": direction, "Direction": direction.title(), "cell": cell, "number": number}
        for key, value in values.items():
            template = template.replace(f"@{key}@", value)
        own.write_text(template)
    entry = known[name if own is None else f"{direction}_{CELL}_{number}.cpp"]
    words = shlex.split(entry["command"].replace(str(ROOT / "csrc"), str(folder / "csrc")))
    if own is not None:
        words[words.index("-c") + 1] = str(own)
    return words, entry["directory"]
