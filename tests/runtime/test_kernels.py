"""Kernels for packed weights: against float64, within the rounding that they are said to make."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bitpress.checkpoints.attached import attach
from bitpress.quantization import QuantizedWeight, affine_parameters, integer_range
from bitpress.runtime.int4 import Int4Layer, works_on
from bitpress.runtime.int8 import Int8Layer
from bitpress.runtime.kernels import kernel_for, kernel_in_bfloat16, no_kernel
from bitpress.runtime.layers import PackedLayer, pack_layer, unpack_layer

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
# The greatest relative error of rounding to bfloat16, and to float32.
U, U32 = 2.0**-8, 2.0**-24


def weight_of(args, rows, columns, dtype, seed, reach=1.0):
    """Any integers, on the grid of random ranges."""
    draw = torch.Generator().manual_seed(seed)
    least, greatest = integer_range(args)
    values = torch.randint(least, greatest + 1, (rows, columns), generator=draw, dtype=torch.int8)
    shape = {"tensor": (1,), "channel": (rows, 1)}.get(args.strategy, (rows, columns // (args.group_size or columns)))
    low, high = (torch.rand(shape, generator=draw) * reach for _ in range(2))
    scale, zero_point = affine_parameters(-low, high, args, dtype)
    return QuantizedWeight(values, scale, zero_point, args)


def packed_layer(weight, choose=kernel_for, *, bias=False, seed=0):
    """A linear layer that holds ``weight``, and what it was before."""
    rows, columns = weight.values.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(columns, rows, bias=bias).to(weight.scale.dtype)
    layer.weight.data = weight.dequantize()
    attach(layer, QuantizationScheme(targets=["Linear"], weights=weight.args), weight.pack())
    dense = nn.Linear(columns, rows, bias=bias)
    dense.load_state_dict(layer.state_dict())
    pack_layer(layer, weight.pack(), choose)
    return layer, dense.to(weight.scale.dtype)


def spread(parameters, weight):
    """As (out, in), float64."""
    rows, columns = weight.values.shape
    full = parameters.double().reshape(1, 1) if parameters.numel() == 1 else parameters.double()
    return full.expand(rows, full.shape[1]).repeat_interleave(columns // full.shape[1], 1)


def assert_within_rounding(layer, weight, tokens, seed):
    columns = weight.values.shape[1]
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()
    scale, z, q = spread(weight.scale, weight), spread(weight.zero_point, weight), weight.values.double()
    exact = x.double() @ ((q - z) * scale).T
    kernels = scale.bfloat16().double()
    of_weights = U * kernels * z.abs() + (q - z).abs() * (kernels - scale).abs()
    of_sums = (columns + 4) * U32 * (q.abs() + z.abs()) * kernels
    bound = x.double().abs() @ (of_weights + of_sums).T * (1 + U) + U * exact.abs()
    bias = layer.bias
    if bias is not None:
        exact = exact + bias.double()
        bound = bound + U * (exact.abs() + bound)
    y = layer(x.to(weight.scale.dtype)).double()
    assert y.shape == exact.shape
    assert ((y - exact).abs() <= bound).all()


@st.composite
def small_weights(draw):
    """Of 2 to 4 bits, with groups or not, odd numbers of rows."""
    strategy = draw(st.sampled_from(["tensor", "channel", "group"]))
    size, groups = draw(st.sampled_from([32, 64, 96, 128, 256, 512])), draw(st.integers(1, 3))
    args = QuantizationArgs(
        num_bits=draw(st.integers(2, 4)), symmetric=draw(st.booleans()), strategy=strategy,
        group_size=size if strategy == "group" else None,
    )  # fmt: skip
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float32]))
    rows, seed = draw(st.integers(1, 85)), draw(st.integers(0, 2**20))
    return weight_of(args, rows, size * groups, dtype, seed, 10.0 ** draw(st.integers(-6, 3)))


@PROPERTY
@given(small_weights(), st.integers(0, 9), st.booleans())
def test_int4_rounds_as_it_says(weight, tokens, bias):
    layer, _ = packed_layer(weight, kernel_in_bfloat16, bias=bias)
    assert isinstance(layer, Int4Layer)
    assert_within_rounding(layer, weight, tokens, seed=tokens)


@PROPERTY
@given(small_weights())
def test_int4_gives_all_back(weight):
    layer, dense = packed_layer(weight, kernel_in_bfloat16)
    stored, back = weight.pack(), layer.packed_weight()
    for kind in ("packed", "scale", "zero_point"):
        one, other = getattr(stored, kind), getattr(back, kind)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert torch.equal(layer.weight, dense.weight)
    unpack_layer(layer)
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, dense.weight)


@PROPERTY
@given(
    st.integers(5, 8), st.sampled_from(["tensor", "channel"]), st.integers(1, 85), st.integers(1, 10),
    st.sampled_from([torch.bfloat16, torch.float32]), st.integers(0, 5), st.booleans(),
)  # fmt: skip
def test_int8_rounds_as_it_says(bits, strategy, rows, pieces, dtype, tokens, bias):
    weight = weight_of(QuantizationArgs(num_bits=bits, strategy=strategy), rows, 32 * pieces, dtype, rows * pieces)
    layer, dense = packed_layer(weight, kernel_in_bfloat16, bias=bias)
    assert isinstance(layer, Int8Layer)
    assert_within_rounding(layer, weight, tokens, seed=tokens)
    assert torch.equal(layer.weight, dense.weight)
    assert torch.equal(layer.packed_weight().packed, weight.pack().packed)


def test_the_zero_is_the_only_difference_in_bfloat16():
    # On a symmetric grid the kernel is nearer to the exact product than a dense one, whose sums are rounded as often.
    weight = weight_of(QuantizationArgs(num_bits=4, strategy="group", group_size=64), 64, 512, torch.bfloat16, 0)
    layer, dense = packed_layer(weight)
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = x.double() @ ((weight.values.double() * spread(weight.scale, weight)).T)
    assert (layer(x).double() - exact).norm() <= (dense(x).double() - exact).norm()


@pytest.mark.parametrize("shape", [(7, 512), (2, 5, 512), (2, 0, 512), (512,)], ids=str)
def test_any_number_of_dimensions(shape):
    weight = weight_of(QuantizationArgs(num_bits=4, strategy="group", group_size=64), 24, 512, torch.bfloat16, 0)
    layer, dense = packed_layer(weight, bias=True)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(layer(x), dense(x), rtol=0.02, atol=0.1)
    if len(shape) == 3 and shape[1]:
        assert torch.equal(layer(x.transpose(0, 1)), layer(x).transpose(0, 1))


@pytest.mark.parametrize(
    ("args", "dtype", "kind"),
    [
        ({"num_bits": 4, "strategy": "group", "group_size": 64}, torch.float32, PackedLayer),
        ({"num_bits": 4, "strategy": "group", "group_size": 64}, torch.float16, PackedLayer),
        ({"num_bits": 4, "strategy": "group", "group_size": 16}, torch.bfloat16, PackedLayer),
        ({"num_bits": 5, "strategy": "group", "group_size": 64}, torch.bfloat16, PackedLayer),
        ({"num_bits": 8, "strategy": "channel", "symmetric": False}, torch.bfloat16, PackedLayer),
        ({"num_bits": 3, "strategy": "channel"}, torch.bfloat16, Int4Layer),
        ({"num_bits": 6, "strategy": "tensor"}, torch.bfloat16, Int8Layer),
    ],
)
def test_what_is_chosen(args, dtype, kind):
    weight = weight_of(QuantizationArgs(**args), 16, 128, dtype, 0)
    assert kernel_for(nn.Linear, weight.pack(), dtype) is kind
    assert no_kernel(nn.Linear, weight.pack(), dtype) is PackedLayer


@pytest.mark.parametrize("columns", [1, 63, 80])
def test_int8_where_the_kernel_would_read_past_the_row(columns):
    weight = weight_of(QuantizationArgs(num_bits=8, strategy="channel"), 16, columns, torch.bfloat16, 0)
    layer, dense = packed_layer(weight)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(layer(x), dense(x))


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_pass(bits):
    weight = weight_of(QuantizationArgs(num_bits=bits, strategy="channel"), 16, 128, torch.bfloat16, 0)
    layer, dense = packed_layer(weight, bias=True)
    assert type(layer).product is not PackedLayer.product
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    gradients = []
    for module in (layer, dense):
        given = x.clone().requires_grad_()
        module(given).square().sum().backward()
        gradients.append(given.grad.float())
    assert (gradients[0] - gradients[1]).norm() <= 0.02 * gradients[1].norm()
    assert layer.bias.grad is not None


def test_memory_that_is_not_aligned():
    weight = weight_of(QuantizationArgs(num_bits=8, strategy="channel"), 16, 128, torch.bfloat16, 0)
    layer, _ = packed_layer(weight)
    x = torch.randn(3 * 128 + 1, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(layer(x[1:].view(3, 128)), layer(x[1:].clone().view(3, 128)))
    stored = torch.empty(16 * 128 + 1, dtype=torch.int8)
    stored[1:] = layer.weight_int8.flatten()
    state = layer.state_dict() | {"weight_int8": stored[1:].view(16, 128)}
    expected = layer(x[:384].view(3, 128))
    layer.load_state_dict(state, assign=True)
    assert torch.equal(layer(x[:384].view(3, 128)), expected)


def test_a_class_with_a_forward_of_its_own_keeps_it():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    weight = weight_of(QuantizationArgs(num_bits=4, strategy="channel"), 16, 128, torch.bfloat16, 0)
    assert kernel_for(Doubled, weight.pack(), torch.bfloat16) is PackedLayer


def test_grids_that_bfloat16_cannot_hold_are_dequantized():
    args = QuantizationArgs(num_bits=4, strategy="channel", symmetric=False)
    weight = weight_of(args, 16, 128, torch.bfloat16, 0)
    huge = QuantizedWeight(weight.values, torch.full((16, 1), 1e38).bfloat16(), weight.zero_point.fill_(-8), args)
    assert kernel_for(nn.Linear, huge.pack(), torch.bfloat16) is PackedLayer


def test_the_kernel_is_on_this_machine():
    assert works_on(torch.device("cpu"))
    assert not works_on(torch.device("meta"))
