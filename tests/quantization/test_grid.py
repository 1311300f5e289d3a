"""The grid's arithmetic: bit for bit that of compressed-tensors, and within the bounds that theory gives."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle import forward as reference
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress.errors import BitpressError
from bitpress.quantization import (
    affine_parameters,
    check_supported,
    dequantize,
    fake_quantize,
    grid,
    integer_range,
    quantize,
)

PROPERTY = settings(deadline=None, derandomize=True, max_examples=80)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CARRIERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
STRATEGIES = ("tensor", "channel", "group")
FINITE = ("normal", "zero", "constant", "positive", "negative", "denormal", "huge", "tiny", "spread")
WILD = (*FINITE, "infinite", "nan", "mixed")


def int_args(bits, symmetric, strategy="channel", group_size=None):
    return QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy=strategy,
        group_size=group_size if strategy == "group" else None,
    )


def group_of(kind, size, generator, dtype):  # noqa: C901 - a table
    x = torch.randn(size, generator=generator)
    info = torch.finfo(dtype)
    match kind:
        case "zero":
            x = x * 0
        case "constant":
            x = x[:1].expand(size)
        case "positive":
            x = x.abs() + 0.5
        case "negative":
            x = -x.abs() - 0.5
        case "denormal":
            x = (x.double() * 3 * info.smallest_normal * info.eps).float()
        case "huge":
            x = x.clamp(-1, 1) * (info.max / 8)
        case "tiny":
            x = x * (info.smallest_normal * 4)
        case "spread":
            x = x * torch.logspace(-3, 3, size)
        case "infinite":
            x = x.index_fill(0, torch.tensor([0]), float("inf")).index_fill(0, torch.tensor([size - 1]), -float("inf"))
        case "nan":
            x = x.index_fill(0, torch.tensor([size // 2]), float("nan"))
        case "mixed":
            x = x.index_fill(0, torch.tensor([0]), info.max)
    return x


@st.composite
def weights(draw, kinds=WILD, dtypes=FLOATS):
    """A weight (out, in) whose groups are of many kinds, and the scheme to quantize it with."""
    strategy = draw(st.sampled_from(STRATEGIES))
    rows, groups, size = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 12))
    dtype = draw(st.sampled_from(dtypes))
    chosen = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=rows * groups))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    parts = [group_of(chosen[i % len(chosen)], size, generator, dtype) for i in range(rows * groups)]
    weight = torch.cat(parts).reshape(rows, groups * size).to(dtype)
    return weight, int_args(draw(st.integers(2, 8)), draw(st.booleans()), strategy, size)


def ranges_of(weight, args):
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    grouped = weight.unflatten(1, (-1, args.group_size))
    return grouped.amin(-1), grouped.amax(-1)


def parameters(weight, args, *, of_reference):
    if of_reference:
        return calculate_qparams(*ranges_of(weight, args), args)
    return affine_parameters(*ranges_of(weight.float(), args), args, weight.dtype)


def assert_same_bits(ours, theirs):
    """Equal values, signs of zero too, and NaN in the same places."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    nan = theirs.isnan()
    assert torch.equal(ours.isnan(), nan)
    carrier = CARRIERS[ours.dtype]
    assert torch.equal(ours.masked_fill(nan, 0).view(carrier), theirs.masked_fill(nan, 0).view(carrier))


@pytest.fixture(params=[1, 20, grid.CHUNK], ids=lambda chunk: f"chunk{chunk}")
def chunk(request, monkeypatch):
    """Row chunks of one row, of a few, and larger than the weight."""
    monkeypatch.setattr(grid, "CHUNK", request.param)


class TestFakeQuantize:
    @pytest.mark.usefixtures("chunk")
    @pytest.mark.parametrize("of_reference", [True, False], ids=["their-parameters", "our-parameters"])
    def test_is_the_reference_bit_for_bit(self, of_reference):
        @PROPERTY
        @given(weights())
        def check(case):
            weight, args = case
            scale, zero_point = parameters(weight, args, of_reference=of_reference)
            for offset in (zero_point, None):
                theirs = reference.fake_quantize(weight, scale, offset, args)
                assert_same_bits(fake_quantize(weight, scale, offset, args), theirs)

        check()

    @pytest.mark.usefixtures("chunk")
    @pytest.mark.parametrize("stored", FLOATS)
    def test_mixed_dtypes_have_the_reference_s_values_in_the_dtype_of_x(self, stored):
        @PROPERTY
        @given(weights())
        def check(case):
            weight, args = case
            scale, zero_point = affine_parameters(*ranges_of(weight.float(), args), args, stored)
            theirs = reference.fake_quantize(weight, scale, zero_point, args)
            assert_same_bits(fake_quantize(weight, scale, zero_point, args), theirs.to(weight.dtype))

        check()

    @PROPERTY
    @given(weights())
    def test_writes_over_its_input_and_into_a_given_tensor(self, case):
        weight, args = case
        scale, zero_point = parameters(weight, args, of_reference=False)
        expected = fake_quantize(weight, scale, zero_point, args)
        given_out = torch.full_like(weight, 7)
        assert fake_quantize(weight, scale, zero_point, args, out=given_out) is given_out
        assert_same_bits(given_out, expected)
        assert fake_quantize(weight, scale, zero_point, args, out=weight) is weight
        assert_same_bits(weight, expected)

    @PROPERTY
    @given(weights())
    def test_leaves_its_arguments_alone(self, case):
        weight, args = case
        scale, zero_point = parameters(weight, args, of_reference=False)
        before = [t.clone() for t in (weight, scale, zero_point)]
        fake_quantize(weight, scale, zero_point, args)
        quantize(weight, scale, zero_point, args)
        assert_same_bits(weight, before[0])
        assert_same_bits(scale, before[1])
        assert torch.equal(zero_point, before[2])

    def test_transposed_weights(self, monkeypatch):
        monkeypatch.setattr(grid, "CHUNK", 16)
        weight = torch.randn(12, 7, generator=torch.Generator().manual_seed(0)).T
        args = int_args(4, symmetric=False, strategy="group", group_size=4)
        scale, zero_point = parameters(weight, args, of_reference=False)
        expected = reference.fake_quantize(weight.contiguous(), scale, zero_point, args)
        assert_same_bits(fake_quantize(weight, scale, zero_point, args).contiguous(), expected)
        values = quantize(weight, scale, zero_point, args)
        assert torch.equal(dequantize(values, scale, zero_point, args), expected)

    def test_more_rows_than_the_real_chunk_holds(self):
        columns = 512
        rows = grid.CHUNK // columns * 2 + 3
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
        args = int_args(3, symmetric=False, strategy="group", group_size=64)
        scale, zero_point = parameters(weight, args, of_reference=False)
        theirs = reference.fake_quantize(weight, scale, zero_point, args)
        assert_same_bits(fake_quantize(weight, scale, zero_point, args), theirs)

    @pytest.mark.parametrize("operation", [fake_quantize, quantize, dequantize])
    def test_a_group_size_that_does_not_divide_is_named(self, operation):
        args = int_args(4, symmetric=False, strategy="group", group_size=5)
        x = torch.zeros(2, 12, dtype=torch.int8 if operation is dequantize else torch.float32)
        with pytest.raises(BitpressError, match=r"group_size 5 .* 12 columns"):
            operation(x, torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int8), args)


class TestQuantizeAndDequantize:
    @pytest.mark.usefixtures("chunk")
    def test_agree_with_the_reference(self):
        @PROPERTY
        @given(weights(kinds=(*FINITE, "infinite", "mixed"), dtypes=(torch.float32,)))
        def check(case):
            weight, args = case
            scale, zero_point = affine_parameters(*ranges_of(weight.nan_to_num(), args), args, torch.float32)
            values = quantize(weight, scale, zero_point, args)
            assert values.dtype == torch.int8
            assert torch.equal(values, reference.quantize(weight, scale, zero_point, args, dtype=torch.int8))
            theirs = reference.dequantize(values, scale, zero_point, args)
            assert_same_bits(dequantize(values, scale, zero_point, args), theirs)

        check()

    @PROPERTY
    @given(weights(kinds=(*FINITE, "mixed"), dtypes=(torch.float32,)))
    def test_in_turn_are_fake_quantize(self, case):
        weight, args = case
        scale, zero_point = parameters(weight, args, of_reference=False)
        for offset in (zero_point, None):
            there_and_back = dequantize(quantize(weight, scale, offset, args), scale, offset, args)
            # An integer has no negative zero.
            assert torch.equal(there_and_back, fake_quantize(weight, scale, offset, args))

    @PROPERTY
    @given(weights(kinds=FINITE), st.sampled_from(FLOATS))
    def test_dequantize_is_the_reference_in_every_stored_dtype(self, case, stored):
        weight, args = case
        scale, zero_point = affine_parameters(*ranges_of(weight.float(), args), args, stored)
        values = quantize(weight.float(), scale.float(), zero_point, args)
        before = values.clone()
        ours = dequantize(values, scale, zero_point, args)
        assert_same_bits(ours, reference.dequantize(values, scale, zero_point, args))
        assert torch.equal(values, before)

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_values_stay_within_the_bits(self, bits):
        args = int_args(bits, symmetric=True, strategy="tensor")
        x = torch.tensor([[-1e30, -float("inf"), 0.0, float("inf"), 1e30]])
        least, greatest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        assert integer_range(args) == (least, greatest)
        assert quantize(x, torch.ones(1), None, args).tolist() == [[least, least, 0, greatest, greatest]]


@st.composite
def ranges(draw):
    """Finite float32 ranges of every magnitude, one-sided and empty ones too."""
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    usual = st.floats(-100, 100, width=32)
    count = draw(st.integers(1, 6))
    ends = draw(st.lists(st.tuples(finite | usual, finite | usual), min_size=count, max_size=count))
    minimum = torch.tensor([min(pair) for pair in ends])
    maximum = torch.tensor([max(pair) for pair in ends])
    return minimum, maximum


def is_ordinary(minimum, maximum):
    """Ranges whose scale neither overflows nor loses digits to denormals in float32."""
    reach = torch.maximum(minimum.abs(), maximum.abs())
    return (reach < 1e38) & (reach > 1e-30)


class TestAffineParameters:
    @PROPERTY
    @given(ranges(), st.integers(2, 8), st.booleans(), st.sampled_from(FLOATS))
    def test_are_usable_for_every_finite_range(self, ends, bits, symmetric, stored):
        args = int_args(bits, symmetric)
        scale, zero_point = affine_parameters(*ends, args, stored)
        least, greatest = integer_range(args)
        assert scale.dtype == stored
        assert zero_point.dtype == torch.int8
        assert scale.shape == zero_point.shape == ends[0].shape
        assert bool((scale > 0).all())
        assert bool(scale.isfinite().all())
        assert bool(((zero_point >= least) & (zero_point <= greatest)).all())

    @PROPERTY
    @given(ranges(), st.integers(2, 8), st.booleans(), st.sampled_from(FLOATS))
    def test_zero_stays_zero(self, ends, bits, symmetric, stored):
        args = int_args(bits, symmetric)
        scale, zero_point = (p.unsqueeze(1) for p in affine_parameters(*ends, args, stored))
        zeros = torch.zeros(len(scale), 3)
        assert torch.equal(quantize(zeros, scale.float(), zero_point, args), zero_point.expand(-1, 3))
        assert torch.equal(fake_quantize(zeros, scale.float(), zero_point, args), zeros)
        assert torch.equal(dequantize(zero_point, scale, zero_point, args), zeros[:, :1].to(stored))

    @PROPERTY
    @given(ranges(), st.integers(2, 8), st.booleans())
    def test_are_the_reference_s_where_the_range_is_not_degenerate(self, ends, bits, symmetric):
        args = int_args(bits, symmetric)
        scale, zero_point = affine_parameters(*ends, args, torch.float32)
        their_scale, their_zero_point = calculate_qparams(*ends, args)
        ordinary = is_ordinary(*ends)
        ulps = (scale.view(torch.int32) - their_scale.view(torch.int32)).abs()
        assert bool((ulps[ordinary] <= 1).all())
        assert torch.equal(zero_point[ordinary], their_zero_point[ordinary].to(torch.int8))

    @PROPERTY
    @given(ranges(), st.integers(2, 8), st.booleans(), st.sampled_from(FLOATS))
    def test_no_value_of_the_range_is_further_than_half_a_step_away(self, ends, bits, symmetric, stored):
        """Half a step, and at the ends what rounding the scale to its stored dtype took off all steps together.

        With the stored scale s' = s (1 + d), the ends sit steps * s / s' steps apart instead of steps. The zero point
        is off by half a step at most, so an end is beyond the grid by at most 1/2 + steps * (s / s' - 1).
        """
        args = int_args(bits, symmetric)
        scale, zero_point = (p.unsqueeze(1) for p in affine_parameters(*ends, args, stored))
        minimum, maximum = (e.double().unsqueeze(1) for e in (ends[0].clamp(max=0), ends[1].clamp(min=0)))
        steps = 2**bits - 1
        span = 2 * torch.maximum(-minimum, maximum) if symmetric else maximum - minimum
        # What a scale of the dtype cannot reach saturates, as documented by its clamp; an end that is rounded outwards
        # from the edge of float32 is infinite.
        within = (span <= steps * torch.finfo(stored).max) & (span <= 0.98 * torch.finfo(torch.float32).max)
        step = scale.double()
        beyond = (steps * (span / steps / step - 1)).clamp(min=0)
        values = (minimum + (maximum - minimum) * torch.linspace(0, 1, 41, dtype=torch.float64)).float()
        fake = fake_quantize(values, scale.float(), zero_point, args)
        error = (fake.double() - values.double()).abs()
        # 1e-4 of a step: float32 places values on grids of up to 256 steps.
        assert bool((error <= step * (0.5 + beyond + 1e-4))[within.squeeze(1)].all())
        ordinary = within & (span / steps >= torch.finfo(stored).smallest_normal)
        assert bool((beyond <= steps * torch.finfo(stored).eps / 2 * 1.01)[ordinary].all())

    @pytest.mark.parametrize("stored", FLOATS)
    def test_the_zero_point_is_taken_from_the_stored_scale(self, stored):
        minimum, maximum = torch.tensor([-0.7003]), torch.tensor([0.2996])
        args = int_args(8, symmetric=False)
        scale, zero_point = affine_parameters(minimum, maximum, args, stored)
        assert zero_point.item() == round(-128 - minimum.item() / scale.item())

    def test_ranges_keep_their_shape(self):
        minimum = -torch.rand(3, 4, 5)
        scale, zero_point = affine_parameters(minimum, -minimum, int_args(4, symmetric=False), torch.bfloat16)
        assert scale.shape == zero_point.shape == (3, 4, 5)


class TestCheckSupported:
    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"num_bits": 1}, r"num_bits 1 .*2 to 8"),
            ({"num_bits": 9}, r"num_bits 9 .*2 to 8"),
            ({"num_bits": 5, "type": "float", "zp_dtype": torch.int8}, r"type float with num_bits 5 .*4, 6 or 8"),
            ({"num_bits": 8, "type": "float", "symmetric": False}, r"symmetric=False .*True"),
            ({"num_bits": 4, "type": "float"}, r"4 bits .*NVFP4A16.*MXFP4A16"),
            ({"num_bits": 4, "type": "float", "group_size": 32}, r"scale_dtype"),
            ({"num_bits": 6, "type": "float", "group_size": 16}, r"MXFP6A16"),
            ({"num_bits": 8, "type": "float", "scale_dtype": torch.uint8}, r"scale_dtype uint8"),
            ({"num_bits": 4, "strategy": "block", "block_structure": [16, 16]}, r"strategy block .*channel, group"),
            ({"num_bits": 4, "strategy": "token", "dynamic": True}, r"strategy token .*channel, group"),
            ({"num_bits": 4, "dynamic": True}, "dynamic=True .*dynamic=False"),
        ],
    )
    def test_names_the_field_and_the_way_out(self, fields, named):
        with pytest.raises(BitpressError, match=named):
            check_supported(QuantizationArgs(**fields))

    @pytest.mark.parametrize("bits", range(2, 9))
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_lets_all_others_pass(self, bits, strategy):
        check_supported(int_args(bits, symmetric=True, strategy=strategy, group_size=32))
