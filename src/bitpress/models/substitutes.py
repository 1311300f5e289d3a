"""Weights that are made while a block runs, in the place of its own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from bitpress.models.experts import ExpertLinear, find_layer
from bitpress.models.linears import as_parameter

Make = Callable[[], Tensor]


class Substitute:
    """What stands in for a module's parameter.

    Attributes:
        module: the module.
        local: the parameter's name in it.
        make: its value: differentiable by whatever it is made from.
    """

    def __init__(self, module: nn.Module, local: str, make: Make) -> None:
        self.module, self.local, self.make = module, local, make


def substitutes(model: nn.Module, weights: Mapping[str, Make], others: Mapping[str, Tensor]) -> list[Substitute]:
    """The substitutes for weights of layers, each given by what makes its (out, in) matrix, and for other parameters.

    Experts that share a parameter have one substitute; those without a weight of their own keep theirs.

    Args:
        model: the model.
        weights: by the layer's name.
        others: by the parameter's name.
    """
    found: list[Substitute] = []
    experts: dict[tuple[int, str], list[tuple[ExpertLinear, Make]]] = {}
    for name, make in weights.items():
        layer = find_layer(model, name)
        if isinstance(layer, ExpertLinear):
            key = (id(layer.experts.module), layer.projection.parameter)
            experts.setdefault(key, []).append((layer, make))
        else:
            found.append(Substitute(layer, "weight", _as_parameter(layer, make)))
    for name, value in others.items():
        owner, _, local = name.rpartition(".")
        module = find_layer(model, owner)
        if isinstance(module, ExpertLinear):
            key = (id(module.experts.module), module.projection.parameter)
            experts.setdefault(key, []).append((module, _constant(value)))
        else:
            found.append(Substitute(module, local, _constant(value)))
    for parts in experts.values():
        first = parts[0][0]
        found.append(Substitute(first.experts.module, first.projection.parameter, _joined(parts)))
    return found


@contextmanager
def substituted(parts: Sequence[Substitute]) -> Iterator[None]:
    """Inside the ``with`` the modules have the substitutes for parameters."""
    own = [part.module._parameters[part.local] for part in parts]
    try:
        for part in parts:
            part.module._parameters[part.local] = part.make()  # type: ignore[assignment]
        yield
    finally:
        for part, parameter in zip(parts, own, strict=True):
            part.module._parameters[part.local] = parameter


def _constant(value: Tensor) -> Make:
    return lambda: value


def _as_parameter(layer: nn.Module, make: Make) -> Make:
    return lambda: as_parameter(layer, make())


def _joined(parts: Sequence[tuple[ExpertLinear, Make]]) -> Make:
    """The parameter of all experts, with the slices that are given."""
    first = parts[0][0]

    def make() -> Tensor:
        whole = first.experts.module.get_parameter(first.projection.parameter).detach().clone()
        for layer, of_layer in parts:
            layer.projection.within(whole[layer.expert]).copy_(of_layer())
        return whole

    return make
