"""The searches on grids of floats and of blocks: the same quantities as on integers, against slow references."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme

from bitpress.quantization import dequantize, has_global_scale, quantize, shared_global_scale, step_sizes
from bitpress.solvers import BalanceWeight, round_to_nearest, search_parameters, search_scales
from bitpress.solvers.awq import candidate_scales
from bitpress.solvers.ranges import minmax_parameters, range_factors


def float8(strategy, **more):
    return QuantizationArgs(num_bits=8, type="float", strategy=strategy, **more)


GRIDS = {
    "tensor": float8("tensor"),
    "channel": float8("channel"),
    "group": float8("group", group_size=16),
    "block": float8("block", block_structure=[16, 32]),
    "ragged": float8("block", block_structure=[7, 24]),
    **{name: preset_name_to_scheme(name, []).weights for name in ("NVFP4A16", "MXFP4A16", "MXFP6A16", "MXFP8A16")},
}
SEARCHED = [name for name in GRIDS if name != "tensor"]
COLUMNS = 64


def weight_of(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    of_column = torch.exp(torch.randn(COLUMNS, generator=generator) / 3)
    return torch.randn(rows, COLUMNS, generator=generator) * of_column * 0.05


def activations(seed=0):
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(200, 16, generator=generator) @ torch.randn(16, COLUMNS, generator=generator) / 4
    x = x + torch.randn(200, COLUMNS, generator=generator) / 2
    magnitude = torch.exp(torch.randn(COLUMNS, generator=generator) / 2)
    magnitude[:2] *= 20
    return x * magnitude


def own_global(weight, args):
    return shared_global_scale([weight], args) if has_global_scale(args) else None


def costs(weight, scale, args, gram, global_scale):
    """The error of each range: the sum over its rows of e^T H_g e."""
    steps = step_sizes(scale, global_scale).float()
    values = quantize(weight, steps, None, args)
    error = (dequantize(values, steps, None, args) - weight).double()
    height, width = args.block_structure or (1, args.group_size or COLUMNS)
    found = torch.zeros(-(-len(weight) // height), -(-COLUMNS // width), dtype=torch.float64)
    for g in range(found.shape[1]):
        columns = slice(g * width, (g + 1) * width)
        of_rows = ((error[:, columns] @ gram[columns, columns].double()) * error[:, columns]).sum(1)
        for b in range(found.shape[0]):
            found[b, g] = of_rows[b * height : (b + 1) * height].sum()
    return found


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_best_factor_of_each_range_is_found(name, dtype):
    args, weight = GRIDS[name], weight_of(30) ** 3 * 1e3
    gram = activations().T @ activations()
    global_scale = own_global(weight, args)
    scale, zero_point = search_parameters(weight, args, gram, dtype, global_scale)
    assert scale.dtype == dtype
    assert zero_point.shape == scale.shape == costs(weight, scale, args, gram, global_scale).shape
    tried = [
        costs(weight, minmax_parameters(weight * f, args, dtype, global_scale)[0], args, gram, global_scale)
        for f in range_factors(args)
    ]
    best = torch.stack(tried).amin(0)
    torch.testing.assert_close(costs(weight, scale, args, gram, global_scale), best, rtol=2e-3, atol=0)
    # To halve a range of eight bits gains nothing: its floats are as close, relatively, in every binade.
    assert name == "MXFP8A16" or bool((best < tried[0]).any()), "the problem is one where the search helps"


@pytest.mark.parametrize("name", SEARCHED)
def test_the_search_does_not_depend_on_how_rows_are_chunked(name, monkeypatch):
    args, weight = GRIDS[name], weight_of(39)
    gram = activations().T @ activations()
    whole = search_parameters(weight, args, gram, torch.float32, own_global(weight, args))
    monkeypatch.setattr("bitpress.solvers.ranges.SEARCH_CHUNK", 1)
    chunked = search_parameters(weight, args, gram, torch.float32, own_global(weight, args))
    torch.testing.assert_close(whole[0], chunked[0], rtol=0, atol=0)


def output_error(layers, x, scales):
    """``||X (Q(W s) / s - W)^T||^2`` in float64, from the activations themselves."""
    scaled = [layer.weight.float() * scales for layer in layers]
    total = 0.0
    for layer, weight in zip(layers, scaled, strict=True):
        shared = shared_global_scale(scaled, layer.args) if has_global_scale(layer.args) else None
        quantized = round_to_nearest(weight, layer.args, layer.dtype, None, shared)
        points = replace(quantized, scale=quantized.scale.float()).dequantize().double()
        total += float((x.double() @ (points / scales.double() - layer.weight.double()).T).square().sum())
    return total


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("rows", [[24], [90, 33]], ids=str)
def test_awq_measures_the_errors_of_the_outputs(name, rows):
    layers = [BalanceWeight(weight_of(n, seed), GRIDS[name], torch.bfloat16) for seed, n in enumerate(rows)]
    x = activations()
    found = search_scales(layers, x.T @ x, x.abs().mean(0))
    assert found.error_before == pytest.approx(output_error(layers, x, torch.ones(COLUMNS)), rel=1e-3)
    assert found.error == pytest.approx(output_error(layers, x, found.scales), rel=1e-3)
    assert found.error <= found.error_before


@pytest.mark.parametrize("name", ["channel", "block", "NVFP4A16", "MXFP4A16"])
def test_awq_finds_the_best_candidate(name):
    layers = [BalanceWeight(weight_of(40, seed=1), GRIDS[name], torch.float32)]
    x = activations(1)
    found = search_scales(layers, x.T @ x, x.abs().mean(0), duo_scaling=False)
    magnitude = x.abs().mean(0)
    tried = candidate_scales(magnitude.clamp(min=0.01 * float(magnitude.mean())), magnitude, 20, duo_scaling=False)[2]
    best = min(output_error(layers, x, scales) for scales in tried)
    assert output_error(layers, x, found.scales) <= best * (1 + 1e-4)
    assert best < found.error_before
