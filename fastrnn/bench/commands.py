"""The commands `fastrnn bench` and `fastrnn verify`, as the command line knows them."""

from __future__ import annotations

import argparse
import sys

from fastrnn.bench.options import Parser, parse_bench
from fastrnn.cli import guarded
from fastrnn.cli.parser import UsageError


def say(line: str) -> None:
    print(line, flush=True)


def bench(argv: list[str], command: list[str] | None = None) -> int:
    """`fastrnn bench`; its exit code: 1 if a case failed, or a comparison named a regression."""
    args = parse_bench(argv)
    command = command or ["fastrnn", "bench", *argv]
    if args.list:
        from fastrnn.bench.grids import cases
        from fastrnn.bench.shapes import matching

        found = matching(args.cases, cases(args.grid, args.hidden, args.batches, args.steps))
        say("\n".join(case.name for case in found))
        return 0
    if args.compare:
        from fastrnn.bench import compare

        old, new = args.compare
        return compare.command(old, new, say)
    if args.report:
        from fastrnn.bench import page

        return page.command(args.report, say)
    if args.check is not None:
        from fastrnn.bench import check

        return check.command(args, command, say)
    if args.ddp is not None:
        from fastrnn.bench import ddp

        return ddp.command(args, command, say)
    return _run(args, command)


def _run(args: argparse.Namespace, command: list[str]) -> int:
    from fastrnn.bench import report, run

    records, path = run.run(args, command, say)
    say("\n" + report.summarise(records))
    if args.save or args.resume:
        run.save(records, path, say)
    return run.exit_code(records)


def verify(argv: list[str]) -> int:
    """`fastrnn verify`; exit code 0 if every backend is within tolerance, 1 if not."""
    from fastrnn.backends import BACKENDS
    from fastrnn.bench.environment import cores

    parser = Parser(prog="fastrnn verify", description=VERIFY_HELP, allow_abbrev=False)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and sizes (%(default)s)")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=sorted({1, cores()}), metavar="N", help=VERIFY_THREADS
    )
    args = parser.parse_args(argv)
    if min(args.threads) < 1:
        raise UsageError(f"--threads: expected at least 1, got {min(args.threads)}")
    from fastrnn.bench import verify as verifying

    return verifying.command(args.backends, args.seed, args.threads, say)


VERIFY_HELP = (
    "Runs every cell in every type on every backend that can run here, and compares outputs, states and all gradients "
    "with fp64, beside torch.nn's own errors. Exit code 1 if one is out of tolerance."
)


VERIFY_THREADS = "of the CPU engine, in turn; 1, and all cores, by default; the rest runs by the first"


def main() -> int:
    """`python -m benchmarks`: fastrnn bench."""
    words = ["python", "-m", "benchmarks"]
    return guarded(" ".join(words), lambda: bench(sys.argv[1:], [*words, *sys.argv[1:]]))
