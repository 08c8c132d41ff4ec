"""Wrappers that take the weights away and give them back: DDP, FSDP2 and DataParallel's replicas.

Two processes on the CPU, each with half of every batch, must come to the losses of torch.nn in one process with all of
it. torch.nn gets through these on the CPU; on CUDA its flat buffer of weights is what such wrappers break ("RNN module
weights are not part of single contiguous chunk of memory").
"""

import datetime
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from support import B, H, I, T, assert_equal, leaves
from torch import nn

import fastrnn

WORLD, STEPS, LIMIT = 2, 4, 120  # LIMIT: seconds, after which the processes are ended and the test fails
GLOO = dist.is_available() and dist.is_gloo_available()
pytestmark = pytest.mark.skipif(not GLOO, reason="torch was built without gloo")


class Model(nn.Module):
    """LSTM (two directions, two layers, ragged), GRU, RNN, a cell and a head. Returns the loss, a mean."""

    def __init__(self, library, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(5)
        self.lstm = library.LSTM(I, H, 2, bidirectional=True, dtype=dtype)
        self.gru = library.GRU(2 * H, H, dtype=dtype)
        self.rnn = library.RNN(H, H, dtype=dtype)
        self.cell = library.LSTMCell(H, H, dtype=dtype)
        self.head = nn.Linear(H, 3, dtype=dtype)

    def forward(self, x, target):
        y = self.rnn(self.gru(self.lstm(x)[0])[0])[0]
        h, c = self.cell(y[0])
        return (self.head(y + self.cell(y[1], (h, c))[0]) - target).pow(2).mean()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    shapes = (T, WORLD * B, I), (T, WORLD * B, 3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def train(model, data, steps=range(STEPS)):
    """Loss of each step, averaged over the processes where there are several."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.2), []
    for step in steps:
        loss = model(*data(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(loss, dist.ReduceOp.SUM)
            loss /= WORLD
        losses.append(loss.item())
    return losses


def share(step):
    """This process's part of the batch."""
    return [a[:, dist.get_rank() :: WORLD] for a in batch(step)]


def ddp(result):
    from torch.nn.parallel import DistributedDataParallel

    for bucket_view in (False, True):  # .grad as views of the buckets, too
        model = DistributedDataParallel(Model(fastrnn), gradient_as_bucket_view=bucket_view)
        result["losses", bucket_view] = train(model, share)
        result["state", bucket_view] = model.module.state_dict()


def sharded(library, reshard, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, mesh = Model(library), init_device_mesh("cpu", (WORLD,))
    for part in (model.lstm, model.gru, model.rnn, model.cell):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard, **options)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard, **options)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def fsdp(result):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    for reshard in (True, False):  # whether the gathered weights are freed between forward and backward
        model = sharded(fastrnn, reshard)
        result["losses", reshard] = train(model, share)
        result["state", reshard] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    # The state of a model after two steps, set into another, goes on as if nothing had happened.
    first, second = sharded(fastrnn, True), sharded(fastrnn, True)
    start = train(first, share, range(2))
    full = get_model_state_dict(first, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with torch.no_grad():
        for p in second.parameters():
            p.zero_()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(second, full if dist.get_rank() == 0 else {}, options=options)
    result["resumed"] = start + train(second, share, range(2, STEPS))


def mixed(result):
    """Weights gathered in bf16, gradients summed in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for library in (nn, fastrnn):
        model = sharded(library, True, mp_policy=policy)
        result["losses", library.__name__] = train(model, share)
        assert {p.grad.dtype for p in model.parameters()} == {torch.float64}  # the parameters' own


def worker(rank, folder, names):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    limit = datetime.timedelta(seconds=LIMIT / 2)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=WORLD, timeout=limit)
    try:
        result = {}
        for name in names:
            globals()[name](result)
        torch.save(result, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def in_two_processes(folder, *names):
    """What the functions of these names left in `result`, per process; raises what they raise."""
    context = torch.multiprocessing.start_processes(worker, (folder, names), WORLD, join=False, start_method="spawn")
    end = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"{names} did not end within {LIMIT} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD)]


@pytest.fixture
def alone():
    """torch.nn's losses and final weights in this process."""
    model = Model(nn)
    losses = train(model, batch)
    untrained = Model(nn).state_dict()
    assert not any(torch.equal(value, untrained[key]) for key, value in model.state_dict().items())
    return losses, model.state_dict()


def check(name, losses, state, alone):
    torch.testing.assert_close(losses, alone[0], rtol=1e-9, atol=0, msg=lambda m: f"{name}: {m}")
    assert list(state) == list(alone[1])
    for key, value in state.items():
        assert_equal(f"{name} {key}", value, alone[1][key])


def test_ddp_gives_the_losses_of_one_process(tmp_path, alone):
    for rank, result in enumerate(in_two_processes(tmp_path, "ddp")):
        for view in (False, True):
            check(f"rank {rank}", result["losses", view], result["state", view], alone)


def test_fsdp2_gives_the_losses_of_one_process(tmp_path, alone):
    for rank, result in enumerate(in_two_processes(tmp_path, "fsdp", "mixed")):
        for reshard in (True, False):
            check(f"rank {rank}", result["losses", reshard], result["state", reshard], alone)
        torch.testing.assert_close(result["resumed"], alone[0], rtol=1e-9, atol=0)
        for library in ("torch.nn", "fastrnn"):
            torch.testing.assert_close(result["losses", library], alone[0], rtol=0.05, atol=0)


def replicas(module, count):
    """What torch.nn.parallel.replicate makes, which itself asks for GPUs: the weights are plain, no parameters."""
    made = []
    for _ in range(count):
        twin = module._replicate_for_data_parallel()
        for key, p in module._parameters.items():
            setattr(twin, key, p.clone())  # there: Broadcast.apply
        made.append(twin)
    return made


def data_parallel(module, parts):
    with ThreadPoolExecutor(len(parts)) as pool:  # as parallel_apply, one thread per replica
        return list(pool.map(lambda twin, x: twin(x)[0], replicas(module, len(parts)), parts))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_replicas_use_their_own_weights(name):
    cell = "Cell" in name
    made = [getattr(library, name)(I, H, dtype=torch.float64) for library in (nn, fastrnn)]
    made[1].load_state_dict(made[0].state_dict())
    x = torch.randn((4 * B, I) if cell else (T, 4 * B, I), dtype=torch.float64)
    parts = x.chunk(2, -2)
    results = []
    for module in made:
        module(x)  # whatever a call remembers is not for the replicas
        outputs = data_parallel(module, parts)
        sum(y.pow(2).sum() for y in outputs).backward()
        results.append([*outputs, *(p.grad for p in module.parameters())])
        with torch.no_grad():  # another weight in one replica changes that one alone
            one, two = replicas(module, 2)
            key = "weight_ih" if cell else "weight_ih_l0"
            setattr(one, key, torch.zeros_like(getattr(one, key)))
            results[-1] += [one(x)[0], two(x)[0], module(x)[0]]
            assert torch.equal(results[-1][-1], results[-1][-2])
            assert not torch.equal(results[-1][-1], results[-1][-3])
    for k, (theirs, ours) in enumerate(zip(*results, strict=True)):
        assert_equal(f"result {k}", ours, theirs)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_outputs_are_no_views(backend, name):
    """FSDP2 hangs a hook on each output that a change in place of a view would lose, and warns of views."""
    x = torch.randn((B, I) if "Cell" in name else (T, B, I))
    for library in (nn, fastrnn):
        assert not any(t._is_view() for t in leaves(getattr(library, name)(I, H)(x)))
