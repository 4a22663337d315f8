"""The parts that do what torch's and transformers' own do, faster on a CPU: the same numbers, the same rules."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from hf_calib.models.modeling_calib_transformer import (
    CalibTransformerCacheLayer,
    CalibTransformerLinear,
    CalibTransformerRMSNorm,
)


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(32,), (1, 32), (8, 1, 32), (2, 8, 32), (4, 5, 32), (0, 1, 32)])
@pytest.mark.parametrize("out_features", [12, 13])  # 13 cannot be cut into four blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_is_linear(shape, bias, out_features, dtype):
    layer = CalibTransformerLinear(32, out_features, bias=bias).to(dtype)
    states = torch.randn(shape).to(dtype)
    expected = F.linear(states, layer.weight, layer.bias)
    with torch.no_grad():
        output = layer(states)
    torch.testing.assert_close(output, expected.detach())
    assert output.is_contiguous()
    layer(states.requires_grad_()).sum().backward()
    assert layer.weight.grad is not None


def test_few_rows_do_take_the_other_way(monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, states: pytest.fail("torch's way"))
    layer = CalibTransformerLinear(32, 12)
    with torch.no_grad():
        layer(torch.randn(16, 32))
        with pytest.raises(pytest.fail.Exception):
            layer(torch.randn(17, 32))
    with pytest.raises(pytest.fail.Exception):
        layer(torch.randn(16, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e15])
def test_norm_is_norm(dtype, scale):
    layer = CalibTransformerRMSNorm(32, eps=1e-6).to(dtype)
    torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
    states = (scale * torch.randn(3, 5, 32)).to(dtype)
    expected = F.rms_norm(states, (32,), layer.weight, 1e-6)
    with torch.no_grad():
        torch.testing.assert_close(layer(states), expected.detach())
    assert torch.equal(layer(states), expected)


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
