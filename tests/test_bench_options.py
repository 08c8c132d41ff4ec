"""Options of `fastrnn bench`: what is wrong, or would have no effect, is one line and exit code 2."""

import pytest
import torch

from fastrnn.backends import BACKENDS
from fastrnn.bench import check, ddp, options, run, shapes
from fastrnn.cli import main
from fastrnn.cli.parser import UsageError


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--cases no-such-case", "no case's name contains any of no-such-case"),
        ("--sampel 3", "unknown option --sampel, did you mean '--sample'?"),
        ("--cells LSTN", "invalid choice: 'LSTN'"),
        ("--threads 0", "--threads: expected at least 1, got 0"),
        ("--backend cpv", "--backend: expected one of auto, cpu"),
        ("--peers FlashRMM", "--peers: there is no 'FlashRMM', did you mean 'FlashRNN'?"),
        ("--resume {tmp}/none.jsonl", "none.jsonl: no such file"),
        ("--compare {tmp}/text {tmp}/text", "text: line 1 is not a record of fastrnn bench"),
        ("--check {tmp}/none.jsonl", "none.jsonl: no such file"),
        ("--report {tmp}/none.jsonl", "none.jsonl: no such file"),
        ("--ddp 1", "--ddp: expected at least 2 processes, got 1"),
        ("--cases cell- --cells GRU --modes forward", "nothing is to be measured"),
        ("--parts energy", "--parts energy is of what timing measures; add timing"),
        *(
            (f"--{name} {value}", f"--{name}: expected a finite number of seconds, at least 0, got {value}")
            for name in ("budget", "sample")
            for value in ("nan", "inf", "-1")
        ),
        *((f"--{name} 8", f"--{name} has no effect with --grid cpu") for name in ("hidden", "batches", "steps")),
        ("--grid haste --hidden 8", "--hidden has no effect with --grid haste"),
        ("--check --self", "--self has no effect with --check"),
        ("--check --save", "--save has no effect with --check"),
        ("--check --peers all", "--peers has no effect with --check"),
        ("--passes 0", "--passes: expected at least 1, got 0"),
        ("--check --passes 3", "--passes has no effect with --check"),
        ("--parts latency --passes 3", "--passes has no effect with --parts without timing"),
        ("--ddp 2 --cells GRU", "--cells has no effect with --ddp"),
        ("--ddp 2 --threads 1", "--threads has no effect with --ddp"),
        ("--ddp 2 --backend cpu", "--backend has no effect with --ddp"),
        ("--ddp 2 --budget 5", "--budget has no effect with --ddp"),
        ("--ddp 2 --malloc keep", "--malloc has no effect with --ddp"),
        ("--ddp 2 --out x", "--out has no effect with --ddp that is not kept; add --save"),
        ("--compare a b --cells GRU", "--cells has no effect with --compare"),
        ("--report a --check", "--report"),
        ("--self --backend cpu", "--backend has no effect with --self"),
        ("--out x", "--out has no effect with what is not kept; add --save"),
        ("--resume x --out x", "--out has no effect with --resume"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(line, message, tmp_path, monkeypatch, capsys):
    for module in (run, check, ddp):
        monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("it was measured"))
    (tmp_path / "text").write_text("no json\n")
    assert main(["bench", *line.format(tmp=tmp_path).split()]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


def test_threads_of_a_cpu_are_refused_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match="--threads has no effect with --device cuda"):
        options.parse_bench(["--device", "cuda", "--threads", "1"])


@pytest.mark.parametrize(("built", "backend"), [(True, "cuda"), (False, "triton")])
def test_a_gpu_is_measured_with_the_kernels_that_are_built(built, backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(BACKENDS["cuda"], "info", lambda: {"built": built})
    assert options.parse_bench(["--device", "cuda"]).backend == backend


def test_kernels_that_are_not_built_are_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(BACKENDS["cuda"], "info", lambda: {"built": False, "reason": "no nvcc was found"})
    with pytest.raises(UsageError, match="--backend cuda: no nvcc was found"):
        options.parse_bench(["--device", "cuda", "--backend", "cuda"])


def test_what_a_command_takes_is_an_option():
    known = {action.dest for action in options.bench_parser()._actions}
    for name, taken in options.INSTEAD.items():
        assert {name, *taken} <= known


def test_the_list_holds_the_cases_asked_for(capsys):
    assert main(["bench", "--list", "--cases", "cell-"]) == 0
    assert capsys.readouterr().out.split() == [c.name for c in shapes.CASES if "cell-" in c.name]
