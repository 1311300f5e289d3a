"""What experts receive: which tokens a router sends them, told from the calls of their module and its products."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from bitpress.models.experts import FusedExperts

# The functions by which an input, their first argument, is multiplied by a weight, their second.
_PRODUCTS = frozenset({
    F.linear, torch.matmul, torch.mm, torch.bmm,
    Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__,
})  # fmt: skip


@dataclass(frozen=True)
class RoutedCall:
    """A call of the usual form: hidden states (tokens, in), the experts of each token, and their weights."""

    x: Tensor
    index: Tensor
    weights: Tensor
    names: tuple[str, str, str]
    count: int

    @classmethod
    def of(
        cls, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], count: int
    ) -> "RoutedCall | None":
        """The call, or None if it has another form."""
        try:
            given = inspect.signature(forward).bind(*args, **kwargs).arguments
        except TypeError:
            return None
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        index = next((n for n, t in tensors.items() if t.dim() == 2 and not t.is_floating_point()), None)
        if index is None or len(tensors) != 3 or len(given) != 3:
            return None
        weights = next((n for n, t in tensors.items() if n != index and t.shape == tensors[index].shape), None)
        x = next((n for n in tensors if n not in (index, weights)), None)
        if weights is None or x is None or tensors[x].numel() != len(tensors[index]) * tensors[x].shape[-1]:
            return None
        return cls(tensors[x], tensors[index], tensors[weights], (x, index, weights), count)

    def to_every_expert(self, forward: Callable[..., Any]) -> None:
        """Make the call with every token sent to every expert, in order."""
        index = torch.arange(self.count, device=self.index.device, dtype=self.index.dtype)
        weights = self.weights.new_full((1, self.count), 1 / self.count)
        x, by_index, by_weight = self.names
        tokens = len(self.index)
        forward(**{x: self.x, by_index: index.repeat(tokens, 1), by_weight: weights.repeat(tokens, 1)})

    def rows_of(self, expert: int) -> Tensor:
        """The tokens that go to an expert, (rows,), int64, in the order in which forwards gather them."""
        return torch.where((self.index == expert).T)[1]


class Announcer(TorchFunctionMode):
    """Runs the hooks of experts' layers when something is multiplied by their weight."""

    def __init__(self, experts: "FusedExperts", call: RoutedCall | None, *, first: bool = True) -> None:
        super().__init__()
        self._experts, self._call, self._first = experts, call, first

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and len(args) >= 2 and isinstance(args[1], Tensor):
            found = self._experts.find(args[1])
            if found is not None:
                self._announce(args[0], *found)
        return func(*args, **(kwargs or {}))

    def _announce(self, x: Tensor, parameter: str, experts: list[int]) -> None:
        # Of a product in batches the rows that a router has set to zero are no tokens.
        taken = [each.any(-1) for each in x] if len(experts) > 1 and x.dim() == 3 else []
        inputs = [x] if len(experts) == 1 else [each[rows] for each, rows in zip(x, taken, strict=False)]
        for position, (expert, each) in enumerate(zip(experts, inputs, strict=False)):
            # Which tokens these rows are: known where the router's choice is.
            known: dict[str, Any] = {}
            if taken:
                known = {"rows": partial(_positions, taken[position])}
            elif self._call is not None and not self._experts.every_token:
                known = {"rows": partial(self._call.rows_of, expert)}
            for projection in self._experts.projections:
                if projection.parameter == parameter and (self._first or not projection.first):
                    announce(self._experts.layers[projection.of(expert)], each, known)


def _positions(taken: Tensor) -> Tensor:
    return taken.nonzero()[:, 0]


def announce(layer: nn.Module, x: Tensor, known: dict[str, Any]) -> None:
    """Run a layer's forward pre-hooks on what it receives; ``known`` are what they get as keyword arguments."""
    for key, hook in list(layer._forward_pre_hooks.items()):
        if key in layer._forward_pre_hooks_with_kwargs:
            hook(layer, (x,), known)
        else:
            hook(layer, (x,))
