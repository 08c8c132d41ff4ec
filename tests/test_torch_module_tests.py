"""PyTorch's own tests of its recurrent modules, with our classes in the place of torch.nn's.

PyTorch describes what its suite does to each module in `torch.testing._internal.common_modules.module_db`: constructor
arguments, inputs, reference functions and inputs that must fail. The loops of that suite (its test/test_modules.py) are
not part of the wheel; the tests below ask the same questions of the same entries, on every backend. On the CPU
torch.nn passes them too. On CUDA PyTorch marks `test_grad`, `test_gradgrad` and `test_non_contiguous_tensors` of RNN,
LSTM and GRU as expected failures, and `test_what_torch_expects_to_fail` holds on to that list.
"""

import copy
import inspect
import io
import itertools
import re

import pytest
import torch
from hypothesis import settings
from support import assert_equal, leaves
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from fastrnn.replace import COUNTERPARTS

NAMES = [cls.__name__ for cls in COUNTERPARTS]
OWN_MESSAGE = re.compile(r"^(hx|input|input_size|hidden_size|num_layers|h_0|c_0)(\[\d\])?: expected .+, got .+", re.S)


@pytest.fixture(scope="module")
def suite():
    """PyTorch's module of module tests. Loaded here, as it costs seconds; what it changes for the process is undone."""
    profile, flag = settings.get_current_profile_name(), torch.backends.__allow_nonbracketed_mutation_flag
    script = torch._C.ScriptFunction.__call__, torch._C.ScriptMethod.__call__
    from torch.testing._internal import common_modules

    settings.load_profile(profile)
    torch.backends.__allow_nonbracketed_mutation_flag = flag
    torch._C.ScriptFunction.__call__, torch._C.ScriptMethod.__call__ = script
    return common_modules


@pytest.fixture(params=NAMES)
def info(request, suite):
    """PyTorch's entry of each class."""
    (found,) = [i for i in suite.module_db if i.module_cls.__name__ == request.param and i.module_cls in COUNTERPARTS]
    return found


def inputs(info, dtype, training, requires_grad, device="cpu"):
    """Entries of the class, those with a PackedSequence included, which PyTorch adds in its tests on CUDA."""
    kwargs = {"with_packed_sequence": True} if info.name in ("nn.RNN", "nn.GRU") else {}
    yield from info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=requires_grad, training=training, **kwargs
    )


def cases(info, requires_grad=False, dtypes=None, every=1):
    """(our module, PyTorch's with the same weights, args, kwargs, entry) for each dtype and entry.

    Entries take turns, two by two, in training and evaluation mode, the other way round in the next dtype.
    """
    count = 0
    for first, dtype in enumerate(dtypes or info.dtypes):
        for k, entry in enumerate(itertools.islice(inputs(info, dtype, True, requires_grad), 0, None, every)):
            call, training = entry.constructor_input, (k // 2 + first) % 2 == 0
            ours = COUNTERPARTS[info.module_cls](*call.args, **call.kwargs).to(dtype).train(training)
            theirs = info.module_cls(*call.args, **call.kwargs).to(dtype).train(training)
            theirs.load_state_dict(ours.state_dict())
            yield ours, theirs, entry.forward_input.args, entry.forward_input.kwargs, entry
            count += 1
    assert count, "PyTorch describes no input of this class"


def some(backend, info):
    """The engine takes every entry; the other backends, PyTorch's own operations, some: each option, on and off."""
    return 1 if backend == "cpu" or "Cell" in info.name else 5


def packed(args):
    return isinstance(args[0], torch.nn.utils.rnn.PackedSequence)


def tensors(value):
    return [t for t in tree_flatten(value)[0] if isinstance(t, torch.Tensor)]


def differentiable(value):
    return [t for t in tensors(value) if t.requires_grad]


def assert_all_equal(what, got, want):
    got, want = leaves(got), leaves(want)
    assert len(got) == len(want), what
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_equal(f"{what}, tensor {k}", a, b)


def test_every_class_is_in_pytorchs_list(suite):
    assert {i.module_cls for i in suite.module_db} >= set(COUNTERPARTS)


def test_what_torch_expects_to_fail(suite):
    """torch.nn's failures on CUDA, as PyTorch itself lists them; ours have no such list."""
    failing = {d.test_name for d in suite.rnn_gru_lstm_module_info_decorators if d.device_type == "cuda"}
    assert failing >= {"test_grad", "test_gradgrad", "test_non_contiguous_tensors"}


def test_forward(backend, info):
    for ours, theirs, args, kwargs, entry in cases(info):
        outputs = ours(*args, **kwargs)
        assert_all_equal("torch.nn's output", outputs, theirs(*args, **kwargs))
        assert entry.reference_fn is not None
        if not packed(args):  # its references add a batch dimension
            assert_all_equal("the reference's output", outputs, entry.reference_fn(ours, *args, **kwargs))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_factory_kwargs(info, device):
    for dtype in info.dtypes:
        for entry in inputs(info, dtype, True, False):
            call = entry.constructor_input
            m = COUNTERPARTS[info.module_cls](*call.args, **call.kwargs, device=device, dtype=dtype)
            assert {(p.device.type, p.dtype) for p in m.parameters()} == {(device, dtype)}
            with torch.device(device):
                m = COUNTERPARTS[info.module_cls](*call.args, **call.kwargs)
            assert {(p.device.type, p.dtype) for p in m.parameters()} == {(device, torch.float32)}


def test_repr(info):
    for ours, theirs, *_ in cases(info):
        assert repr(ours) == repr(theirs) == str(ours)


def test_pickle(backend, info):
    for ours, _, args, kwargs, _ in cases(info, every=some(backend, info)):
        want, file = ours(*args, **kwargs), io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        assert_all_equal("the unpickled module's output", twin(*args, **kwargs), want)


def test_no_inplace_option(info):
    """PyTorch compares variants in place and out of place of the modules that have both; these classes do not."""
    assert "inplace" not in inspect.signature(info.module_cls).parameters
    assert "inplace" not in inspect.signature(COUNTERPARTS[info.module_cls]).parameters
    for ours, _, args, kwargs, _ in cases(info):
        before = [(t.clone(), t._version) for t in tensors((args, kwargs))]
        ours(*args, **kwargs)
        for t, (value, version) in zip(tensors((args, kwargs)), before, strict=True):
            assert torch.equal(t, value)
            assert t._version == version, "an input was written to"


def spread(value):
    """The same values, every second element of a tensor that is twice as wide."""
    return tree_map_only(
        torch.Tensor,
        lambda t: (
            torch.repeat_interleave(t.detach(), 2, -1)[..., ::2].requires_grad_(t.requires_grad)
            if t.is_floating_point()
            else t
        ),
        value,
    )


def test_non_contiguous_tensors(backend, info):
    """Inputs and the gradients that come in, contiguous or not: same outputs, same gradients, those of torch.nn."""
    for ours, theirs, args, kwargs, _ in cases(info, requires_grad=True, every=some(backend, info)):
        wide = spread((args, kwargs))
        assert not any(t.is_contiguous() for t in tensors(wide) if t.is_floating_point())
        outputs = differentiable(theirs(*args, **kwargs))
        seeds = [torch.randn_like(o) for o in outputs]
        want = torch.autograd.grad(outputs, [*differentiable((args, kwargs)), *theirs.parameters()], seeds)
        for (a, k), g in itertools.product(((args, kwargs), wide), (seeds, spread(seeds))):
            got = differentiable(ours(*a, **k))
            assert_all_equal("output", got, outputs)
            found = torch.autograd.grad(got, [*differentiable((a, k)), *ours.parameters()], g)
            assert_all_equal("gradient", found, want)


def check_gradients(info, check, every=1):
    """PyTorch's check: of the inputs, hx and the parameters together, with vmap over the backward."""
    for ours, _, args, kwargs, _ in cases(info, requires_grad=True, dtypes=[torch.float64], every=every):
        if packed(args):
            continue  # tests/test_modules.py has those; their batch_sizes are no input of gradcheck's
        params = tuple(ours.parameters())
        flat, spec = tree_flatten((args, params))

        def function(*flat, m=ours, spec=spec, kwargs=kwargs):
            args, params = tree_unflatten(flat, spec)
            named = dict(zip(dict(m.named_parameters()), params, strict=True))
            return tuple(tree_flatten(torch.func.functional_call(m, named, args, kwargs))[0])

        assert check(function, flat, fast_mode=True, check_batched_grad=True)


def test_grad(backend, info):
    check_gradients(info, gradcheck, every=some(backend, info))


def test_gradgrad(backend, info):
    assert info.supports_gradgrad
    check_gradients(info, gradgradcheck, every=1 if "Cell" in info.name else 7 if backend == "cpu" else 11)


def test_moves_between_devices(info):
    """To "meta", where only shapes are computed, and back; PyTorch's own goes to the GPU and back."""
    for ours, theirs, args, kwargs, _ in cases(info):
        want = theirs(*args, **kwargs)
        state = copy.deepcopy(ours.state_dict())
        assert ours.to("cpu") is ours
        assert_all_equal("output", ours(*args, **kwargs), want)
        ours.to("meta")
        assert all(p.is_meta for p in ours.parameters())
        if not packed(args):  # whose batch_sizes stay on the CPU
            moved = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
            shapes = [(t.shape, t.dtype, t.device.type) for t in leaves(ours(*moved[0], **moved[1]))]
            assert shapes == [(t.shape, t.dtype, "meta") for t in leaves(want)]
        ours.to_empty(device="cpu").load_state_dict(state)
        assert_all_equal("output after the way back", ours(*args, **kwargs), want)


@pytest.fixture(params=[False, True], ids=["data", "swap"])
def convert(request):
    """Both ways in which torch can convert parameters: it fills the old one, or swaps it with a new one."""

    def to(module, *args):
        torch.__future__.set_swap_module_params_on_conversion(request.param)
        try:
            module.to(*args)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    return to


def test_to(backend, info, convert):
    """Another dtype, the parameters' gradients with them."""
    for ours, theirs, args, kwargs, _ in cases(info, dtypes=[torch.float64], every=3):
        before = list(ours.parameters())
        for p in before:
            p.grad = torch.ones_like(p)
        with torch.no_grad():
            ours(*args, **kwargs)  # whatever it remembers must not survive
        for m in (ours, theirs):
            convert(m, torch.float32)
        assert {(p.dtype, p.grad.dtype) for p in ours.parameters()} == {(torch.float32, torch.float32)}
        assert all(a is b for a, b in zip(ours.parameters(), before, strict=True)), "to() made new Parameters"
        narrow = tree_map_only(torch.Tensor, lambda t: t.float() if t.is_floating_point() else t, (args, kwargs))
        assert_all_equal("output", ours(*narrow[0], **narrow[1]), theirs(*narrow[0], **narrow[1]))


def test_to_empty(info):
    for ours, _, args, kwargs, _ in cases(info):
        with torch.device("meta"):
            m = copy.deepcopy(ours).to("meta")
        kept = list(m.parameters())
        m.to_empty(device="cpu")
        assert all(not p.is_meta for p in m.parameters())
        assert all(p.requires_grad for p in m.parameters())
        assert [p.shape for p in m.parameters()] == [p.shape for p in kept]
        m.reset_parameters()
        assert all(t.isfinite().all() for t in leaves(m(*args, **kwargs)))


def test_memory_format(backend, info):
    """No input of these classes has 4 or 5 dimensions, so that contiguous and preserve are all there is."""
    assert not info.module_memformat_affects_out
    for ours, _, args, kwargs, _ in cases(info, requires_grad=True, every=some(backend, info)):
        assert all(t.dim() < 4 for t in tensors((args, kwargs)))
        want = ours(*args, **kwargs)
        found = torch.autograd.grad(sum(t.sum() for t in differentiable(want)), list(ours.parameters()))
        assert all(g.is_contiguous() for g in found)
        for layout in (torch.preserve_format, torch.contiguous_format):
            ours.to(memory_format=layout)
            got = ours(*args, **kwargs)
            assert_all_equal(f"output with weights in {layout}", got, want)
            assert [t.is_contiguous() for t in leaves(got)] == [t.is_contiguous() for t in leaves(want)]


def test_if_train_and_eval_modes_differ(backend, info):
    for ours, _, args, kwargs, _ in cases(info):
        del ours.training
        if info.train_and_eval_differ:
            with pytest.raises(AttributeError, match="'training'"):
                ours(*args, **kwargs)
        else:
            ours(*args, **kwargs)


def test_errors(backend, info, suite):
    """The same exceptions for the same mistakes; where the words are not PyTorch's they name argument and value."""
    entries = [
        e
        for dtype, training in itertools.product(info.dtypes, (True, False))
        for e in info.module_error_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training)
    ]
    assert entries
    for entry in entries:
        make, call = entry.module_error_input.constructor_input, entry.module_error_input.forward_input
        ours = COUNTERPARTS[info.module_cls]
        if entry.error_on == suite.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(entry.error_type) as caught:
                ours(*make.args, **make.kwargs)
        else:
            m = ours(*make.args, **make.kwargs)
            dtype = next(t.dtype for t in tensors(call.args)) if "Cell" in info.name else None
            with pytest.raises(entry.error_type) as caught:
                m.to(dtype)(*call.args, **call.kwargs)
        assert caught.type is entry.error_type
        said = str(caught.value)
        assert re.search(entry.error_regex, said) or OWN_MESSAGE.match(said), said
