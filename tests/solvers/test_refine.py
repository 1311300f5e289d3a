"""Refinement against float64 brute force: every point of every column, and least squares as they are written."""

import logging

import pytest
import tiny
import torch
from compressing import scheme
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress import AWQModifier, BitpressError, GPTQModifier, load
from bitpress.quantization import QuantizationArgs, QuantizedWeight, integer_range, preset_name_to_scheme
from bitpress.solvers import coordinate_descent, gptq, refine_together, refit_scales, round_to_nearest
from bitpress.solvers.descent import descend_together
from bitpress.solvers.gptq import dampened
from bitpress.solvers.refit import RIDGE

PROPERTY = settings(deadline=None, derandomize=True, max_examples=20)
GRIDS = {
    "3 bits, groups": QuantizationArgs(num_bits=3, symmetric=False, group_size=16),
    "2 bits, symmetric": QuantizationArgs(num_bits=2, group_size=16),
    "channel": QuantizationArgs(num_bits=4, strategy="channel"),
    "tensor": QuantizationArgs(num_bits=4, strategy="tensor", symmetric=False),
    "float8 ragged blocks": QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[20, 24]),
    **{name: preset_name_to_scheme(name, []).weights for name in ("NVFP4A16", "MXFP4A16")},
}


def problem(rows, columns, seed, samples=200):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(samples, columns, generator=generator) @ mixing
    x[:, ::7] *= 4
    return torch.randn(rows, columns, generator=generator), dampened(x.T @ x, 0.1)


def errors(weight, quantized, gram):
    delta = quantized.dequantize().double() - weight.double()
    return ((delta @ gram.double()) * delta).sum(1)


def grouped(parameters, quantized):
    return parameters.double().repeat_interleave(quantized.args.group_size, 1)


def plain_descent(weight, quantized, gram, sweeps):
    """One value after the other, its error written out for every point of the grid."""
    H, s, z = gram.double(), grouped(quantized.scale, quantized), grouped(quantized.zero_point, quantized)
    low, high = integer_range(quantized.args)
    points = torch.arange(low, high + 1).double()
    values = quantized.values.double().clone()
    for _ in range(sweeps):
        for j in range(weight.shape[1]):
            delta = weight.double() - (values - z) * s
            tried = delta.unsqueeze(0).repeat(len(points), 1, 1)
            tried[:, :, j] = weight[:, j].double() - (points[:, None] - z[:, j]) * s[:, j]
            values[:, j] = points[((tried @ H) * tried).sum(2).argmin(0)]
    return values


@PROPERTY
@given(
    groups=st.integers(1, 3),
    bits=st.integers(2, 4),
    symmetric=st.booleans(),
    block_size=st.sampled_from([1, 5, 16, 128]),
    sweeps=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_a_sweep_sets_each_column_to_its_best_points(groups, bits, symmetric, block_size, sweeps, seed):
    weight, gram = problem(24, 16 * groups, seed)
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, group_size=16)
    start = round_to_nearest(weight, args, torch.float32)
    found = coordinate_descent(weight, start, gram, sweeps, block_size)
    expected = plain_descent(weight, start, gram, sweeps)
    # In float32 a value half-way between two points may fall to the other side, and change what is behind it.
    assert float((found.values.double() == expected).all(1).double().mean()) > 0.8
    assert torch.equal(found.scale, start.scale)


@PROPERTY
@given(
    grid=st.sampled_from(sorted(GRIDS)), dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99)
)
def test_no_rows_error_grows_and_what_is_found_is_on_the_grid(grid, dtype, seed):
    weight, gram = problem(48, 64, seed)
    weight, args = weight.to(dtype), GRIDS[grid]
    before = gptq(weight, gram, args, dtype).weight
    descended = coordinate_descent(weight, before, gram)
    refitted = refit_scales(weight, before, gram)
    old = errors(weight, before, gram)
    for found in (descended, refitted):
        new = errors(weight, found, gram)
        shared = args.strategy in ("tensor", "block") and found is refitted
        assert bool((new.sum() if shared else new).le((old.sum() if shared else old) * (1 + 1e-5)).all())
        dense = found.dequantize()
        again = QuantizedWeight.on_grid(dense, found.scale, found.zero_point, args, found.global_scale)
        assert torch.equal(again.dequantize(), dense)
        assert bool((found.scale > 0).all())
        assert found.scale.dtype == dtype
    assert float(errors(weight, descended, gram).sum()) < float(old.sum())
    if args.scale_dtype == torch.float8_e4m3fn:
        assert torch.equal(refitted.scale.to(torch.float8_e4m3fn).to(dtype), refitted.scale)


@PROPERTY
@given(bits=st.integers(2, 4), seed=st.integers(0, 99))
def test_it_ends_where_no_single_change_helps(bits, seed):
    weight, gram = problem(8, 32, seed)
    args = QuantizationArgs(num_bits=bits, symmetric=False, group_size=16)
    found = coordinate_descent(weight, round_to_nearest(weight, args, torch.float32), gram, sweeps=50)
    assert torch.equal(coordinate_descent(weight, found, gram).values, found.values)
    H, s, z = gram.double(), grouped(found.scale, found), grouped(found.zero_point, found)
    delta = weight.double() - (found.values.double() - z) * s
    least = errors(weight, found, gram)
    low, high = integer_range(args)
    for j in range(weight.shape[1]):
        for point in range(low, high + 1):
            changed = delta.clone()
            changed[:, j] = weight[:, j].double() - (point - z[:, j]) * s[:, j]
            assert bool((((changed @ H) * changed).sum(1) >= least * (1 - 1e-4)).all())


def plain_refit(weight, quantized, gram):
    """Least squares over the inputs' Cholesky factor, with the ridge as rows of their own."""
    X = torch.linalg.cholesky(gram.double(), upper=True)
    size = quantized.args.group_size
    B = quantized.values.double() - grouped(quantized.zero_point, quantized)
    found = []
    for b, w, s in zip(B, weight.double(), quantized.scale.double(), strict=True):
        features = torch.stack([X[:, g : g + size] @ b[g : g + size] for g in range(0, len(b), size)], 1)
        pull = torch.diag(features.square().sum(0).mul(RIDGE).sqrt())
        target = X @ w
        found.append(torch.linalg.lstsq(torch.cat([features, pull]), torch.cat([target, pull @ s])).solution)
    return torch.stack(found)


@PROPERTY
@given(groups=st.integers(1, 4), bits=st.integers(2, 5), symmetric=st.booleans(), seed=st.integers(0, 99))
def test_refitted_scales_are_the_least_squares(groups, bits, symmetric, seed):
    weight, gram = problem(12, 16 * groups, seed)
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, group_size=16)
    before = gptq(weight, gram, args, torch.float32).weight
    found = refit_scales(weight, before, gram)
    expected = plain_refit(weight, before, gram)
    plain = (expected > 0).all(1) & (found.scale != before.scale).any(1)
    assert bool(plain.any())
    torch.testing.assert_close(found.scale[plain].double(), expected[plain], rtol=1e-4, atol=1e-5)
    assert torch.equal(found.values, before.values)
    assert torch.equal(found.zero_point, before.zero_point)


@pytest.mark.parametrize("chunk", [1, 5000])
@pytest.mark.parametrize("grid", GRIDS)
def test_scales_do_not_depend_on_how_many_rows_are_fitted_at_once(grid, chunk, monkeypatch):
    weight, gram = problem(48, 64, 5)
    before = gptq(weight, gram, GRIDS[grid], torch.float32).weight
    whole = refit_scales(weight, before, gram)
    monkeypatch.setattr("bitpress.solvers.refit.CHUNK", chunk)
    torch.testing.assert_close(refit_scales(weight, before, gram).scale, whole.scale, rtol=1e-4, atol=0)


@pytest.mark.parametrize("grid", ["tensor", "float8 ragged blocks"])
def test_scales_that_rows_share_have_the_least_error_of_all_their_rows(grid):
    weight, gram = problem(48, 64, 6)
    before = gptq(weight, gram, GRIDS[grid], torch.float32).weight
    found = refit_scales(weight, before, gram)
    least = float(errors(weight, found, gram).sum())
    assert least < float(errors(weight, before, gram).sum())
    for factor in (0.98, 1.02):
        beside = QuantizedWeight(found.values, found.scale * factor, found.zero_point, found.args)
        assert float(errors(weight, beside, gram).sum()) > least


def test_a_weight_that_is_on_its_grid_stays_as_it_is():
    weight, gram = problem(12, 32, 7)
    args = QuantizationArgs(num_bits=3, symmetric=False, group_size=16)
    quantized = round_to_nearest(weight, args, torch.float32)
    dense = quantized.dequantize()
    assert torch.equal(refit_scales(dense, quantized, gram).scale, quantized.scale)
    assert torch.equal(coordinate_descent(dense, quantized, gram).values, quantized.values)


def test_groups_of_zeros_keep_their_scale():
    weight, gram = problem(12, 32, 8)
    weight[:, :16] = 0
    quantized = round_to_nearest(weight, QuantizationArgs(num_bits=3, group_size=16), torch.float32)
    found = refit_scales(weight, quantized, gram)
    assert torch.equal(found.scale[:, 0], quantized.scale[:, 0])
    assert float(errors(weight, found, gram).sum()) < float(errors(weight, quantized, gram).sum())


def test_inputs_that_are_never_active_change_nothing():
    weight, gram = problem(8, 32, 9)
    gram[5], gram[:, 5] = 0, 0
    quantized = round_to_nearest(weight, QuantizationArgs(num_bits=3, group_size=16), torch.float32)
    found = coordinate_descent(weight, quantized, gram, 2)
    assert torch.equal(found.values[:, 5], quantized.values[:, 5])
    assert refit_scales(weight, quantized, gram).scale.isfinite().all()


@pytest.mark.parametrize("grid", ["3 bits, groups", "tensor", "NVFP4A16"])
def test_layers_that_are_refined_together_are_refined_as_alone(grid):
    args = GRIDS[grid]
    weights, gram = [problem(24, 32, 10)[0], problem(9, 32, 11)[0]], problem(24, 32, 10)[1]
    start = [round_to_nearest(w, args, torch.float32) for w in weights]
    for weight, before, found in zip(weights, start, descend_together(weights, start, gram, 2), strict=True):
        alone = coordinate_descent(weight, before, gram, 2)
        assert float((found.values.float() == alone.values.float()).all(1).double().mean()) > 0.8


@PROPERTY
@given(sweeps=st.integers(0, 3), seed=st.integers(0, 99))
def test_the_round_is_kept_that_is_best_on_other_inputs(sweeps, seed):
    weight, gram = problem(24, 32, seed)
    _, held_out = problem(24, 32, seed + 100)
    args = QuantizationArgs(num_bits=3, symmetric=False, group_size=16)
    start = gptq(weight, gram, args, torch.float32).weight
    [found] = refine_together([weight], [start], gram, held_out, sweeps, 0.1)
    assert len(found.errors) == sweeps + 2
    assert found.errors[found.rounds] == min(found.errors)
    assert float(errors(weight, found.weight, held_out).sum()) == pytest.approx(min(found.errors), rel=1e-3)
    assert found.errors[0] == pytest.approx(float(errors(weight, start, held_out).sum()), rel=1e-3)


def test_what_other_inputs_speak_against_is_not_kept():
    weight, held_out = problem(24, 32, 12)
    start = gptq(weight, held_out, QuantizationArgs(num_bits=3, symmetric=False, group_size=16), torch.float32).weight
    for _ in range(10):
        start = refit_scales(weight, coordinate_descent(weight, start, held_out), held_out)
    [found] = refine_together([weight], [start], problem(24, 32, 13)[1], held_out, 2, 0.1)
    assert found.rounds == 0
    assert found.weight is start


def recipe(**options):
    return [AWQModifier(), GPTQModifier(ignore=["lm_head"], config_groups={"group_0": scheme(bits=3)}, **options)]


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
def test_in_a_recipe_each_layer_keeps_what_the_held_out_batches_say(pipeline):
    model = tiny.llama()
    session = tiny.compress(model, recipe(refine=1), tiny.token_data(9), pipeline=pipeline)
    records = [record["refinement"] for record in session.state.layer_records.values()]
    assert len(records) == len(tiny.linears(model)) - 1
    for record in records:
        assert record["held_out_errors"][record["rounds"]] == min(record["held_out_errors"])
    assert any(record["rounds"] for record in records)


def test_what_was_refined_is_what_is_saved(tmp_path):
    model = tiny.llama()
    for parameter in model.parameters():  # not the rotary frequencies, which stay float32 in transformers
        parameter.data = parameter.data.bfloat16()
    tiny.compress(model, recipe(refine=1), tiny.token_data())
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(load(tmp_path, packed=False)), tiny.logits(model))


def test_one_batch_cannot_be_judged_and_is_not_refined(caplog):
    with caplog.at_level(logging.WARNING):
        session = tiny.compress(tiny.llama(), recipe(refine=1), tiny.token_data(1))
    plain = tiny.compress(tiny.llama(), recipe(), tiny.token_data(1))
    assert sum("not refined" in record.getMessage() for record in caplog.records) == 1
    for name, record in plain.state.layer_records.items():
        assert "refinement" not in session.state.layer_records[name]
        assert record["relative_error"] == session.state.layer_records[name]["relative_error"]


def test_fewer_than_no_rounds_are_refused():
    with pytest.raises(BitpressError, match="refine"):
        GPTQModifier(scheme="W4A16", refine=-1)
