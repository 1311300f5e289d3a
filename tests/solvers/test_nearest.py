"""Round-to-nearest in few passes is the plain one, bit for bit."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress import BitpressError
from bitpress.quantization import preset_name_to_scheme
from bitpress.solvers import nearest, packed_to_nearest, round_to_nearest

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
PRESETS = ["NVFP4A16", "MXFP4A16", "FP8_DYNAMIC", "FP8", "FP8_BLOCK"]


@st.composite
def grids(draw):
    name = draw(st.sampled_from([*PRESETS, None, None, None]))
    if name is not None:
        return preset_name_to_scheme(name, []).weights
    strategy = draw(st.sampled_from(["tensor", "channel", "group"]))
    return QuantizationArgs(
        num_bits=draw(st.integers(2, 8)),
        type="int",
        symmetric=draw(st.booleans()),
        strategy=strategy,
        group_size=32 if strategy == "group" else None,
    )


@st.composite
def weights(draw):
    rows, columns = draw(st.integers(1, 40)), 32 * draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    weight = torch.randn(rows, columns, generator=generator) * 10.0 ** draw(st.integers(-6, 1))
    weight[draw(st.integers(0, rows - 1))] = 0
    weight[:, draw(st.integers(0, columns - 1))] *= 50
    return weight.to(draw(DTYPES))


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tolist() == other.tolist()


@settings(deadline=None)
@given(weights(), grids(), st.integers(1, 5000), st.booleans())
def test_is_round_to_nearest(weight, args, at_once, transposed):
    weight = weight.T.contiguous().T if transposed else weight
    before = weight.clone()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(nearest, "AT_ONCE", at_once)
        found, error = packed_to_nearest(weight, args)
    assert torch.equal(weight, before)
    quantized = round_to_nearest(weight, args, weight.dtype)
    expected = quantized.pack()
    assert same(found.packed.view(torch.uint8), expected.packed.contiguous().view(torch.uint8))
    assert same(found.scale.float(), expected.scale.float())
    assert same(found.zero_point, expected.zero_point)
    assert found.scale.dtype == weight.dtype
    assert (found.global_scale is None) == (expected.global_scale is None)
    assert found.shape == expected.shape
    sampled = weight.float() if args.strategy == "block" else weight[:: nearest.SAMPLED_ROWS].float()
    values = quantized.dequantize() if args.strategy == "block" else quantized.dequantize()[:: nearest.SAMPLED_ROWS]
    exact = (values - sampled).square().sum() / sampled.square().sum().clamp(min=1e-30)
    assert error == pytest.approx(float(exact), rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_values_that_are_not_finite_are_refused(bad, strategy):
    weight = torch.randn(8, 64)
    weight[5, 7] = bad
    args = QuantizationArgs(num_bits=4, type="int", strategy=strategy, group_size=32 if strategy == "group" else None)
    with pytest.raises(BitpressError, match=r"up_proj\.weight holds 1 NaN or infinite"):
        packed_to_nearest(weight, args, name="up_proj")
