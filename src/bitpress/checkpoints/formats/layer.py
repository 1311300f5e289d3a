"""What all formats say of a quantized layer."""

from dataclasses import dataclass

from torch import Tensor

from bitpress.errors import BitpressError
from bitpress.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy, QuantizationType

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layer:
    """A quantized layer of a checkpoint.

    Attributes:
        name: what its tensors' names begin with.
        shape: (out, in).
        scheme: how it is quantized.
    """

    name: str
    shape: tuple[int, int]
    scheme: QuantizationScheme

    @property
    def args(self) -> QuantizationArgs:
        """The scheme of its weight."""
        args: QuantizationArgs = self.scheme.weights
        return args

    @property
    def group(self) -> int:
        """How many columns of a row share a scale."""
        grouped = self.args.strategy == QuantizationStrategy.GROUP
        return int(self.args.group_size) if grouped else self.shape[1]

    @property
    def group_size(self) -> int:
        """The group as configs of other formats state it: -1 for whole rows."""
        return self.group if self.args.strategy == QuantizationStrategy.GROUP else -1

    @property
    def groups(self) -> int:
        """How many scales a row has."""
        return self.shape[1] // self.group

    def per_group(self, numbers: Tensor) -> Tensor:
        """Scales or zero points as (out, groups), also where the whole tensor has one."""
        return numbers.reshape(-1, self.groups).expand(self.shape[0], self.groups)

    def refusal(self, target: str, why: str) -> BitpressError:
        """That a format does not hold this layer."""
        kind = QuantizationType(self.args.type).value
        symmetry = "symmetric" if self.args.symmetric else "asymmetric"
        of = f"groups of {self.group}" if self.group < self.shape[1] else str(self.args.strategy.value)
        return BitpressError(
            f"{self.name} ({self.shape[0]} × {self.shape[1]}, {self.args.num_bits}-bit {kind}, {symmetry}, {of}) does "
            f"not fit {target}: {why}"
        )


def check_weights_only(layer: Layer, target: str) -> None:
    """Refuse what has more than integers with a scale for each group.

    Raises:
        BitpressError: names the layer.
    """
    if layer.scheme.input_activations is not None or layer.scheme.output_activations is not None:
        raise layer.refusal(target, "its activations are quantized, too, and this format holds weights only.")
    if QuantizationType(layer.args.type) != QuantizationType.INT:
        raise layer.refusal(target, "this format holds integers only: quantize with type int.")
    if layer.shape[1] % layer.group:
        raise layer.refusal(target, "its last group is shorter than the others.")
