"""The command line. Only the chosen command's imports happen, so that `fastrnn --help` is quick.

Bad input prints one line on stderr and exits with code 2; a signal during training exits with 128 + its number.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HELP = """usage: fastrnn COMMAND [options]

  fastrnn train lm     train a language model on text (--data FILE_OR_FOLDER)
  fastrnn evaluate     perplexity of a checkpoint on a text
  fastrnn generate     text from a checkpoint
  fastrnn info         what is installed, what is missing and what that costs

fastrnn COMMAND --help shows a command's options.
"""

EXAMPLES = """examples:
  fastrnn train lm                                       on the English text that Python itself carries
  fastrnn train lm --data book.txt --level bpe --tied --emb-size 256
  fastrnn train lm --preset ptb-small --data ptb/        ptb/ holds *train*, *valid*, *test*
  fastrnn train lm --config run.yaml --epochs 20         --print_config writes such a file
  fastrnn train lm --resume runs/lm-001                  goes on exactly where a stopped run was
"""


class UsageError(Exception):
    """The command line itself is wrong; the message is the whole explanation."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (sys.argv[1:] by default) and returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(version("fastrnn"))
        return 0
    try:
        name, run, rest = find_command(args)
    except UsageError as error:
        return fail("fastrnn", error)
    try:
        return run(rest)
    except KeyboardInterrupt:
        print(f"\nfastrnn {name}: interrupted", file=sys.stderr)
        return 130
    except UsageError as error:
        return fail(f"fastrnn {name}", error)
    except ModuleNotFoundError as error:
        if error.name not in ("lightning", "jsonargparse", "tokenizers", "yaml"):
            raise
        return fail(f"fastrnn {name}", f"needs {error.name}: pip install 'fastrnn[train]'")
    except Exception as error:
        from .text.errors import Interrupted, UserError

        if isinstance(error, Interrupted):
            print(f"\nfastrnn {name}: {error}", file=sys.stderr)
            return 128 + error.signum
        if isinstance(error, UserError):
            return fail(f"fastrnn {name}", error)
        raise


def find_command(args: list[str]) -> tuple[str, Callable[[list[str]], int], list[str]]:
    """The name and function of the command that `args` begins with, and its own arguments."""
    if args[0] == "train":
        if len(args) < 2:
            raise UsageError(f"train what? There is: {', '.join(TASKS)}")
        if args[1] in ("-h", "--help"):
            return "train", train_help, []
        if args[1] not in TASKS:
            raise UsageError(f"unknown task '{args[1]}'{suggest(args[1], TASKS)}; there is: {', '.join(TASKS)}")
        return f"train {args[1]}", TASKS[args[1]], args[2:]
    if args[0] not in COMMANDS:
        names = ["train", *COMMANDS]
        raise UsageError(f"unknown command '{args[0]}'{suggest(args[0], names)}; there are: {', '.join(names)}")
    return args[0], COMMANDS[args[0]], args[1:]


def fail(prefix: str, error: object) -> int:
    print(f"{prefix}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def suggest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f", did you mean '{close[0]}'?" if close else ""


def train_help(args: list[str]) -> int:
    print(
        f"usage: fastrnn train TASK [options]\n\nTASK: {', '.join(TASKS)}; fastrnn train TASK --help shows its options."
    )
    return 0


def train_lm(args: list[str]) -> int:
    from .text.config import LmConfig

    parser = make_parser("train lm", "Trains a recurrent language model.", EXAMPLES)
    parser.add_argument("--config", action="config", help="YAML file of options; those after it on the line prevail")
    parser.add_argument("--preset", default=None, help=f"options of a published run: {', '.join(presets())}")
    parser.add_argument(
        "--resume", nargs="?", const="auto", default=None, type=str | None,
        help="go on with a run: its folder or checkpoint; without a value, the run in --out",
    )  # fmt: skip
    parser.add_argument("--overwrite", nargs="?", const=True, default=False, type=bool, help="replace the run in --out")
    add_fields(parser, LmConfig)
    args = expand_preset(args)
    options = vars(parse(parser, args))
    given = {k: v for k, v in vars(parse(parser, args, defaults=False)).items() if k in LmConfig.__dataclass_fields__}
    config = LmConfig(**{name: options[name] for name in LmConfig.__dataclass_fields__})
    from .text.tasks.lm import train_lm as run

    run(config, resume=options["resume"], given=given, overwrite=options["overwrite"], echo=say)
    return 0


def evaluate(args: list[str]) -> int:
    parser = make_parser("evaluate", "Perplexity of a trained language model on a text.")
    parser.add_argument("--checkpoint", required=True, type=str, help="best.ckpt of a run")
    parser.add_argument("--data", required=True, type=str, help="text file, or folder with *test* or *valid*")
    parser.add_argument("--split", default=None, type=str | None, help="train, valid or test of a folder")
    parser.add_argument("--batch-size", default=10, type=int, help="columns; 1 scores the text as one stream")
    parser.add_argument("--layer", default=None, type=str | None, help="fastrnn or torch; as trained by default")
    options = parse(parser, args)
    if options.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {options.batch_size}")
    check_layer(options.layer)
    from .text.data.corpus import load_text
    from .text.evaluate import evaluate_stream
    from .text.tasks.lm import load_model

    model, vocabulary, config = load_model(options.checkpoint, options.layer)
    text = load_text(options.data, options.split)
    ids = vocabulary.encode(text)
    score = evaluate_stream(model, ids, options.batch_size, config.bptt, len(text))
    print(score.describe(config.level))
    if vocabulary.unknown is not None:
        share = (ids == vocabulary.unknown).double().mean().item()
        print(f"{share:.2%} of the tokens are <unk>: unknown to the model's vocabulary, or so in the text")
    return 0


def generate(args: list[str]) -> int:
    parser = make_parser("generate", "Text from a trained language model.")
    parser.add_argument("--checkpoint", required=True, type=str, help="best.ckpt of a run")
    parser.add_argument("--prompt", default="", type=str, help="text to go on from")
    parser.add_argument("--length", default=400, type=int, help="tokens to add")
    parser.add_argument("--temperature", default=0.8, type=float, help="below 1: keep to the likely; 0: the likeliest")
    parser.add_argument("--top-k", default=0, type=int, help="draw among the k likeliest; 0: all")
    parser.add_argument("--top-p", default=1.0, type=float, help="draw among the likeliest that sum to p")
    parser.add_argument("--seed", default=None, type=int | None, help="the same seed gives the same text")
    parser.add_argument("--layer", default=None, type=str | None, help="fastrnn or torch; as trained by default")
    o = parse(parser, args)
    check_layer(o.layer)
    from .text.sampling import generate as draw
    from .text.tasks.lm import load_model

    model, vocabulary, _ = load_model(o.checkpoint, o.layer)
    print(draw(model, vocabulary, o.prompt, o.length, o.temperature, o.top_k, o.top_p, o.seed))
    return 0


def show_info(args: list[str]) -> int:
    if args in (["-h"], ["--help"]):
        print("usage: fastrnn info\n\nWhat is installed, what is missing and what that costs.")
        return 0
    if args:
        raise UsageError(f"takes no arguments, got {args[0]}")
    from .info import format_info, info

    print(format_info(info()))
    return 0


TASKS: dict[str, Callable[[list[str]], int]] = {"lm": train_lm}
COMMANDS: dict[str, Callable[[list[str]], int]] = {"evaluate": evaluate, "generate": generate, "info": show_info}


def say(line: str) -> None:
    """A line of the report, above the progress bar if there is one."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    tqdm.write(line)
    sys.stdout.flush()


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
        flag = "--" + found.group(1).replace("_", "-")
        return f"unknown option {found.group(1)} in the configuration{suggest(flag, known).replace('--', '')}"
    if found := re.match(r"the following arguments are required: (.*)", message):
        return "missing " + ", ".join("--" + name for name in found.group(1).split(", "))
    if found := re.match(r'Parser key "config": (.*)', message):
        return f"--config: {found.group(1)}"
    return message


def presets() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parent / "text" / "configs").glob("*.yaml"))


def expand_preset(args: list[str]) -> list[str]:
    """`--preset NAME` as the `--config` of the packaged file."""
    expanded, rest = [], iter(args)
    for arg in rest:
        if arg == "--preset" or arg.startswith("--preset="):
            name = arg.partition("=")[2] or next(rest, "")
            if name not in presets():
                raise UsageError(f"--preset: there is no '{name}'; there are: {', '.join(presets())}")
            expanded += ["--config", str(Path(__file__).parent / "text" / "configs" / f"{name}.yaml")]
        else:
            expanded.append(arg)
    return expanded


def check_layer(layer: str | None) -> None:
    if layer not in (None, "fastrnn", "torch"):
        raise UsageError(f"--layer: expected one of fastrnn, torch, got {layer}")


if __name__ == "__main__":
    sys.exit(main())
