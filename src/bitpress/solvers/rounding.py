"""Rounding that gradients learn: each value moves between the points of its grid, each scale is multiplied by a factor.

SignRound (Cheng et al., 2023, https://arxiv.org/abs/2309.05516, equations 3 to 5) adds to each value, in steps of its
grid, an offset that starts at 0, rounds, and moves the offset by the sign of the gradient, as if nothing had been
rounded. Here the values start beside points that a solver has chosen: that is a better start than the nearest points,
and needs far fewer steps.
"""

from dataclasses import replace

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from torch import Tensor, nn

from bitpress.quantization import QuantizedWeight
from bitpress.quantization.grid import FLOATS, beside, limits, points_dtype, round_to_points
from bitpress.quantization.scales import ScaleKind, nearest_scale, scale_kind, step_sizes

# How near to the middle between two points a value may start, in distances of points: short of it, so that it rounds
# to the point that was chosen.
FARTHEST = 0.45


class LearnedRounding:
    """A weight whose points and scales are being learned.

    Attributes:
        factors: the logarithm of what each scale is multiplied by, float32, of the scales' shape; None where the scales
            are of a kind that takes few values only (powers of two, 8-bit floats).
    """

    def __init__(self, solved: QuantizedWeight, weight: Tensor) -> None:
        """Start at ``solved``; each value as near to that of ``weight`` (out, in) as it rounds to the same point."""
        self._solved, self._args = solved, solved.args
        steps = step_sizes(solved.scale, solved.global_scale).float()
        points = solved.values.float()
        view, (self._step, self._zero) = beside(points, [steps, solved.zero_point.float()], self._args)
        exact, _ = beside(weight.float(), [], self._args)
        self._spacing = _spacing(view, self._args)
        farthest = FARTHEST * self._spacing
        offset = (exact / self._step).add_(self._zero).sub_(view)
        self._places = offset.clamp_(-farthest, farthest).add_(view).clamp_(*limits(self._args))
        plain = scale_kind(self._args) == ScaleKind.PLAIN
        self.factors = nn.Parameter(torch.zeros_like(steps)) if plain else None
        self._dense: Tensor | None = None

    def dense(self) -> Tensor:
        """The weight as it is rounded now, (out, in), in the dtype of the solved one; a leaf that wants a gradient."""
        points = round_to_points(self._places.clone(), self._args)
        dense = points.sub_(self._zero).mul_(self._scales())
        self._dense = dense.reshape(self._solved.values.shape).to(self._solved.scale.dtype).requires_grad_()
        return self._dense

    @torch.no_grad()
    def step(self, distance: float, gradient: Tensor) -> None:
        """Move each value by ``distance``, in distances of points, against its gradient; give the factors theirs.

        Args:
            distance: how far.
            gradient: of the last :meth:`dense`, of its shape.
        """
        assert self._dense is not None  # noqa: S101
        if self.factors is not None:
            # d/df of w * exp(f), for all values of a scale.
            slopes, _ = beside(gradient.float() * self._dense, [], self._args)
            with torch.enable_grad():
                _, (of_group,) = beside(slopes, [self.factors], self._args)
            self.factors.grad = torch.autograd.grad(of_group, self.factors, slopes.sum_to_size(of_group.shape))[0]
        signs, _ = beside(gradient.sign().float(), [], self._args)
        moved = signs.mul_(self._spacing) if self._spacing.dim() else signs
        self._places.sub_(moved, alpha=distance).clamp_(*limits(self._args))
        self._dense = None

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The weight as it would be stored now."""
        points = round_to_points(self._places.clone(), self._args)
        values = points.reshape(self._solved.values.shape).to(points_dtype(self._args))
        scale = self._solved.scale
        if self.factors is not None:
            scale = nearest_scale(scale.float() * self.factors.exp(), scale.dtype, None)
        return replace(self._solved, values=values, scale=scale)

    def _scales(self) -> Tensor:
        if self.factors is None:
            return self._step
        _, (factors,) = beside(self._places, [self.factors.detach().exp()], self._args)
        return self._step * factors


def _spacing(points: Tensor, args: QuantizationArgs) -> Tensor:
    """How far each point is from the next one towards 0, the lesser of its two distances; of integers one for all."""
    if args.type == QuantizationType.INT:
        return torch.ones((), device=points.device)
    floats = FLOATS[args.num_bits]
    # Just below a power of two points are as near as those of the binade below.
    _, exponents = torch.frexp(points.abs().mul(1 - 2.0**-12))
    return torch.exp2((exponents - 1).clamp(min=floats.exponent).sub(floats.mantissa).float())
