"""Grids of activations: the stored scales, by compressed-tensors' own fake quantization."""

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.errors import BitpressError
from bitpress.quantization import QuantizationArgs, check_activations, static_tensors
from bitpress.quantization.activations import OF_ATTENTION

PROPERTY = settings(deadline=None, derandomize=True, max_examples=80)
BOUNDS = st.floats(-1e4, 1e4, width=32)
DTYPES = [torch.float32, torch.bfloat16]


@PROPERTY
@given(BOUNDS, BOUNDS, st.booleans(), st.sampled_from([4, 8]))
def test_every_value_of_the_range_is_near_a_point(a, b, symmetric, bits):
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric)
    found = static_tensors("input", torch.tensor([low]), torch.tensor([high]), args, torch.float32)
    scale, zero_point = found["input_scale"], found.get("input_zero_point")
    assert (scale.dtype, scale.shape) == (torch.float32, (1,))
    assert (zero_point is None) == symmetric
    x = torch.linspace(low, high, 101)
    off = (fake_quantize(x, scale, zero_point, args) - x).abs().max()
    # Half a step, and at the ends as much again: a symmetric grid has no point there, a zero point is rounded.
    assert off <= 1.001 * float(scale)
    assert fake_quantize(torch.zeros(1), scale, zero_point, args) == 0


@PROPERTY
@given(BOUNDS, BOUNDS, st.booleans())
def test_a_scale_is_rounded_to_the_dtype_of_the_layer(a, b, symmetric):
    low, high = torch.tensor([min(a, b)]), torch.tensor([max(a, b)])
    args = QuantizationArgs(num_bits=8, symmetric=symmetric)
    exact = static_tensors("input", low, high, args, torch.float32)["input_scale"]
    rounded = static_tensors("input", low, high, args, torch.bfloat16)["input_scale"]
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, exact.to(torch.bfloat16)) or float(exact) <= torch.finfo(torch.bfloat16).eps


@PROPERTY
@given(st.floats(2**-10, 1e4, width=32), st.sampled_from(DTYPES))
def test_floats_use_their_whole_range(magnitude, dtype):
    args = QuantizationArgs(num_bits=8, type="float")
    scale = static_tensors("k", torch.tensor([-magnitude]), torch.tensor([0.0]), args, dtype)["k_scale"]
    assert float(scale) == pytest.approx(magnitude / 448, rel=1e-6 if dtype == torch.float32 else 1 / 256)


@PROPERTY
@given(st.lists(st.tuples(BOUNDS, BOUNDS), min_size=1, max_size=4), st.booleans())
def test_a_head_has_the_scale_that_it_has_alone(bounds, symmetric):
    args = QuantizationArgs(num_bits=8, strategy="attn_head", symmetric=symmetric)
    low, high = (torch.tensor(x) for x in zip(*((min(b), max(b)) for b in bounds), strict=True))
    found = static_tensors("v", low, high, args, torch.float32)
    alone = QuantizationArgs(num_bits=8, symmetric=symmetric)
    for head, (a, b) in enumerate(zip(low, high, strict=True)):
        single = static_tensors("v", a.view(1), b.view(1), alone, torch.float32)
        assert found.keys() == single.keys()
        for kind, tensor in found.items():
            assert tensor.shape == (len(bounds), 1, 1)
            assert torch.equal(tensor[head].flatten(), single[kind])


def test_a_global_scale_puts_the_greatest_group_at_the_greatest_scale():
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, dynamic="local")
    found = static_tensors("input", torch.tensor([-3.0]), torch.tensor([2.0]), args, torch.bfloat16)
    assert list(found) == ["input_global_scale"]
    assert found["input_global_scale"].dtype == torch.float32
    assert float(found["input_global_scale"]) == pytest.approx(448 * 6 / 3)


@pytest.mark.parametrize("args", [{}, {"symmetric": False}, {"type": "float"}, {"strategy": "attn_head"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_all_zero_has_a_scale(args, dtype):
    made = QuantizationArgs(num_bits=8, **args)
    for kind, tensor in static_tensors("input", torch.zeros(1), torch.zeros(1), made, dtype).items():
        assert bool((tensor > 0).all()) or kind.endswith("zero_point")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"type": "float", "symmetric": False}, "symmetric=True"),
        ({"num_bits": 16}, "2 to 8"),
        ({"group_size": 8}, 'per "tensor"'),
        ({"strategy": "attn_head"}, 'per "tensor"'),
        ({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": True}, "local"),
    ],
)
def test_what_nobody_computes_is_refused(args, message):
    with pytest.raises(BitpressError, match=message):
        check_activations(QuantizationArgs(**args))


def test_local_scales_are_not_for_attention():
    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, dynamic="local")
    check_activations(args)
    with pytest.raises(BitpressError, match="inputs of layers"):
        check_activations(args, OF_ATTENTION)
