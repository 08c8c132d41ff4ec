"""What becomes of a kernel that gave up waiting: an error of the next call, or of `check_device`. No kernel runs."""

from __future__ import annotations

import pytest
import torch

import fastrnn
from fastrnn.backends import meeting
from fastrnn.backends.triton import watchdog as triton
from fastrnn.backends.watchdog import Watchdog

CPU = torch.device("cpu")
DOGS = {"CUDA": meeting.watchdog, "Triton": triton._watchdog}


@pytest.fixture
def waits(monkeypatch):
    """The devices that are waited for, as if there were GPUs."""
    seen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", seen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return seen


@pytest.fixture
def dog(monkeypatch):
    """On two GPUs its kernels have run."""
    found = Watchdog("made-up", "blocks", "another")
    for index in (0, 1):
        found.flags[torch.device("cuda", index)] = torch.zeros(1, dtype=torch.int32)
    return found


@pytest.mark.parametrize("kind", DOGS)
def test_the_check_raises_once(kind):
    DOGS[kind].flag(CPU).fill_(1)
    with pytest.raises(RuntimeError, match=f"a persistent {kind} kernel on cpu gave up at a barrier"):
        fastrnn.check_device()
    fastrnn.check_device()


@pytest.mark.parametrize("kind", DOGS)
def test_the_check_of_a_device_leaves_others_alone(kind, waits):
    DOGS[kind].flag(CPU).fill_(1)
    fastrnn.check_device("cuda:0")
    with pytest.raises(RuntimeError, match="gave up"):
        fastrnn.check_device(CPU)


def test_it_waits_for_a_device_before_it_looks(monkeypatch, waits, dog):
    fastrnn.check_device()
    assert set(waits) == {torch.device("cuda:0"), torch.device("cuda:1")}
    flag = dog.flags[torch.device("cuda:0")]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: flag.fill_(1) if device.index == 0 else None)
    fastrnn.check_device("cuda:1")
    with pytest.raises(RuntimeError, match="made-up kernel on cuda:0"):
        fastrnn.check_device("cuda:0")


@pytest.mark.usefixtures("dog")
def test_it_waits_for_no_device_without_such_kernels(waits):
    fastrnn.check_device("cuda:2")
    assert not waits


@pytest.mark.skipif(torch.cuda.is_available(), reason="where torch finds no GPU")
def test_a_gpu_that_is_not_there_is_not_asked_for():
    """Such kernels have run on the CPU, in the emulator or the interpreter."""
    DOGS["CUDA"].flag(CPU)
    fastrnn.check_device("cuda")
    fastrnn.check_device("cuda:0")


def test_one_error_names_all_kernels_that_gave_up(waits, dog):
    for flag in (*dog.flags.values(), *(other.flag(CPU) for other in DOGS.values())):
        flag.fill_(1)
    with pytest.raises(RuntimeError) as found:
        fastrnn.check_device()
    said = str(found.value)
    for kernel in ("CUDA kernel on cpu", "Triton kernel on cpu", *(f"made-up kernel on cuda:{i}" for i in (0, 1))):
        assert said.count(f"a persistent {kernel} gave up at a barrier") == 1
    assert "outputs and gradients of those calls are NaN" in said
    for way_out in ("fastrnn.backend('native')", "FASTRNN_TRITON_SCHEDULE=stepwise", "another"):
        assert said.count(way_out) == 1 + (way_out == "another")  # "another process"
    fastrnn.check_device()


def test_a_block_that_gives_up_after_another_raises_no_second_error(monkeypatch, waits, dog):
    """The flag is lowered after the launch that raised it is over."""
    where = torch.device("cuda:0")
    flag = dog.flags[where].fill_(1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: (waits.append(device), flag.fill_(1)))
    with pytest.raises(RuntimeError, match="made-up kernel on cuda:0 gave up"):
        dog.check(where)
    assert waits == [where]
    dog.check(where)
    assert waits == [where], "without an error it waits for nothing"


def test_in_a_capture_the_error_is_the_kernels_and_not_that_of_waiting(monkeypatch, waits, dog):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    dog.flags[torch.device("cuda:0")].fill_(1)
    with pytest.raises(RuntimeError, match="made-up kernel on cuda:0 gave up"):
        dog.check(torch.device("cuda:0"))
    assert not waits


def test_a_device_without_index_is_the_current_one(waits, dog):
    assert dog.flag(torch.device("cuda")) is dog.flag(torch.device("cuda:1"))
    dog.flag(torch.device("cuda:1")).fill_(1)
    with pytest.raises(RuntimeError, match="kernel on cuda:1 gave up"):
        dog.check(torch.device("cuda"))
    waits.clear()
    fastrnn.check_device("cuda")
    assert waits == [torch.device("cuda:1")]


def test_no_flag_is_made_in_a_capture(monkeypatch, waits, dog):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    new = torch.device("cuda:2")
    dog.check(new)  # a kernel that needs none can be captured at once
    with pytest.raises(RuntimeError, match=r"first call of a persistent made-up kernel on cuda:2 cannot be captured"):
        dog.flag(new)
    assert new not in dog.flags
    assert not dog.flag(torch.device("cuda:0")).any(), "one that is there serves a capture"
