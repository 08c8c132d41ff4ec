"""Two processes by gloo: the losses of one process, and a run that resumes exactly though only one was signalled."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="needs the extra [train]")
pytest.importorskip("sacrebleu", reason="needs the extra [train]")

from text_processes import STOP_AT, configs, write_data
from text_support import assert_identical, final_state, one_thread, quiet

from fastrnn.text import UserError, train_lm
from fastrnn.text import checkpoint as checkpoints

__all__ = ["one_thread"]  # a fixture

ROOT = Path(__file__).parent.parent
GLOO = torch.distributed.is_available() and torch.distributed.is_gloo_available()
pytestmark = pytest.mark.skipif(not GLOO, reason="torch was built without gloo")
TASKS = list(STOP_AT)


def in_two_processes(folder: Path, script: str, *arguments: str) -> list[tuple[int, str]]:
    """Exit code and output of each of two processes that run `script` of this folder, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0",
              "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    command = [sys.executable, str(ROOT / "tests" / script), *arguments]
    processes = [
        subprocess.Popen(
            command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=280)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes, as torchrun starts them, have trained all tasks."""
    folder = tmp_path_factory.mktemp("processes")
    write_data(folder)
    for code, output in in_two_processes(folder, "text_processes.py", str(folder)):
        assert code == 0, output[-3000:]
    return folder


@pytest.mark.parametrize("name", TASKS)
def test_the_losses_are_those_of_one_process(two, tmp_path, name):
    histories = json.loads((two / "histories.json").read_text())
    config, train = configs(two, dropout=0.0, devices=1, out=str(tmp_path / "one"))[name]
    expected = train(config, echo=quiet).history
    assert len(expected) == len(histories[name]) == 2
    for one, row in zip(expected, histories[name], strict=True):
        assert one.keys() == row.keys()
        for key in one.keys() - {"tokens_per_s"}:
            assert row[key] == pytest.approx(one[key], rel=1e-4), key


@pytest.mark.parametrize("name", TASKS)
def test_a_signal_to_one_process_stops_both_and_the_run_resumes_exactly(two, name):
    resumed, whole = (final_state(two / f"{kind}-{name}") for kind in ("stopped", "whole"))
    assert_identical(resumed, whole)
    assert len(whole["processes"]) == 2
    first, second = whole["processes"]
    assert not torch.equal(first["rng"]["cpu"], second["rng"]["cpu"]), "each process draws its own masks"
    metrics = list((two / f"stopped-{name}" / "metrics").glob("version_*"))
    assert len(metrics) == 2, "two sittings, and one process that writes"


@pytest.mark.parametrize("name", TASKS)
def test_sharded_weights_give_the_same_losses_and_whole_checkpoints(two, name):
    histories = json.loads((two / "histories.json").read_text())
    for row, sharded in zip(histories[name], histories[f"fsdp-{name}"], strict=True):
        for key in row.keys() - {"tokens_per_s", "valid_bleu"}:
            assert sharded[key] == pytest.approx(row[key], rel=1e-4), key
    saved = {kind: checkpoints.load(two / f"{kind}-{name}" / "last.ckpt") for kind in ("two", "fsdp")}
    assert saved["two"]["state_dict"].keys() == saved["fsdp"]["state_dict"].keys()
    for key, weight in saved["two"]["state_dict"].items():
        torch.testing.assert_close(saved["fsdp"]["state_dict"][key], weight, rtol=0, atol=1e-3, msg=key)


@pytest.mark.parametrize("name", TASKS)
def test_a_sharded_run_resumes_exactly(two, name):
    resumed, whole = (final_state(two / f"{kind}-{name}") for kind in ("fsdp-resumed", "fsdp"))
    assert_identical(resumed, whole)


def test_the_sharded_states_of_an_optimiser_are_whole_and_partial(two):
    """Whole tensors of all that was trained, and nothing of the embedding, which was frozen in both epochs."""
    sharded = checkpoints.load(two / "fsdp-resumed-ulmfit_adam" / "last.ckpt")
    plain = checkpoints.load(two / "two-ulmfit_adam" / "last.ckpt")
    (saved,), (whole,) = sharded["optimizer_states"], plain["optimizer_states"]
    assert saved["state"].keys() == whole["state"].keys()
    parameters = [i for group in saved["param_groups"] for i in group["params"]]
    assert 0 < len(saved["state"]) < len(parameters)
    for i, state in whole["state"].items():
        for key, value in state.items():
            assert saved["state"][i][key].shape == value.shape, (i, key)


def test_another_number_of_processes_is_refused(two):
    with pytest.raises(UserError, match="--devices 1 differs from the 2 of the run to be resumed"):
        train_lm(configs(two)["lm"][0], resume=str(two / "whole-lm"), given={"devices": 1}, echo=quiet)
    assert checkpoints.load(two / "whole-lm" / "last.ckpt")["fastrnn"]["config"]["devices"] == 2


def test_processes_that_the_command_starts_itself(two, tmp_path):
    line = f"train lm --data {two}/text.txt --batch-size 4 --bptt 16 --emb-size 8 --hidden-size 12 --lr 0.02 --epochs 2"
    line += " --dropout 0 --schedule constant --device cpu --devices 2 --compare 0 --sample 0 --report false"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "fastrnn.cli", *line.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("epoch 2/2:") == 1
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["lm-001"], "one folder for both"
    history = checkpoints.load(tmp_path / "runs" / "lm-001" / "last.ckpt")["fastrnn"]["run"]["history"]
    expected = json.loads((two / "histories.json").read_text())["lm"]
    assert [row["valid_loss"] for row in history] == pytest.approx([row["valid_loss"] for row in expected], rel=1e-6)


def test_a_launcher_that_started_another_number(monkeypatch, tmp_path):
    write_data(tmp_path)
    config, train = configs(tmp_path)["lm"]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="torchrun started 4 processes, but --devices 2 --nodes 1 asks for 2"):
        train(config, echo=quiet)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="needs --out FOLDER, the same for all processes"):
        train(config, echo=quiet)
