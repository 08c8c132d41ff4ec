"""The options of `fastrnn bench`: what they are, what depends on the device, and what has no effect with what."""

from __future__ import annotations

import argparse
import math
from typing import Any, NoReturn

from fastrnn.cli.parser import UsageError, suggest

PARTS = ("timing", "latency", "memory", "energy")
MALLOC_HELP = (
    "keep: freed memory stays with the process, for both sides alike; system: the C library's own rules, by which a "
    "module may or may not map fresh pages at every call, depending on where its blocks happen to lie (%(default)s)"
)
# What takes the place of a run, and the options that have an effect on it.
_GRID = ("device", "grid", "cases", "hidden", "batches", "steps")
INSTEAD: dict[str, tuple[str, ...]] = {
    "list": _GRID,
    "compare": (),
    "report": (),
    "check": (
        *_GRID,
        "cells",
        "modes",
        "dtypes",
        "threads",
        "backend",
        "budget",
        "sample",
        "rounds",
        "malloc",
        "out",
        "apart",
    ),
    "ddp": ("save", "out"),
}  # fmt: skip
BENCH_HELP = """examples:
  fastrnn bench                                  five minutes, the most important cases first
  fastrnn bench --budget 0 --threads 1 2 --save  the whole grid, kept with tables, pictures and a page
  fastrnn bench --resume FILE                    what FILE lacks
  fastrnn bench --compare OLD NEW                regressions beyond the noise between passes; exit code 1 for any
  fastrnn bench --check                          a quick run against the newest records of this hardware
  fastrnn bench --report FILE                    tables, pictures and page of FILE anew
  fastrnn bench --ddp 2                          training by several processes (DDP, gloo)
  fastrnn bench --device cuda --budget 270 --save  on a GPU
"""


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line, with a suggestion where an option is misspelt."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            word = message.split(": ")[1].split()[0]
            known = [flag for action in self._actions for flag in action.option_strings]
            kind = "option" if word.startswith("-") else "argument"
            raise UsageError(f"unknown {kind} {word}{suggest(word.split('=')[0], known)}")
        raise UsageError(message)


def bench_parser() -> Parser:
    parser = Parser(
        prog="fastrnn bench",
        description="Measures fastrnn beside torch.nn and other packages, behind a gate of parity.",
        epilog=BENCH_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _what(parser)
    _how(parser)
    other = parser.add_argument_group("instead of a run")
    other.add_argument("--list", action="store_true", help="name the cases and stop")
    other.add_argument(
        "--compare", nargs=2, metavar=("OLD", "NEW"), help="what changed by more than passes of the same code do"
    )
    other.add_argument(
        "--check", nargs="?", const="", metavar="FILE", help="a quick run against FILE's ratios over torch.nn"
    )
    other.add_argument("--report", nargs="+", metavar="FILE", help="tables, pictures and page of these records")
    other.add_argument("--ddp", type=int, metavar="N", help="scaling of training by N processes on this machine")
    return parser


def _what(parser: argparse.ArgumentParser) -> None:
    from fastrnn.bench.adapters import DTYPES
    from fastrnn.bench.grids import GRIDS, MODES, STEPS
    from fastrnn.bench.peers import PEERS
    from fastrnn.bench.shapes import CELLS

    group = parser.add_argument_group("what is measured")
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    group.add_argument("--grid", choices=GRIDS, default=None, help="the device's own, cpu or gpu, by default")
    group.add_argument("--cases", nargs="+", default=[], metavar="PART", help="cases whose name contains one of these")
    group.add_argument("--hidden", type=int, nargs="+", metavar="H", help="of the grid gpu, instead of its own")
    group.add_argument("--batches", type=int, nargs="+", metavar="B", help="the same")
    group.add_argument("--steps", type=int, default=STEPS, metavar="T", help="the same (%(default)s)")
    group.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    group.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    group.add_argument("--dtypes", nargs="+", choices=DTYPES, default=None, help="float32; on a GPU four of them")
    group.add_argument("--threads", type=int, nargs="+", default=None, metavar="N", help="1, and all cores, by default")
    group.add_argument(
        "--backend", default=None, help="fastrnn's; by default auto, on a GPU cuda, or triton where cuda is not built"
    )
    group.add_argument(
        "--peers", nargs="+", default=None, metavar="PEER",
        help=f"those that are there by default; none, all, or of: {', '.join(p.name for p in PEERS)}",
    )  # fmt: skip
    group.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="of times, single steps, peaks, joules (all)",
    )  # fmt: skip


def _how(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how")
    group.add_argument(
        "--budget",
        type=float,
        default=None,
        metavar="SECONDS",
        help="for everything; 0: no limit (300; with --check 90)",
    )
    group.add_argument("--sample", type=float, default=0.3, help="seconds of samples per measurement (%(default)s)")
    group.add_argument("--rounds", type=int, default=5, help="rounds per measurement at least (%(default)s)")
    group.add_argument(
        "--apart",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="each measurement in a fresh process, which others have not slowed (on a CPU: so; on a GPU: never)",
    )
    group.add_argument(
        "--passes",
        type=int,
        default=None,
        metavar="N",
        help="how often times are measured over again, each case built anew (1; 3 with --save: they tell the noise)",
    )
    group.add_argument("--kernels", action=argparse.BooleanOptionalAction, default=None, help="names (on a GPU)")
    group.add_argument("--malloc", choices=("keep", "system"), default="keep", help=MALLOC_HELP)
    group.add_argument("--self", action="store_true", help="torch.nn against itself: the noise of this machine")
    group.add_argument("--save", action="store_true", help="keep records, tables, pictures and the page")
    group.add_argument("--out", metavar="FOLDER", help="where (benchmarks/results in a clone, else fastrnn-bench)")
    group.add_argument("--resume", metavar="FILE", help="go on with the run that FILE holds; implies --save")


def parse_bench(argv: list[str]) -> argparse.Namespace:
    """The options, completed by what depends on the device.

    Raises:
        UsageError: what is wrong, in one line.
    """
    import torch

    from fastrnn.backends import BACKENDS, NAMES
    from fastrnn.bench import peers
    from fastrnn.bench.environment import cores
    from fastrnn.bench.grids import GPU_DTYPES, cases
    from fastrnn.bench.shapes import matching

    args = bench_parser().parse_args(argv)
    refuse_ignored(args, argv)
    gpu = args.device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here")
    args.grid = args.grid or ("gpu" if gpu else "cpu")
    args.dtypes = args.dtypes or (list(GPU_DTYPES) if gpu else ["float32"])
    args.kernels = gpu if args.kernels is None else args.kernels
    args.apart = not gpu if args.apart is None else args.apart
    args.backend = args.backend or (_gpu_backend() if gpu else "auto")
    if args.backend not in NAMES:
        raise UsageError(f"--backend: expected one of {', '.join(NAMES)}, got {args.backend}")
    if args.backend == "cuda" and (why_not := BACKENDS["cuda"].info().get("reason")):
        raise UsageError(f"--backend cuda: {why_not}")
    args.threads = args.threads or sorted({1, cores()})
    for name, value in (("sample", args.sample), ("budget", args.budget)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(f"--{name}: expected a finite number of seconds, at least 0, got {value:g}")
    for name, value, least in (
        ("threads", min(args.threads), 1),
        ("rounds", args.rounds, 1),
        ("passes", 1 if args.passes is None else args.passes, 1),
        ("steps", args.steps, 1),
        ("hidden", min(args.hidden or [1]), 1),
        ("batches", min(args.batches or [1]), 1),
    ):
        if value < least:
            raise UsageError(f"--{name}: expected at least {least}, got {value:g}")
    if not matching(args.cases, cases(args.grid, args.hidden, args.batches, args.steps)):
        raise UsageError(f"no case's name contains any of {' '.join(args.cases)}; fastrnn bench --list names them")
    args.peers = _peers(args.peers, args.device, peers)
    if args.budget is None:
        args.budget = 90.0 if args.check is not None else 300.0
    return args


def _gpu_backend() -> str:
    """The CUDA kernels where they are built, else Triton's."""
    from fastrnn.backends import BACKENDS

    return "cuda" if BACKENDS["cuda"].info()["built"] else "triton"


def refuse_ignored(args: argparse.Namespace, argv: list[str]) -> None:
    """UsageError, naming the combination, if something that was typed would have no effect."""
    typed = [name for name in _typed(argv) if name not in INSTEAD]
    modes = [name for name in INSTEAD if getattr(args, name) not in (None, False)]
    if len(modes) > 1:
        raise UsageError(f"--{modes[0]} and --{modes[1]} are two commands; give one of them")
    if modes:
        ignored = next((name for name in typed if name not in INSTEAD[modes[0]]), None)
        if ignored:
            raise UsageError(f"--{ignored} has no effect with --{modes[0]}; leave it out")
    grid = args.grid or ("gpu" if args.device == "cuda" else "cpu")
    pairs = (
        *((name, f"--grid {grid}; it is of --grid gpu", grid != "gpu") for name in ("hidden", "batches", "steps")),
        ("threads", "--device cuda", args.device == "cuda"),
        ("apart", "--device cuda", args.device == "cuda"),
        ("passes", "--parts without timing", "timing" not in args.parts),
        ("backend", "--self, which runs torch.nn alone", args.self),
        ("out", "--resume, which writes beside its file", args.resume is not None),
        ("out", "what is not kept; add --save", not (args.save or modes or args.resume)),
        ("out", "--ddp that is not kept; add --save", args.ddp is not None and not args.save),
    )
    for name, other, applies in pairs:
        if applies and name in typed:
            raise UsageError(f"--{name} has no effect with {other}")


def _typed(argv: list[str]) -> list[str]:
    """The options that `argv` itself gives, by name."""
    parser = bench_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return list(vars(parser.parse_args(argv)))


def _peers(asked: list[str] | None, device: str, peers: Any) -> tuple[str, ...]:
    names = [p.name for p in peers.PEERS]
    if asked is None:
        return peers.default(device)  # type: ignore[no-any-return]
    if asked in (["all"], ["none"]):
        return tuple(names) if asked == ["all"] else ()
    for name in asked:
        if name not in names:
            raise UsageError(f"--peers: there is no '{name}'{suggest(name, names)}; there are: {', '.join(names)}")
    return tuple(asked)
