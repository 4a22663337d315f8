"""The parts that do what torch's and transformers' own do, faster on a CPU: the same numbers, the same rules."""

import copy

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_calib.models.modeling_calib_transformer import (
    CalibTransformerCacheLayer,
    CalibTransformerLinear,
    CalibTransformerRMSNorm,
    CrossEntropySum,
    RMSNormFunction,
    SwiGLUFunction,
    language_model_loss,
)


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (8, 1), (2, 8), (4, 5), (0, 1)])
@pytest.mark.parametrize("in_features", [32, 512])
@pytest.mark.parametrize("out_features", [16, 13])  # 13 cannot be cut into blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_is_linear(shape, bias, in_features, out_features, dtype):
    layer = CalibTransformerLinear(in_features, out_features, bias=bias).to(dtype)
    states = torch.randn(*shape, in_features).to(dtype)
    expected = F.linear(states, layer.weight, layer.bias)
    with torch.no_grad():
        output = layer(states)
    torch.testing.assert_close(output, expected.detach())
    assert output.is_contiguous()
    layer(states.requires_grad_()).sum().backward()
    assert layer.weight.grad is not None


def test_few_rows_do_take_the_other_way(monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, states: pytest.fail("torch's way"))
    layer = CalibTransformerLinear(32, 16)
    with torch.no_grad():
        layer(torch.randn(16, 32))
        with pytest.raises(pytest.fail.Exception):
            layer(torch.randn(17, 32))
    with pytest.raises(pytest.fail.Exception):
        layer(torch.randn(16, 32))


def values_and_gradients(function, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = function(*inputs)
    weights = torch.linspace(0.5, 1.5, output.numel()).view_as(output).to(output.dtype)
    return output, *torch.autograd.grad((weights * output).sum(), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e15])
def test_norm_is_norm(dtype, scale):
    layer = CalibTransformerRMSNorm(32, eps=1e-6).to(dtype)
    weight = layer.weight.data.uniform_(0.5, 1.5)
    states = (scale * torch.randn(3, 5, 32)).to(dtype)
    expected = values_and_gradients(lambda *xs: F.rms_norm(xs[0], (32,), xs[1], 1e-6), states, weight)
    found = values_and_gradients(lambda *xs: functional_call(layer, {"weight": xs[1]}, xs[0]), states, weight)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1.6e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(states), expected[0].detach())


def test_derivatives_of_the_norm():
    states, weight = torch.randn(3, 5, 8).double().requires_grad_(), torch.rand(8).double().requires_grad_()
    assert torch.autograd.gradcheck(RMSNormFunction.apply, (states, weight, 1e-6))
    assert torch.autograd.gradgradcheck(RMSNormFunction.apply, (states, weight, 1e-6))


def test_swiglu_is_swiglu():
    states = 4 * torch.randn(3, 5, 16)
    found = values_and_gradients(SwiGLUFunction.apply, states)
    expected = values_and_gradients(lambda x: F.silu(x[..., :8]) * x[..., 8:], states)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    states = states.double().requires_grad_()
    assert torch.autograd.gradcheck(SwiGLUFunction.apply, (states,))
    assert torch.autograd.gradgradcheck(SwiGLUFunction.apply, (states,))


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("shifted", [True, False])
def test_loss_is_transformers_loss(scale, num_items, shifted):
    logits, labels = scale * torch.randn(3, 70, 11), torch.randint(0, 11, (3, 70))
    labels[0, :9] = labels[2, 1::2] = -100
    options = {"num_items_in_batch": num_items, "shift_labels": labels.flip(1) if shifted else None}
    found = values_and_gradients(lambda x: language_model_loss(x, labels, 11, **options), logits)
    expected = values_and_gradients(lambda x: ForCausalLMLoss(x, labels, 11, **options), logits)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_loss_of_no_label_is_not_a_number_and_of_a_wrong_one_an_error():
    logits = torch.randn(1, 4, 11)
    nothing = torch.full((1, 4), -100)
    assert language_model_loss(logits, nothing, 11).isnan()
    assert language_model_loss(logits, nothing, 11, num_items_in_batch=3) == 0
    for label in (11, -1):
        with pytest.raises((IndexError, RuntimeError)):
            language_model_loss(logits, torch.full((1, 4), label), 11)


def test_derivatives_of_the_loss(monkeypatch):
    monkeypatch.setattr(CrossEntropySum, "block_size", 4)
    logits, labels = torch.randn(9, 11).double().requires_grad_(), torch.randint(0, 11, (9,))
    labels[2] = -100
    assert torch.autograd.gradcheck(CrossEntropySum.apply, (logits, labels, -100))
    assert torch.autograd.gradgradcheck(CrossEntropySum.apply, (logits, labels, -100))


def both_caches():
    ours, theirs = DynamicCache(), DynamicCache()
    ours.layers = [CalibTransformerCacheLayer()]
    return ours, theirs


def feed(caches, length, *, rows=2):
    key, value = torch.randn(2, rows, 3, length, 4)
    with torch.no_grad():
        (key_1, value_1), (key_2, value_2) = (cache.update(key, value, 0) for cache in caches)
    assert torch.equal(key_1, key_2)
    assert torch.equal(value_1, value_2)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_cache_keeps_what_is_fed_and_does_not_copy_it_every_time():
    caches = both_caches()
    feed(caches, 5)
    places = set()
    for _ in range(200):
        feed(caches, 1)
        places.add(caches[0].layers[0].keys.data_ptr())
    assert len(places) <= 4
    feed(caches, 300)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-2),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
        lambda cache: cache.reset(),
    ],
)
def test_cache_after_what_generation_does_to_it(change):
    caches = both_caches()
    for length in (5, 1, 1):
        feed(caches, length)
    for cache in caches:
        change(cache)
    for length in (1, 3, 1):
        feed(caches, length)


def test_a_copy_of_the_cache_goes_its_own_way():
    caches = both_caches()
    feed(caches, 5)
    copies = copy.deepcopy(caches)
    feed(copies, 1)
    feed(caches, 1)
    feed(copies, 1)
    feed(caches, 1)


def test_cache_of_fewer_rows_in_the_same_place():
    caches = both_caches()
    feed(caches, 5)
    for cache in caches:
        cache.layers[0].keys, cache.layers[0].values = cache.layers[0].keys[:1], cache.layers[0].values[:1]
    feed(caches, 1, rows=1)


def test_cache_with_gradients():
    cache = both_caches()[0]
    states = torch.randn(2, 3, 5, 4, requires_grad=True)
    cache.update(states, states, 0)
    keys, _ = cache.update(states[:, :, :1], states[:, :, :1], 0)
    keys.sum().backward()
    assert (states.grad[:, :, 0] == 2).all()
    assert (states.grad[:, :, 1:] == 1).all()
    with torch.no_grad():
        assert cache.update(states, states, 0)[0].shape == (2, 3, 11, 4)
