"""The command line. Only the chosen command's imports happen, so that `fastrnn --help` is quick.

Bad input prints one line on stderr and exits with code 2; a signal during training exits with 128 + its number.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from . import text
from .parser import UsageError, suggest

HELP = """usage: fastrnn COMMAND [options]

  fastrnn train lm     train a language model on text (--data FILE_OR_FOLDER)
  fastrnn train classify   train a classifier of texts or series
  fastrnn train translate  train a translator on pairs of texts
  fastrnn prepare      token files for a language model, of text larger than memory
  fastrnn evaluate     the score of a checkpoint on other data
  fastrnn generate     text from a language model
  fastrnn predict      labels of texts by a classifier, translations by a translator
  fastrnn verify       is every backend right on this machine? A table of errors against fp64
  fastrnn bench        how fast it is on this machine, beside torch.nn and others
  fastrnn info         what is installed, what is missing and what that costs

fastrnn COMMAND --help shows a command's options.
"""

Command = Callable[[list[str]], int]


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
    return guarded(f"fastrnn {name}", lambda: run(rest))


def guarded(prefix: str, run: Callable[[], int]) -> int:
    """The exit code of `run`; what ends it by the user's input, doing or machine is one line after `prefix`."""
    try:
        return run()
    except KeyboardInterrupt:
        print(f"\n{prefix}: interrupted", file=sys.stderr)
        return 130
    except UsageError as error:
        return fail(prefix, error)
    except ModuleNotFoundError as error:
        if error.name not in ("lightning", "jsonargparse", "tokenizers", "yaml", "sacrebleu", "snowballstemmer"):
            raise
        return fail(prefix, f"needs {error.name}: pip install 'fastrnn[train]'")
    except Exception as error:
        from ..text.errors import Interrupted, UserError

        if isinstance(error, Interrupted):
            if not error.silent:
                print(f"\n{prefix}: {error}", file=sys.stderr)
            return 128 + error.signum
        if isinstance(error, (UserError, OSError)):  # a full disk, a folder without permission
            return fail(prefix, error)
        raise


def find_command(args: list[str]) -> tuple[str, Command, list[str]]:
    """The name and function of the command that `args` begins with, and its own arguments."""
    if args[0] == "train":
        if len(args) < 2:
            raise UsageError(f"train what? There is: {', '.join(text.TASKS)}")
        if args[1] in ("-h", "--help"):
            return "train", train_help, []
        if args[1] not in text.TASKS:
            known = text.TASKS
            raise UsageError(f"unknown task '{args[1]}'{suggest(args[1], known)}; there is: {', '.join(known)}")
        return f"train {args[1]}", lambda rest: text.train(args[1], rest), args[2:]
    if args[0] not in COMMANDS:
        names = ["train", *COMMANDS]
        raise UsageError(f"unknown command '{args[0]}'{suggest(args[0], names)}; there are: {', '.join(names)}")
    return args[0], COMMANDS[args[0]], args[1:]


def fail(prefix: str, error: object) -> int:
    print(f"{prefix}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def train_help(args: list[str]) -> int:
    names = ", ".join(text.TASKS)
    print(f"usage: fastrnn train TASK [options]\n\nTASK: {names}; fastrnn train TASK --help shows its options.")
    return 0


def show_info(args: list[str]) -> int:
    if args in (["-h"], ["--help"]):
        print("usage: fastrnn info\n\nWhat is installed, what is missing and what that costs.")
        return 0
    if args:
        raise UsageError(f"takes no arguments, got {args[0]}")
    from ..info import format_info, info

    print(format_info(info()))
    return 0


def bench(args: list[str]) -> int:
    from ..bench.commands import bench as run

    return run(args)


def verify(args: list[str]) -> int:
    from ..bench.commands import verify as run

    return run(args)


COMMANDS: dict[str, Command] = {
    "evaluate": text.evaluate,
    "generate": text.generate,
    "predict": text.predict,
    "prepare": text.prepare,
    "verify": verify,
    "bench": bench,
    "info": show_info,
}
