"""Grids of floats: value for value those of compressed-tensors, whatever the weight."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, fake_quantize, preset_name_to_scheme
from compressed_tensors.quantization.quant_args import round_to_quantized_type_args
from compressed_tensors.quantization.utils import calculate_qparams, calculate_range, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.quantization import (
    PackedWeight,
    QuantizedWeight,
    check_supported,
    has_global_scale,
    limits,
    points_dtype,
    round_to_points,
    shared_global_scale,
    stored_format,
)
from bitpress.quantization import fake_quantize as ours_of
from bitpress.quantization.packing import pack_floats, unpack_floats
from bitpress.quantization.scales import step_sizes
from bitpress.solvers.ranges import minmax_parameters, round_to_nearest

PROPERTY = settings(deadline=None, derandomize=True, max_examples=60)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def float8(strategy, **more):
    return QuantizationArgs(num_bits=8, type="float", strategy=strategy, **more)


GRIDS = {
    "tensor": float8("tensor"),
    "channel": float8("channel"),
    "group": float8("group", group_size=16),
    "block": float8("block", block_structure=[5, 32]),
    **{name: preset_name_to_scheme(name, []).weights for name in ("NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16")},
}


@st.composite
def weights(draw, dtypes=FLOATS):
    """A weight with values of all magnitudes, zeros and groups of zeros among them, and a scheme for it."""
    args = GRIDS[draw(st.sampled_from(sorted(GRIDS)))]
    rows, groups = draw(st.integers(1, 13)), draw(st.integers(1, 3))
    columns = groups * 32 + (draw(st.integers(0, 31)) if args.strategy in ("tensor", "channel", "block") else 0)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    weight = torch.randn(rows, columns, generator=generator) * 10.0 ** draw(st.integers(-3, 1))
    if draw(st.booleans()):
        weight *= torch.rand(rows, columns, generator=generator).pow(8)
    if draw(st.booleans()):
        weight[torch.rand(rows, columns, generator=generator) < 0.3] = 0
    if draw(st.booleans()):
        weight[:, :32] = 0
    return weight.to(draw(st.sampled_from(dtypes))), args


def state_of(quantized: QuantizedWeight):
    """What compressed-tensors has of a weight before it compresses it."""
    state = {"weight": quantized.dequantize(), "weight_scale": quantized.scale}
    return state if quantized.global_scale is None else {**state, "weight_global_scale": quantized.global_scale}


def compressor_of(args):
    scheme = QuantizationScheme(targets=[], weights=args)
    return BaseCompressor.get_value_from_registry(stored_format(scheme)), scheme


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rounding_is_the_reference_s_on_every_number(bits, dtype):
    args = QuantizationArgs(num_bits=bits, type="float")
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    numbers = every.view(torch.float16).float() if dtype == torch.float32 else every.view(dtype)
    numbers = numbers[numbers.isfinite()]
    theirs = round_to_quantized_type_args(numbers.clone(), args, *calculate_range(args, "cpu"))
    given = numbers.clone()
    assert round_to_points(given, args) is given
    assert torch.equal(given, theirs)
    assert torch.equal(given.to(points_dtype(args)).to(dtype), given)


@PROPERTY
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50), st.sampled_from([4, 6, 8]))
def test_rounding_is_to_the_nearest(numbers, bits):
    args = QuantizationArgs(num_bits=bits, type="float")
    x = torch.tensor(numbers, dtype=torch.float32)
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    points = table[table.isfinite() & (table.abs() <= limits(args)[1])].unique()
    points = points[round_to_points(points.float(), args).double() == points]
    assert len(points) == 2**bits - (1 if bits < 8 else 3)  # one zero; e4m3 has two NaN
    rounded = round_to_points(x.clone(), args).double()
    beyond = x.double().clamp(*limits(args))
    assert torch.equal((rounded - beyond).abs(), (points[:, None] - beyond).abs().amin(0))


def test_the_ends_of_infinity():
    for bits in (4, 6, 8):
        args = QuantizationArgs(num_bits=bits, type="float")
        ends = round_to_points(torch.tensor([-float("inf"), float("inf"), float("nan")]), args)
        assert ends[:2].tolist() == list(limits(args))
        assert ends[2].isnan()


@PROPERTY
@given(weights())
def test_fake_quantizing_is_the_reference_s(case):
    weight, args = case
    global_scale = shared_global_scale([weight], args) if has_global_scale(args) else None
    scale, _ = minmax_parameters(weight.float(), args, weight.dtype, global_scale)
    assert scale.dtype == weight.dtype
    theirs = fake_quantize(weight, scale, None, args, global_scale=global_scale)
    ours = ours_of(weight, step_sizes(scale, global_scale), None, args)
    assert torch.equal(ours, theirs.to(weight.dtype))


@PROPERTY
@given(weights(dtypes=[torch.float32]))
def test_scales_are_the_reference_s(case):
    weight, args = case
    if args.strategy == "block":
        return  # its observers see padded blocks; the test of fake quantization covers what is done with them
    grouped = weight.unflatten(1, (-1, args.group_size)) if args.group_size else weight
    dims = None if args.strategy == "tensor" else -1
    low, high = (weight.amin(), weight.amax()) if dims is None else (grouped.amin(dims), grouped.amax(dims))
    if args.strategy == "channel":
        low, high = low[:, None], high[:, None]
    theirs_global = generate_gparam(weight.amin(), weight.amax()) if has_global_scale(args) else None
    ours_global = shared_global_scale([weight], args) if has_global_scale(args) else None
    assert theirs_global is None or torch.equal(ours_global, theirs_global)
    theirs, _ = calculate_qparams(low, high, args, global_scale=theirs_global)
    ours, _ = minmax_parameters(weight, args, weight.dtype, ours_global)
    # Of a group of zeros compressed-tensors makes 2^-127, which is no normal number.
    assert torch.equal(ours, theirs.clamp(min=2.0**-126).reshape(ours.shape))


@PROPERTY
@given(weights())
def test_compressed_tensors_reads_what_was_evaluated(case):
    weight, args = case
    quantized = round_to_nearest(weight, args, weight.dtype)
    compressor, scheme = compressor_of(args)
    stored = quantized.pack().tensors()
    assert set(stored) == set(compressor.compression_param_names(scheme))
    loaded = compressor.decompress(stored, scheme)["weight"]
    own_dtype = args.num_bits == 4 or args.scale_dtype is not None
    assert loaded.dtype == (torch.bfloat16 if own_dtype else weight.dtype)
    assert torch.equal(loaded, quantized.dequantize().to(loaded.dtype)) or (
        # The product is rounded once here, and in float16 underflows.
        weight.dtype == torch.float16 and own_dtype
    )


@PROPERTY
@given(weights(dtypes=[torch.float32, torch.bfloat16]))
def test_what_is_stored_is_what_compressed_tensors_stores(case):
    weight, args = case
    quantized = round_to_nearest(weight, args, weight.dtype)
    compressor, scheme = compressor_of(args)
    theirs = compressor.compress(state_of(quantized), scheme)
    ours = quantized.pack().tensors()
    assert set(ours) == set(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert ours[name].shape == theirs[name].shape, name
        assert ours[name].is_contiguous(), name
        if name == "weight":
            assert torch.equal(ours[name].float(), theirs[name].float())  # zeros have one sign here
        elif name != "weight_packed":
            assert torch.equal(ours[name].float(), theirs[name].float()), name
    assert torch.equal(compressor.decompress(theirs, scheme)["weight"], compressor.decompress(ours, scheme)["weight"])


@PROPERTY
@given(weights())
def test_the_weight_gives_its_points_back(case):
    weight, args = case
    quantized = round_to_nearest(weight, args, weight.dtype)
    dense = quantized.dequantize()
    assert dense.dtype == weight.dtype
    found = QuantizedWeight.on_grid(dense, quantized.scale, quantized.zero_point, args, quantized.global_scale)
    assert torch.equal(found.dequantize(), dense)


@PROPERTY
@given(weights())
def test_stored_tensors_are_read_back(case):
    weight, args = case
    quantized = round_to_nearest(weight, args, weight.dtype)
    packed = quantized.pack()
    read = PackedWeight.from_tensors(packed.tensors(), args, weight.dtype)
    assert read.shape == tuple(weight.shape)
    assert torch.equal(read.scale, quantized.scale)
    assert read.scale.dtype == weight.dtype
    assert torch.equal(read.unpack().values.float(), quantized.values.float())
    assert torch.equal(read.unpack().dequantize(), quantized.dequantize())
    bits = 8 * (packed.packed.nbytes) / weight.numel()
    assert bits == args.num_bits


@pytest.mark.parametrize("bits", [4, 6])
def test_every_code_is_packed_and_unpacked(bits):
    args = QuantizationArgs(num_bits=bits, type="float")
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = table.float()
    points = table.view(torch.uint8)[
        (values.abs() <= limits(args)[1]) & (round_to_points(values.clone(), args) == values)
    ].view(torch.float8_e4m3fn)
    assert len(points) == 2**bits
    rows = points.view(torch.uint8).reshape(2, -1).view(torch.float8_e4m3fn)
    packed = pack_floats(rows, bits)
    assert len(set(unpack_floats(packed, bits).view(torch.uint8).flatten().tolist())) == 2**bits
    assert torch.equal(unpack_floats(packed, bits).view(torch.uint8), rows.view(torch.uint8))


@pytest.mark.parametrize("name", GRIDS)
def test_are_supported(name):
    check_supported(GRIDS[name])
