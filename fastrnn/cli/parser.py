"""Parsers over jsonargparse, and its messages in the words of the command line."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

PRESETS = Path(__file__).parents[1] / "text" / "presets"  # one folder for each task


class UsageError(Exception):
    """The command line itself is wrong; the message is the whole explanation."""


def suggest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f", did you mean '{close[0]}'?" if close else ""


def make_parser(name: str, description: str, epilog: str = "") -> Any:
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
        pass

    return ArgumentParser(
        prog=f"fastrnn {name}", description=description, epilog=epilog, formatter_class=Formatter, exit_on_error=False
    )


def add_fields(parser: Any, config: type) -> None:
    """One option per field of the dataclass `config`: --emb-size (or --emb_size) for emb_size."""
    from typing import get_type_hints

    hints = get_type_hints(config)
    for name, field in config.__dataclass_fields__.items():  # type: ignore[attr-defined]
        flags = list(dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"]))
        switch = {"nargs": "?", "const": True} if hints[name] in (bool, bool | None) else {}
        parser.add_argument(*flags, type=hints[name], default=field.default, help=field.metadata["help"], **switch)


def parse(parser: Any, args: list[str], defaults: bool = True) -> Any:
    """Parses; raises UsageError with one clear line, and a suggestion where an option is misspelt."""
    from argparse import ArgumentError

    try:
        return parser.parse_args(args, defaults=defaults)
    except ArgumentError as error:
        raise UsageError(explain(str(error), parser)) from None


def explain(message: str, parser: Any) -> str:
    """jsonargparse's message in the words of the command line."""
    message = " ".join(message.split())
    known = [flag for action in parser._actions for flag in action.option_strings if "_" not in flag]
    if found := re.match(r"unrecognized arguments: (.*)", message):
        word = found.group(1).split()[0]
        what = "option" if word.startswith("-") else "argument"
        return f"unknown {what} {word}{suggest(word.split('=')[0], known)}"
    if found := re.match(r'Parser key "(\w+)": Expected an? (.*)\. Got value: (.*)$', message):
        name, kind, value = found.groups()
        kind = re.sub(r"typing\.Literal\[(.*?)\]", lambda m: "one of " + m.group(1).replace("'", ""), kind)
        kind = re.sub(r"<class '(\w+)'>", r"\1", kind)
        return f"--{name.replace('_', '-')}: expected {kind}, got {value}"
    if found := re.match(r"Option '(.*)' is not accepted", message):
        names = [flag.removeprefix("--").replace("-", "_") for flag in known]
        return f"unknown option {found.group(1)} in the configuration{suggest(found.group(1), names)}"
    if found := re.match(r"the following arguments are required: (.*)", message):
        return "missing " + ", ".join("--" + name for name in found.group(1).split(", "))
    if found := re.match(r'Parser key "config": (.*)', message):
        return f"--config: {found.group(1)}"
    return message


def presets(task: str) -> list[str]:
    return sorted(path.stem for path in (PRESETS / task).glob("*.yaml"))


def expand_preset(task: str, args: list[str]) -> list[str]:
    """`--preset NAME` as the `--config` of the packaged file."""
    expanded, rest = [], iter(args)
    for arg in rest:
        if arg == "--preset" or arg.startswith("--preset="):
            name = arg.partition("=")[2] or next(rest, "")
            if name not in presets(task):
                raise UsageError(f"--preset: there is no '{name}'; there are: {', '.join(presets(task))}")
            expanded += ["--config", str(PRESETS / task / f"{name}.yaml")]
        else:
            expanded.append(arg)
    return expanded


def check_configs(args: list[str]) -> None:
    """Raises UserError for a `--config` file that is no table of options; jsonargparse's own message names no file."""
    import yaml  # type: ignore[import-untyped]

    from ..text.data.files import read_text
    from ..text.errors import UserError

    for arg, after in zip(args, [*args, ""][1:], strict=True):
        if arg != "--config" and not arg.startswith("--config="):
            continue
        path = Path(after if arg == "--config" else arg.partition("=")[2])
        if not path.is_file():
            continue  # which jsonargparse says well
        try:
            options = yaml.safe_load(read_text(path))
        except yaml.YAMLError as error:
            raise UserError(f"--config {path}: not YAML: {error}") from None
        if not isinstance(options, dict):
            raise UserError(f"--config {path}: no options in it; --print_config writes such a file")


def check_layer(layer: str | None) -> None:
    if layer not in (None, "fastrnn", "torch"):
        raise UsageError(f"--layer: expected one of fastrnn, torch, got {layer}")
