"""The reference model: a small network whose quantization can be read from end to end.

:class:`SimpleNN` is the network before, :class:`QuantizedNN` the same one after. The three functions are thin names
over the floors below: statistics, solvers, quantization.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitpress.errors import BitpressError
from bitpress.models.linears import in_features, is_linear, weight_matrix
from bitpress.quantization import PackedWeight, QuantizationArgs, QuantizedWeight, check_supported
from bitpress.solvers import AWQ, BalanceWeight, check_finite, output_error, round_to_nearest, search_scales
from bitpress.statistics import InputCollector, InputStatistics, Statistic

# Sizes to choose from when the user names none.
GROUP_SIZES = (64, 32, 16, 8)
# Kept in full precision, so that a scale can be folded into a layer that is quantized already.
SCALE_DTYPE = torch.float32


class _Feedforward(nn.Module):
    """Layers with ReLU between them."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def outputs(self, x: Tensor) -> Iterator[Tensor]:
        """What each layer gives for ``x`` (..., in), before its ReLU; the last are the logits."""
        for index, layer in enumerate(self.layers):
            x = layer(x.relu() if index else x)
            yield x

    def forward(self, x: Tensor) -> Tensor:
        """The logits, (..., classes), of ``x`` (..., in)."""
        for output in self.outputs(x):
            logits = output
        return logits


class SimpleNN(_Feedforward):
    """A classifier of linear layers without bias: ``input_dim`` -> ... -> ``hidden_dims[-1]`` logits.

    Args:
        input_dim: columns of the input.
        hidden_dims: outputs of each layer; the last is the number of classes.

    Raises:
        BitpressError: a width is not a positive number, or there is no layer.
    """

    def __init__(self, input_dim: int = 64, hidden_dims: Sequence[int] = (128, 256, 128, 10)) -> None:
        widths = [input_dim, *hidden_dims]
        if len(widths) == 1 or min(widths) < 1:
            raise BitpressError(
                f"SimpleNN(input_dim={input_dim}, hidden_dims={list(hidden_dims)}): state at least one layer, all "
                "widths 1 or more. The last of hidden_dims is the number of classes."
            )
        super().__init__(nn.Linear(n, m, bias=False) for n, m in itertools.pairwise(widths))
        self.input_dim = input_dim
        self.hidden_dims = tuple(hidden_dims)


class PackedLinear(nn.Module):
    """A linear layer that holds its weight packed, and unpacks it each time it is used.

    Its buffers are the tensors of the ``pack-quantized`` format, ``weight_packed``, ``weight_scale``, ``weight_shape``
    and, on an asymmetric grid, ``weight_zero_point``; and ``input_scale`` where it has one.

    Args:
        weight: the quantized weight, (out, in).
        input_scale: (in,), > 0: what the input is divided by; None for nothing.

    Attributes:
        args: the scheme of the weight.
    """

    weight_scale: Tensor
    weight_shape: Tensor
    input_scale: Tensor | None

    def __init__(self, weight: PackedWeight, input_scale: Tensor | None = None) -> None:
        super().__init__()
        self.args = weight.args
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor.to(weight.packed.device))
        self.register_buffer("input_scale", input_scale)

    @property
    def weight(self) -> PackedWeight:
        """The weight with its scheme."""
        return PackedWeight.from_tensors({n: b for n, b in self.named_buffers() if n != "input_scale"}, self.args)

    def dequantize(self) -> Tensor:
        """The weight that the layer computes with: (out, in), in the dtype of its scales."""
        return self.weight.unpack().dequantize()

    @torch.no_grad()
    def divide_outputs(self, scales: Tensor) -> None:
        """Divide the output channels by ``scales`` (out,), > 0: the integers stay as they are."""
        self.weight_scale = self.weight_scale / scales.unsqueeze(1)

    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, x: Tensor) -> Tensor:
        """(..., out), in the dtype of ``x`` (..., in)."""
        if self.input_scale is not None:
            x = _divided(x, self.input_scale)
        return F.linear(x, self.dequantize().to(x.dtype))

    def extra_repr(self) -> str:
        """The scheme, for ``print(model)``."""
        rows, columns = self.weight_shape.tolist()
        grid = "symmetric" if self.args.symmetric else "asymmetric"
        return f"{columns} -> {rows}, {self.args.num_bits} bits, {grid}, group_size={self.args.group_size}"


class QuantizedNN(_Feedforward):
    """A :class:`SimpleNN` of :class:`PackedLinear` layers. One dense weight at a time exists while it runs."""

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        super().__init__(layers)

    def nbytes(self) -> int:
        """Bytes of all that is stored: packed weights, scales, zero points, shapes, the input scale."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @classmethod
    def from_state_dict(cls, stored: Mapping[str, Tensor], args: QuantizationArgs) -> "QuantizedNN":
        """The model whose ``state_dict()`` was stored, e.g. in a safetensors file.

        Args:
            stored: tensors by name, of the shapes of :class:`bitpress.quantization.PackedWeight`.
            args: the scheme of the weights.

        Raises:
            BitpressError: no layer is in ``stored``, or one of its tensors is missing.
        """
        layers: list[PackedLinear] = []
        while of_layer := {n: t for n, t in stored.items() if n.startswith(f"layers.{len(layers)}.")}:
            tensors = {name.rpartition(".")[2]: tensor for name, tensor in of_layer.items()}
            input_scale = tensors.pop("input_scale", None)
            needed = {"weight_packed", "weight_scale", "weight_shape"}
            if missing := (needed if args.symmetric else needed | {"weight_zero_point"}) - set(tensors):
                raise BitpressError(
                    f"layers.{len(layers)} lacks {', '.join(sorted(missing))}: pass all of a QuantizedNN's "
                    f"state_dict(), and the scheme it was quantized with (now symmetric={args.symmetric})."
                )
            layers.append(PackedLinear(PackedWeight.from_tensors(tensors, args), input_scale))
        if not layers:
            raise BitpressError('no tensor is called "layers.0...": pass what QuantizedNN.state_dict() gave.')
        return cls(layers)


class LayerInfo(TypedDict):
    """What :func:`quantize_model` tells of a layer it has quantized.

    ``quantized`` is the weight with its columns multiplied by ``awq.scales``, before the next layer's scales are folded
    into its rows: ``quantized.dequantize() / awq.scales`` is to be compared with ``weight``.
    """

    weight: Tensor
    statistics: InputStatistics
    awq: AWQ
    quantized: QuantizedWeight
    relative_error: float  # ||X (W' - W)^T|| / ||X W^T||
    relative_error_before: float  # the same for round-to-nearest


def compute_activation_stats(
    model: nn.Module, batches: Tensor | Iterable[Tensor], layers: Mapping[str, nn.Module] | None = None
) -> dict[str, InputStatistics]:
    """Run the model on ``batches`` and remember the inputs of its linear layers: Gram matrix and mean magnitude.

    Args:
        model: called with one batch at a time.
        batches: tensors (..., in); one tensor is one batch.
        layers: which to watch, by name; all linear layers of the model if None.

    Returns:
        The statistics by layer. A layer that did not run is absent.

    Raises:
        BitpressError: a batch makes NaN or infinite values; the message names the layer and the batch.
    """
    if layers is None:
        layers = {name: module for name, module in model.named_modules() if is_linear(module)}
    features = {name: in_features(layer) for name, layer in layers.items()}
    collector = InputCollector(layers, features, dict.fromkeys(layers, Statistic.GRAM | Statistic.MEAN_MAGNITUDE))
    with torch.no_grad(), collector.watching():
        for index, batch in enumerate([batches] if isinstance(batches, Tensor) else batches):
            with collector.batch(index):
                model(batch)
    return collector.statistics


def search_module_scale(
    module: nn.Module | Tensor,
    statistics: InputStatistics,
    args: QuantizationArgs,
    *,
    n_grid: int = 20,
    duo_scaling: bool | Literal["both"] = True,
) -> AWQ:
    """The AWQ scales of one linear layer.

    Args:
        module: the layer, or its weight, (out, in), any float dtype.
        statistics: of its input, with the Gram matrix and the mean magnitude.
        args: the scheme it will be quantized with.
        n_grid: see :func:`bitpress.solvers.search_scales`.
        duo_scaling: see there.
    """
    weight = weight_matrix(module) if isinstance(module, nn.Module) else module
    layer = BalanceWeight(weight, args, SCALE_DTYPE)
    return search_scales([layer], statistics.gram, statistics.mean_magnitude, n_grid=n_grid, duo_scaling=duo_scaling)


@torch.no_grad()
def quantize_model(
    model: SimpleNN,
    batches: Tensor | Iterable[Tensor],
    *,
    bits: int = 4,
    symmetric: bool = False,
    group_size: int | None = None,
    n_grid: int = 20,
    on_layer: Callable[[str, LayerInfo], None] | None = None,
) -> QuantizedNN:
    """Quantize a :class:`SimpleNN` with AWQ, layer by layer; ``model`` stays as it is.

    Each layer is solved on the activations that the quantized layers before it give. Its scales s multiply its columns;
    the layer before divides its rows by s, which passes through ReLU because s is positive. That layer is quantized by
    then, but a row of the weight has scales of its own: dividing those is the same, and costs no second rounding. The
    first layer has none before it and keeps s as its ``input_scale``.

    Args:
        model: the network.
        batches: calibration inputs (rows, in) on the model's device; one tensor is one batch.
        bits: of the weights, 2 to 8.
        symmetric: grids centred on 0, without zero points.
        group_size: inputs that share a scale, a divisor of each layer's inputs; -1 for all of a row; None for the
            largest of 64, 32, 16 and 8 that divides, else -1.
        n_grid: exponents that AWQ tries for each layer; 0 is plain round-to-nearest.
        on_layer: called with the name of each layer and what was found, when it is quantized.

    Raises:
        BitpressError: ``bits`` or ``group_size`` does not fit, there is no batch, or something is not finite.
    """
    args = _scheme(model, bits, symmetric, group_size)
    activations = [batches] if isinstance(batches, Tensor) else list(batches)
    if not any(batch.numel() for batch in activations):
        raise BitpressError("batches holds no calibration input: pass at least one tensor (rows, in).")
    packed: list[PackedLinear] = []
    for name, layer in _linears(model).items():
        weight = weight_matrix(layer)
        check_finite(weight, name)
        statistics = compute_activation_stats(layer, activations, {name: layer})[name]
        found = search_module_scale(weight, statistics, args, n_grid=n_grid)
        quantized = round_to_nearest(weight * found.scales, args, SCALE_DTYPE)
        if packed:
            packed[-1].divide_outputs(found.scales)
        input_scale = None if packed or found.ratio is None else found.scales
        packed.append(PackedLinear(quantized.pack(), input_scale))
        dense = quantized.dequantize().to(weight.dtype)
        activations = [F.linear(_divided(x, found.scales), dense).relu() for x in activations]
        if on_layer is not None:
            on_layer(name, _info(weight, statistics, found, quantized))
    return QuantizedNN(packed)


def _linears(model: SimpleNN) -> dict[str, nn.Module]:
    return {f"layers.{index}": layer for index, layer in enumerate(model.layers)}


def _scheme(model: SimpleNN, bits: int, symmetric: bool, group_size: int | None) -> QuantizationArgs:
    """The scheme of all layers, checked against each."""
    inputs = {name: in_features(layer) for name, layer in _linears(model).items()}
    common = math.gcd(*inputs.values())
    if group_size is None:
        group_size = next((size for size in GROUP_SIZES if common % size == 0), -1)
    for name, n in inputs.items():
        if group_size != -1 and (group_size < 1 or n % group_size):
            fitting = ", ".join(str(size) for size in range(common, 1, -1) if common % size == 0)
            raise BitpressError(
                f"group_size {group_size} does not divide the {n} inputs of {name}. Sizes that fit every layer: "
                f"{fitting}{' and ' if fitting else ''}-1 (per channel)."
            )
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, group_size=group_size)
    check_supported(args)
    return args


def _info(weight: Tensor, statistics: InputStatistics, found: AWQ, quantized: QuantizedWeight) -> LayerInfo:
    signal = output_error(weight, statistics.gram)
    relative = [math.sqrt(max(error, 0.0) / signal) if signal else 0.0 for error in (found.error, found.error_before)]
    return LayerInfo(
        weight=weight,
        statistics=statistics,
        awq=found,
        quantized=quantized,
        relative_error=relative[0],
        relative_error_before=relative[1],
    )


def _divided(x: Tensor, scales: Tensor) -> Tensor:
    return (x / scales).to(x.dtype)
