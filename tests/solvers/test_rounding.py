"""Learned rounding: where it starts, where gradients lead it, and what scales are told."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.quantization import QuantizationArgs, has_global_scale, preset_name_to_scheme, shared_global_scale
from bitpress.quantization.grid import beside, limits
from bitpress.solvers import LearnedRounding, gptq, round_to_nearest

PROPERTY = settings(deadline=None, derandomize=True, max_examples=20)
GRIDS = {
    "3 bits, groups": QuantizationArgs(num_bits=3, symmetric=False, group_size=16),
    "2 bits, symmetric": QuantizationArgs(num_bits=2, group_size=16),
    "channel": QuantizationArgs(num_bits=4, strategy="channel"),
    "tensor": QuantizationArgs(num_bits=4, strategy="tensor", symmetric=False),
    "float8 ragged blocks": QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[20, 24]),
    **{name: preset_name_to_scheme(name, []).weights for name in ("NVFP4A16", "MXFP4A16", "MXFP6A16")},
}
PLAIN = [name for name in GRIDS if "FP" not in name]


def solved(name, dtype, seed, *, by_gptq=False):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(24, 64, generator=generator) * 0.1).to(dtype)
    args = GRIDS[name]
    whole = shared_global_scale([weight], args) if has_global_scale(args) else None
    if by_gptq:
        x = torch.randn(100, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
        return weight, gptq(weight, x.T @ x, args, dtype, global_scale=whole).weight
    return weight, round_to_nearest(weight, args, dtype, None, whole)


@pytest.mark.parametrize("by_gptq", [False, True], ids=["nearest", "gptq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GRIDS)
def test_it_starts_at_the_points_that_were_chosen(name, dtype, by_gptq):
    weight, start = solved(name, dtype, 3, by_gptq=by_gptq)
    learned = LearnedRounding(start, weight)
    torch.testing.assert_close(
        learned.dense(), start.dequantize(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0
    )
    found = learned.quantized()
    assert torch.equal(found.values.float(), start.values.float())
    assert torch.equal(found.scale, start.scale)
    assert torch.equal(found.dequantize(), start.dequantize())


@pytest.mark.parametrize("name", GRIDS)
def test_a_value_that_goes_one_distance_against_its_gradient_is_at_the_next_point(name):
    weight, start = solved(name, torch.float32, 5)
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    learned = LearnedRounding(start, weight)
    learned.dense()
    learned.step(1.0, gradient)
    before, after = start.values.float(), learned.quantized().values.float()
    low, high = limits(start.args)
    rose, fell = (gradient < 0) & (before < high), (gradient > 0) & (before > low)
    # Away from 0 the points of floats may lie twice as far apart as what is gone.
    outwards = (rose & (before > 0)) | (fell & (before < 0))
    floats = start.args.type == "float"
    sure = ~outwards if floats else torch.ones_like(outwards)
    assert bool((after[rose & sure] > before[rose & sure]).all())
    assert bool((after[fell & sure] < before[fell & sure]).all())
    assert bool((after[rose] >= before[rose]).all())
    assert bool((after[fell] <= before[fell]).all())
    if not floats:
        assert torch.equal((after - before).abs(), (rose | fell).float())


def test_values_that_lie_between_two_points_move_first():
    args = QuantizationArgs(num_bits=4, symmetric=True, group_size=16)
    weight = torch.zeros(1, 16)
    weight[0, :3] = torch.tensor([7.0, 2.4, 2.0])
    start = round_to_nearest(weight, args, torch.float32, (torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int8)))
    learned = LearnedRounding(start, weight)
    learned.dense()
    learned.step(0.2, -torch.ones_like(weight))
    assert learned.quantized().values[0, :3].tolist() == [7, 3, 2]


@PROPERTY
@given(name=st.sampled_from(PLAIN), seed=st.integers(0, 99))
def test_factors_are_told_the_slope_of_the_loss(name, seed):
    weight, start = solved(name, torch.float32, seed)
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    learned = LearnedRounding(start, weight)
    learned.dense()
    learned.step(0.0, gradient)
    factors = torch.zeros_like(start.scale, dtype=torch.float64).requires_grad_()
    view, (of_group,) = beside(start.dequantize().double(), [factors.exp()], start.args)
    loss = ((view * of_group).reshape(weight.shape) * gradient.double()).sum()
    (expected,) = torch.autograd.grad(loss, factors)
    torch.testing.assert_close(learned.factors.grad.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
def test_factors_multiply_the_scales(name):
    weight, start = solved(name, torch.float32, 1)
    learned = LearnedRounding(start, weight)
    with torch.no_grad():
        learned.factors.fill_(0.1)
    torch.testing.assert_close(learned.dense(), start.dequantize() * 1.1051709)
    torch.testing.assert_close(learned.quantized().dequantize(), learned.dense())


@pytest.mark.parametrize("name", [name for name in GRIDS if name not in PLAIN])
def test_scales_that_take_few_values_stay(name):
    weight, start = solved(name, torch.float32, 1)
    learned = LearnedRounding(start, weight)
    assert learned.factors is None
    learned.dense()
    learned.step(0.3, torch.ones_like(weight))
    assert torch.equal(learned.quantized().scale, start.scale)
