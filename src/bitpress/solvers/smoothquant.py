"""SmoothQuant: part of the activations' outliers becomes part of the weights.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (2022),
https://arxiv.org/abs/2211.10438, equation 4: ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)``. The paper chooses one
alpha for a model by hand; :func:`search_strength` chooses it for each input, by an estimate of the error that quantized
weights and quantized activations make together, from the statistics alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from torch import Tensor

from bitpress.quantization.grid import integer_range
from bitpress.solvers.awq import BalanceWeight, column_peaks, row_errors

# A channel that was all but dead in calibration may not be later, and a column of zeros has no say: their greatest
# magnitude counts as this share of the mean.
LEAST_MAGNITUDE = 0.01
STRENGTHS = tuple(i / 20 for i in range(21))
# The strengths are compared on every so many rows of the weights, but on so many at least.
SAMPLED_ROWS = 8
LEAST_ROWS = 64
# Points of the integral over a token's greatest magnitude.
POINTS = 128
# No normal column is so many deviations off.
FAR = 6.5


@dataclass(frozen=True)
class SmoothQuant:
    """The scales that won.

    Attributes:
        scales: (channels,), float32, > 0; see :func:`smoothing_scales`. Ones where nothing beats leaving the layers
            alone.
        strength: alpha, or None for all ones.
        error: estimated squared output error of the quantized layers with the scales.
        error_before: the same without.
    """

    scales: Tensor
    strength: float | None
    error: float
    error_before: float


def smoothing_scales(
    weights: Sequence[Tensor], max_magnitude: Tensor, strength: float, channel_map: Tensor | None = None
) -> Tensor:
    """Equation 4's s, divided by its geometric mean: a common factor changes no grid, but can take a weight far from 1.

    Args:
        weights: (out_i, in), any float dtype, of layers that share their input.
        max_magnitude: (in,), float32, the greatest magnitude of each column of that input.
        strength: alpha, 0 to 1: the part of the difficulty that goes over to the weights.
        channel_map: (in,), int64: the channel of the producer that feeds each input, where several share one
            (grouped-query attention); None if each has its own.

    Returns:
        (channels,), float32, > 0: of the producer's channels up to the last that feeds an input; ones for those that
        feed none.
    """
    if channel_map is None:
        channel_map = torch.arange(len(max_magnitude), device=max_magnitude.device)
    feeding, channel = channel_map.to(max_magnitude.device).unique(return_inverse=True)
    of_weights = torch.stack([w.abs().amax(0).float() for w in weights]).amax(0)
    x, w = (_floored(_greatest(m, channel, len(feeding))) for m in (max_magnitude, of_weights))
    logs = strength * x.log() - (1 - strength) * w.log()
    scales = torch.ones(int(feeding[-1]) + 1, device=max_magnitude.device)
    scales[feeding] = (logs - logs.mean()).exp()
    return scales


def search_strength(
    layers: Sequence[BalanceWeight],
    gram: Tensor,
    max_magnitude: Tensor,
    rows: int,
    *,
    activations: Sequence[QuantizationArgs | None] | None = None,
    channel_map: Tensor | None = None,
    strengths: Sequence[float] = STRENGTHS,
) -> SmoothQuant:
    """The scales of the alpha with the least estimated error at the outputs of ``layers``.

    The error of a layer with weight W and scales s is estimated as ``trace(dW H dW^T)`` with ``dW = Q(W s) / s - W``,
    which is that of its quantized weight, plus :func:`activation_noise`. To leave the layers alone is a candidate too.

    Args:
        layers: weights (out_i, in) that share their input, with their schemes.
        gram: (in, in), float32, ``H`` of that input.
        max_magnitude: (in,), float32, the greatest magnitude of each of its columns.
        rows: the tokens that H is a sum over.
        activations: how each layer's input is quantized; None, or None in its place, if it is not.
        channel_map: see :func:`smoothing_scales`.
        strengths: the alphas that are tried.
    """
    kinds = [None] * len(layers) if activations is None else activations
    weights = [layer.weight.float() for layer in layers]
    found = [smoothing_scales(weights, max_magnitude, strength, channel_map) for strength in strengths]
    untouched = torch.ones_like(max_magnitude)
    at_inputs = torch.stack([untouched, *(s if channel_map is None else s[channel_map.to(s.device)] for s in found)])
    variance = gram.diagonal() / max(1, rows)
    errors = torch.zeros(len(at_inputs), dtype=torch.float64)
    peaks = column_peaks(layers, weights)
    for layer, weight, args in zip(layers, weights, kinds, strict=True):
        every = max(1, min(SAMPLED_ROWS, weight.shape[0] // LEAST_ROWS))
        if layer.args.strategy == QuantizationStrategy.BLOCK:
            every = 1  # rows share their ranges with their neighbours
        sampled = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
        sampled[::every] = True
        part = row_errors(layer, weight, sampled, gram, at_inputs, peaks).double().sum(1).cpu()
        errors += part * (weight.shape[0] / int(sampled.sum()))
        squares = weight.square().sum(0)
        noise = [activation_noise(squares, variance, max_magnitude, s, args) for s in at_inputs]
        errors += rows * torch.tensor(noise, dtype=torch.float64)
    best = int(errors.argmin())
    scales = found[best - 1] if best else torch.ones_like(found[0])
    strength = strengths[best - 1] if best else None
    return SmoothQuant(scales, strength, float(errors[best]), float(errors[0]))


def activation_noise(
    squares: Tensor, variance: Tensor, max_magnitude: Tensor, scales: Tensor, args: QuantizationArgs | None
) -> float:
    """Expected squared output error of one token from rounding its input ``X / s`` to integers.

    Rounding to steps of d adds noise of variance ``d^2 / 12``, which every row w of ``W s`` passes on:
    ``d^2 / 12 * ||w||^2``, summed over the rows. With b bits ``d = 2 m / (2^b - 1)``. Per tensor, m is the greatest
    magnitude of ``X / s`` that was seen. Per token it is that token's, and on a symmetric grid, which ends half a step
    from it, the peak's own error is ``d^2 / 4``. The statistics know only bounds of a token's peak: ``E[m^2]``, and in
    which column it is, are those of independent normal columns; :func:`expected_peaks`. Groups of columns count each by
    itself.

    Floating-point activations are rounded relative to their size, which no scale changes: 0, and so for None.

    Args:
        squares: (in,), ``sum_i W_ij^2``.
        variance: (in,), second moment of each column of X.
        max_magnitude: (in,), the greatest magnitude of each column of X.
        scales: (in,), s.
        args: how the input is quantized.
    """
    if args is None or args.type != QuantizationType.INT:
        return 0.0
    size = args.group_size if args.strategy in GROUPED and args.group_size else len(scales)
    q_min, q_max = integer_range(args)
    unit = (2 / (q_max - q_min)) ** 2
    moment, peak = (variance / scales.square()).view(-1, size), (max_magnitude / scales).view(-1, size)
    passed_on = (squares * scales.square()).view(-1, size)
    if args.strategy == QuantizationStrategy.TENSOR:
        return unit / 12 * float(peak.max().square() * passed_on.sum())
    peaks = expected_peaks(moment, peak.amax(1))
    noise = peaks.sum(1, keepdim=True) / 12 + (peaks * (1 / 4 - 1 / 12) if args.symmetric else 0)
    return unit * float((noise * passed_on).sum())


GROUPED = (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)


def expected_peaks(variance: Tensor, greatest: Tensor) -> Tensor:
    """``E[m^2; column j holds m]`` of the greatest magnitude m of independent normal columns.

    That is the integral of ``u^2 f_j(u) / F_j(u) * prod_k F_k(u)`` with the density f and distribution F of each
    column's magnitude, up to ``greatest``, where what is above it is cut off.

    Args:
        variance: (n, columns), of each column.
        greatest: (n,), the greatest magnitude that a column can have.

    Returns:
        (n, columns), in squared units of x; their sum over the columns is ``E[m^2]``.
    """
    deviation = variance.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    stop = torch.minimum(greatest, FAR * deviation.amax(1))
    # Evenly in u, by the midpoints: the integrand is smooth.
    u = (torch.arange(POINTS, device=variance.device) + 0.5) / POINTS * stop.unsqueeze(1)
    z = u.unsqueeze(-1) / deviation.unsqueeze(1)
    within = torch.erf(z / math.sqrt(2)).clamp_(min=torch.finfo(torch.float32).tiny)
    hazard = torch.exp(-z.square() / 2).mul_(math.sqrt(2 / math.pi)).div_(deviation.unsqueeze(1)).div_(within)
    below = within.log().sum(-1).exp()
    peaks = torch.einsum("np,npj->nj", u.square() * below * (stop / POINTS).unsqueeze(1), hazard)
    last = hazard[:, -1]
    cut_off = last / last.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return peaks + cut_off * ((1 - below[:, -1]) * stop.square()).unsqueeze(1)


def _greatest(per_input: Tensor, channel: Tensor, channels: int) -> Tensor:
    """The greatest over the inputs that one producer channel feeds."""
    return per_input.new_zeros(channels).scatter_reduce_(0, channel, per_input, "amax")


def _floored(magnitude: Tensor) -> Tensor:
    mean = float(magnitude.mean())
    return magnitude.clamp(min=LEAST_MAGNITUDE * mean) if mean > 0 else torch.ones_like(magnitude)
