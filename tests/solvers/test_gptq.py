"""GPTQ against the algorithm as the paper writes it, column by column in float64."""

import pytest
import tiny
import torch
from compressed_tensors.quantization import ActivationOrdering
from compressing import awq, scheme
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress import BitpressError, GPTQModifier
from bitpress.quantization import QuantizationArgs, QuantizedWeight, check_supported, preset_name_to_scheme
from bitpress.solvers import gptq, gptq_together, output_error, round_to_nearest
from bitpress.solvers.gptq import inverse_factor


def problem(rows, columns, samples, seed, outliers=True):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(samples, columns, generator=generator) @ mixing
    if outliers:
        x[:, ::7] *= 6
    return torch.randn(rows, columns, generator=generator), x.T @ x


def plain(weight, gram, args, dampening):
    """Frantar et al., section 3.3, with nothing put off: the reference."""
    rtn = round_to_nearest(weight, args, torch.float32)
    W, H = weight.double().clone(), gram.double().clone()
    H.diagonal().add_(dampening * float(H.diagonal().mean()))
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    size = args.group_size or weight.shape[1]
    half = 2 ** (args.num_bits - 1)
    values = torch.empty_like(W)
    for j in range(W.shape[1]):
        s = rtn.scale[:, j // size].double()
        z = rtn.zero_point[:, j // size].double()
        values[:, j] = (W[:, j] / s + z).clamp(-half, half - 1).round()
        error = (W[:, j] - (values[:, j] - z) * s) / U[j, j]
        W[:, j:] -= error[:, None] * U[j, j:]
    return values


@settings(deadline=None, max_examples=40)
@given(
    groups=st.integers(1, 4),
    bits=st.integers(3, 8),
    block_size=st.sampled_from([1, 5, 16, 64, 128]),
    seed=st.integers(0, 99),
)
def test_it_is_the_papers_algorithm_whatever_the_block_size(groups, bits, block_size, seed):
    weight, gram = problem(32, 16 * groups, 200, seed)
    args = QuantizationArgs(num_bits=bits, symmetric=False, group_size=16)
    found = gptq(weight, gram, args, torch.float32, block_size=block_size).weight
    expected = plain(weight, gram, args, 0.01)
    # In float32 a value half-way between two points may fall to the other side, and change what is behind it.
    equal_rows = (found.values.double() == expected).all(1)
    assert float(equal_rows.double().mean()) > 0.7
    mine, theirs = (output_error(v, gram) for v in (found.dequantize() - weight, deviation(expected, found, weight)))
    assert mine <= theirs * 1.1


def deviation(values, found, weight):
    size = found.args.group_size
    s, z = (p.float().repeat_interleave(size, dim=1) for p in (found.scale, found.zero_point))
    return (values.float() - z) * s - weight


@pytest.mark.parametrize("actorder", [None, "static", "weight"])
@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_better_than_rounding(actorder, strategy, symmetric):
    weight, gram = problem(48, 64, 400, 3)
    stated = {"actorder": actorder} if actorder else {}
    size = {"group_size": 16} if strategy == "group" else {}
    args = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy=strategy, **size, **stated)
    rounded = round_to_nearest(weight, args, torch.float32)
    found = gptq(weight, gram, args, torch.float32)
    assert found.dampening == pytest.approx(0.01)
    assert torch.equal(found.weight.scale, rounded.scale)
    before, after = (output_error(q.dequantize() - weight, gram) for q in (rounded, found.weight))
    assert after < 0.8 * before


def test_ranges_that_were_chosen_are_kept():
    weight, gram = problem(8, 32, 100, 1)
    args = QuantizationArgs(num_bits=4, symmetric=False, group_size=16)
    scale, zero_point = torch.full((8, 2), 0.25), torch.full((8, 2), 3, dtype=torch.int8)
    found = gptq(weight, gram, args, torch.float32, (scale, zero_point)).weight
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.zero_point, zero_point)


def test_inputs_that_are_never_active_are_rounded_to_nearest():
    weight, gram = problem(8, 32, 100, 2)
    gram[5], gram[:, 5] = 0, 0
    args = QuantizationArgs(num_bits=4, symmetric=False, group_size=16)
    found = gptq(weight, gram, args, torch.float32).weight
    assert torch.equal(found.values[:, 5], round_to_nearest(weight, args, torch.float32).values[:, 5])


@pytest.mark.parametrize("gram", [torch.zeros(16, 16), -torch.eye(16), torch.ones(16, 16) * 1e20])
def test_a_matrix_that_is_not_positive_definite_ends_in_no_error(gram):
    factor, used = inverse_factor(gram, 0.01)
    assert factor.isfinite().all()
    assert used >= 0.01
    args = QuantizationArgs(num_bits=4, group_size=16)
    assert gptq(torch.randn(4, 16), gram, args, torch.float32).weight.values.shape == (4, 16)


def test_dampening_grows_until_the_matrix_can_be_factored():
    weight, gram = problem(4, 32, 100, 4)
    gram[0, 1] = gram[1, 0] = 3 * (gram[0, 0] * gram[1, 1]).sqrt()
    found = gptq(weight, gram, QuantizationArgs(num_bits=4, group_size=16), torch.float32)
    assert found.dampening > 0.01
    assert found.weight.dequantize().isfinite().all()


GRIDS = {
    "float8 channel": QuantizationArgs(num_bits=8, type="float", strategy="channel"),
    "float8 ragged blocks": QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[20, 24]),
    **{name: preset_name_to_scheme(name, []).weights for name in ("NVFP4A16", "MXFP4A16", "MXFP8A16")},
}


@pytest.mark.parametrize("grid", GRIDS)
def test_on_grids_of_floats_it_is_better_than_rounding_and_on_the_grid(grid):
    args = GRIDS[grid]
    weight, gram = problem(48, 64, 400, 5)
    rounded = round_to_nearest(weight, args, torch.float32)
    found = gptq(weight, gram, args, torch.float32).weight
    assert torch.equal(found.scale, rounded.scale)
    dense = found.dequantize()
    again = QuantizedWeight.on_grid(dense, found.scale, found.zero_point, args, found.global_scale)
    assert torch.equal(again.dequantize(), dense)
    before, after = (output_error(q.dequantize() - weight, gram) for q in (rounded, found))
    assert after < 0.8 * before


@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
def test_layers_that_are_solved_together_are_solved_as_alone(strategy):
    size = {"group_size": 16} if strategy == "group" else {}
    args = QuantizationArgs(num_bits=4, symmetric=False, strategy=strategy, actorder="static", **size)
    first, gram = problem(24, 32, 200, 6)
    second = problem(9, 32, 200, 7)[0]
    both = gptq_together([first, second], gram, args, torch.float32, [None, None], [None, None])
    for weight, found in zip((first, second), both, strict=True):
        alone = gptq(weight, gram, args, torch.float32).weight
        assert torch.equal(found.weight.scale, alone.scale)
        # Sums of another order: a value half-way between two points may fall to the other side.
        equal = (found.weight.values == alone.values).all(1)
        assert float(equal.double().mean()) > 0.8


def test_the_report_names_the_dampening_of_each_layer():
    session = tiny.compress(
        tiny.llama(), [GPTQModifier(ignore=["lm_head"], config_groups={"group_0": scheme()})], tiny.token_data()
    )
    assert {record["dampening"] >= 0.01 for record in session.state.layer_records.values()} == {True}


def test_after_awq_in_one_recipe():
    data = tiny.token_data()
    quantize = GPTQModifier(ignore=["lm_head"], config_groups={"group_0": scheme()})
    session = tiny.compress(tiny.llama(), [awq()[0], quantize], data)
    alone = tiny.compress(tiny.llama(), awq(), data)
    mine, theirs = (s.state.layer_records for s in (session, alone))
    assert mine.keys() == theirs.keys()
    better = [name for name in mine if mine[name]["relative_error"] < theirs[name]["relative_error"]]
    assert len(better) > 0.8 * len(mine)


@pytest.mark.parametrize("actorder", [ActivationOrdering.GROUP, ActivationOrdering.DYNAMIC])
def test_an_order_that_would_have_to_be_stored_is_refused(actorder):
    """Newer compressed-tensors refuse it themselves."""
    args = QuantizationArgs(num_bits=4, group_size=32).model_copy(update={"actorder": actorder})
    with pytest.raises(BitpressError, match=f"actorder '{actorder.value}' is not supported"):
        check_supported(args)
