"""The command line: results, one-line errors, exit codes; and that nothing heavy is imported early."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("jsonargparse", reason="needs the extra [train]")

import fastrnn.text
from fastrnn.cli import main
from fastrnn.cli.parser import PRESETS as PACKAGED
from fastrnn.cli.parser import presets
from fastrnn.cli.text import TASKS
from fastrnn.text import LmConfig
from fastrnn.text.errors import UserError

ROOT = Path(__file__).parent.parent
TEXT = "".join(f"{i}: the quick brown fox jumps over the lazy dog, {i * 7 % 13} times.\n" for i in range(60))
SMALL = "--hidden-size 12 --emb-size 8 --batch-size 4 --bptt 16 --epochs 1 --compare 0 --device cpu --threads 1"
WORDS, LABELS = (["cat", "dog", "fur", "paw"], ["sea", "tide", "salt", "wave"]), ("pets", "ocean")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with text.txt and the run that `fastrnn train lm` made of it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT)
    threads = torch.get_num_threads()
    assert (
        main(["train", "lm", "--data", f"{folder}/text.txt", "--out", f"{folder}/run", *SMALL.split(), "--sample=9"])
        == 0
    )
    rows = [f"{' '.join(WORDS[i % 2][: 2 + i % 3])} {i % 7},{LABELS[i % 2]}" for i in range(60)]
    (folder / "data.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    line = f"train classify --data {folder}/data.csv --out {folder}/classify {SMALL} --lr 0.05"
    assert main(line.replace("--bptt 16", "").replace("--epochs 1", "--epochs 4").split()) == 0
    torch.set_num_threads(threads)
    return folder


def test_train_leaves_checkpoints_configuration_metrics_and_sample(run):
    assert {p.name for p in (run / "run").iterdir()} == {
        "best.ckpt",
        "last.ckpt",
        "config.yaml",
        "metrics",
        "sample.txt",
        "curves.png",
        "report.html",
    }
    saved = yaml.safe_load((run / "run" / "config.yaml").read_text())
    assert LmConfig(**saved).hidden_size == 12


def test_evaluate(run, capsys):
    assert main(["evaluate", "--checkpoint", f"{run}/run/best.ckpt", "--data", f"{run}/text.txt"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("perplexity ")
    assert "bits per character" in first
    assert first.endswith(f"over {len(TEXT) - 1:,} tokens")
    assert second.startswith("0.00% of the tokens are <unk>")
    assert main(["evaluate", "--checkpoint", f"{run}/run/best.ckpt"]) == 0
    assert capsys.readouterr().out.startswith(f"{run}/text.txt (valid): perplexity ")


def test_evaluate_and_predict_with_a_classifier(run, tmp_path, capsys, monkeypatch):
    checkpoint = ["--checkpoint", f"{run}/classify/best.ckpt"]
    assert main(["evaluate", *checkpoint, "--data", f"{run}/data.csv"]) == 0
    first, *classes = capsys.readouterr().out.splitlines()
    assert "accuracy 100.00%, macro-F1 1.0000" in first
    assert classes == ["  ocean: F1 1.0000, 30 examples", "  pets: F1 1.0000, 30 examples"]
    assert main(["evaluate", *checkpoint]) == 0
    assert "/data.csv (valid): accuracy 100.00%" in capsys.readouterr().out
    (tmp_path / "only").mkdir()
    shutil.copy(run / "data.csv", tmp_path / "only" / "test.csv")
    for i in range(20):
        path = tmp_path / "texts" / ("pets" if i % 2 else "ocean") / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{'cat dog' if i % 2 else 'sea salt'} {i}")
    for data, count in (("only", 60), ("texts", 20)):  # nothing is held out of what is only scored
        assert main(["evaluate", *checkpoint, "--data", f"{tmp_path}/{data}"]) == 0
        assert f"({count} examples)" in capsys.readouterr().out
    assert main(["evaluate", *checkpoint, "--data", f"{tmp_path}/texts", "--split", "valid"]) == 0
    assert "(2 examples)" in capsys.readouterr().out
    assert main(["evaluate", *checkpoint, "--data", f"{tmp_path}/only", "--split", "valid"]) == 2
    assert "there is test, but no training split" in capsys.readouterr().err
    assert main(["predict", *checkpoint, "--text", "dog fur paw", "--top", "2"]) == 0
    label, p, other, q = capsys.readouterr().out.split()
    assert (label, other) == ("pets", "ocean")
    assert float(p) + float(q) == pytest.approx(1, abs=2e-4)
    (tmp_path / "lines.txt").write_text("sea salt\ncat dog\n")
    assert main(["predict", *checkpoint, "--data", f"{tmp_path}/lines.txt"]) == 0
    by_file = capsys.readouterr().out
    assert [line.split()[0] for line in by_file.splitlines()] == ["ocean", "pets"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"sea salt\ncat dog\n")))
    assert main(["predict", *checkpoint, "--layer", "torch"]) == 0
    assert capsys.readouterr().out == by_file


def test_generate_is_determined_by_its_seed(run, capsys):
    command = ["generate", "--checkpoint", f"{run}/run/best.ckpt", "--prompt", "the ", "--length", "30", "--seed"]
    texts = []
    for seed in ("5", "5", "6"):
        assert main([*command, seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("the ")
    assert len(texts[0]) == len("the ") + 30 + len("\n")


def test_config_file_preset_and_options_in_order(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("hidden_size: 33\nemb_size: 7\n")
    args = ["train", "lm", "--preset", "ptb-small", "--config", f"{tmp_path}/c.yaml", "--emb-size=8", "--print_config"]
    with pytest.raises(SystemExit) as leaving:
        main(args)
    assert leaving.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["hidden_size"], printed["emb_size"], printed["layers"], printed["lr"]) == (33, 8, 2, 20.0)
    assert set(LmConfig.__dataclass_fields__) <= set(printed)


PRESETS = [(task, name) for task in TASKS for name in presets(task)]


@pytest.mark.parametrize(("task", "name"), PRESETS)
def test_presets_are_valid(task, name):
    """Each value of the file passes the configuration's checks and arrives; another name or value would not."""
    values = yaml.safe_load((PACKAGED / task / f"{name}.yaml").read_text())
    kind = getattr(fastrnn.text, TASKS[task].config)
    config = kind(**values)
    assert values
    assert {key: getattr(config, key) for key in values} == values
    assert config != kind(), "a preset that presets nothing"
    for wrong in ({"hiden_size": 3}, {"dropout": 2.0}):
        with pytest.raises((TypeError, UserError)):
            kind(**{**values, **wrong})


BAD = [
    ("", "usage"),
    ("trian lm", "unknown command 'trian', did you mean 'train'?"),
    ("train", "train what? There is: "),
    ("train classify --data {tmp}/none.csv", "none.csv: no such file or folder"),
    ("train classify --data {run}/text.txt", "text.txt: neither a folder nor one of .csv, .tsv, .jsonl"),
    ("train classify --data {run}/data.csv --text-column body", "no column 'body'; there are: text, label"),
    ("train translate --data {tmp}/none.tsv", "none.tsv: no such file or folder"),
    ("train translate --source de", "--source and --target go together"),
    ("train translate --data {run}/text.txt", "text.txt: line 1 has no tab-separated column 2"),
    ("predict --checkpoint {run}/classify/best.ckpt --text x --beam 0", "--top and --beam must be at least 1"),
    ("train classify --pooling min", "--pooling: expected one of last, mean, max, attention, concat, got min"),
    ("train classify --stem klingon", "--stem klingon: there are: "),
    ("predict --checkpoint {run}/run/best.ckpt --text x", "a language model; fastrnn generate draws"),
    ("predict --checkpoint {run}/classify/best.ckpt --data {tmp}/none", "none: no such file"),
    ("predict --checkpoint {run}/classify/best.ckpt --data {run}/classify", "classify: a folder, and a file is needed"),
    ("predict --checkpoint {run}/classify/best.ckpt --text x --data y", "--text and --data exclude each other"),
    ("predict --checkpoint {run}/classify/best.ckpt --data {tmp}/empty.txt", "empty.txt: no line of text"),
    ("generate --checkpoint {run}/classify/best.ckpt", "a checkpoint of task classify, not lm"),
    ("train lmm", "did you mean 'lm'?"),
    ("train lm --hiden-size 3", "unknown option --hiden-size, did you mean '--hidden-size'?"),
    ("train lm stray", "unknown argument stray"),
    ("train lm --cell gruu", "--cell: expected one of lstm, gru, rnn, got gruu"),
    ("train lm --lr fast", "--lr: expected float, got fast"),
    ("train lm --seed 4294967296", "--seed must lie in [0, 4294967296), got 4294967296"),
    ("generate --checkpoint {run}/run/best.ckpt --seed 99999999999999999999", "--seed must lie in [0, 4294967296)"),
    ("train lm --layers 1.5", "--layers: expected int, got 1.5"),
    ("train lm --dropout 2", "--dropout must lie in [0, 1), got 2.0"),
    ("train lm --preset none", "there are: awd-ptb, ptb-small"),
    ("train lm --config {tmp}/none.yaml", "--config: File does not exist"),
    ("train lm --config {tmp}/typo.yaml", "hiden_size in the configuration, did you mean 'hidden_size'?"),
    ("train lm --config {tmp}/broken.yaml", "--config {tmp}/broken.yaml: not YAML: "),
    ("train lm --config={tmp}/latin.txt", "latin.txt: not UTF-8 at byte 3 (line 1)"),
    ("train lm --config {tmp}/empty.txt", "--config {tmp}/empty.txt: no options in it"),
    ("train lm --data {tmp}/none.txt", "none.txt: no such file or folder"),
    ("train lm --data {tmp}/empty.txt", "empty.txt: the train text is empty"),
    ("train lm --data {tmp}/short.txt --out {tmp}/o", "short.txt (train): the text has 9 tokens, too few for"),
    ("train lm --data {tmp}/latin.txt", "latin.txt: not UTF-8 at byte 3 (line 1)"),
    ("train lm --resume", "--resume needs the run"),
    ("train lm --resume {tmp}/none", "no checkpoint there"),
    ("train lm --data {run}/text.txt --out {run}/run", "holds a run already"),
    ("train lm --resume {run}/run --hidden-size 9", "--hidden-size 9 differs from the 12 of the run"),
    ("evaluate --data x", "missing --checkpoint"),
    ("evaluate --checkpoint {run}/run/best.ckpt --data {tmp}/none", "none: no such file or folder"),
    (
        "evaluate --checkpoint {run}/run/best.ckpt --data {run}/text.txt --batch-size 0",
        "--batch-size must be at least 1",
    ),
    ("generate --checkpoint {tmp}/none.ckpt", "none.ckpt: no such checkpoint"),
    ("generate --checkpoint {tmp}/short.txt", "short.txt: truncated, or not a checkpoint"),
    ("generate --checkpoint {run}/run", "a folder, not a checkpoint file"),
    ("generate --checkpoint {run}/run/best.ckpt --top-p 0", "--top-p in (0, 1]"),
    ("generate --checkpoint {run}/run/best.ckpt --layer tpu", "--layer: expected one of fastrnn, torch, got tpu"),
    ("info now", "takes no arguments, got now"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, capsys, line, message):
    for name, content in {"empty": b"", "short": b"ten chars\n", "latin": b"caf\xe9\n"}.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    (tmp_path / "typo.yaml").write_text("hiden_size: 3\n")
    (tmp_path / "broken.yaml").write_text("hidden_size: [3\n")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert main(line.format(tmp=tmp_path, run=run).split()) == 2
    out, err = capsys.readouterr()
    assert message.format(tmp=tmp_path) in (err or out) if "{tmp}" in message else message in (err or out)
    if line:
        assert out == ""
        assert err.startswith("fastrnn")
        assert err.count("\n") == 1
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before, "nothing of a run is touched"


def test_help_and_info(capsys):
    assert main(["--help"]) == 0
    assert "fastrnn train lm" in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    assert "lm" in capsys.readouterr().out
    assert main(["info"]) == 0
    assert str(torch.__version__) in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", [*(f"train {task}" for task in TASKS), "evaluate", "generate", "predict", "bench", "verify"]
)
def test_every_option_is_explained(line, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([*line.split(), "--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    task = line.partition(" ")[2]
    if task:
        fields = getattr(fastrnn.text, TASKS[task].config).__dataclass_fields__
        assert all(f"--{name.replace('_', '-')}" in text for name in fields)
        assert "examples:" in text


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main(["train", "lm"]) == 2
    assert "needs jsonargparse: pip install 'fastrnn[train]'" in capsys.readouterr().err


def test_a_disk_that_refuses_is_one_line(run, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastrnn.text.report.write_report", full)
    line = f"train lm --data {run}/text.txt --out {tmp_path}/run {SMALL} --sample 0 --max-steps 2"
    threads = torch.get_num_threads()
    assert main(line.split()) == 2
    torch.set_num_threads(threads)
    assert capsys.readouterr().err == "fastrnn train lm: error: [Errno 28] No space left on device\n"
    assert (tmp_path / "run" / "best.ckpt").exists()


def test_imports_stay_lazy():
    heavy = ["lightning", "jsonargparse", "tokenizers", "yaml", "matplotlib", "sacrebleu", "jieba"]
    code = "import sys, fastrnn, fastrnn.cli, fastrnn.text; fastrnn.cli.main(['--help']);"
    code += f"print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"


def test_ctrl_c_saves_and_exits_cleanly_and_the_run_goes_on(run, tmp_path):
    command = [sys.executable, "-m", "fastrnn.cli", "train", "lm", *SMALL.split(), "--sample=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = ["--data", f"{run}/text.txt", "--out", f"{tmp_path}/run", "--epochs", "100000"]
    process = subprocess.Popen(
        [*command, *options], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines() == [err.strip()], f"one line, no traceback, no warning: {err}"
    assert f"continue with --resume {tmp_path}/run/last.ckpt" in err
    epochs = int(err.split("epoch ")[1].split(",")[0].split(";")[0])
    again = subprocess.run(
        [*command[:5], "--resume", f"{tmp_path}/run", "--epochs", str(epochs + 1)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert again.stderr == ""
    assert f"epoch {epochs + 1}/{epochs + 1}" in again.stdout
    assert "epoch 1/" not in again.stdout


@pytest.mark.parametrize("task", ["lm", "classify", "translate"])
def test_training_needs_no_options(task, monkeypatch, capsys):
    """`fastrnn train lm` alone, as `make demo` calls it."""
    started = []
    monkeypatch.setattr(fastrnn.text, TASKS[task].run, lambda config, **_: started.append(config))
    assert main(["train", task]) == 0
    assert started == [type(started[0])()]
