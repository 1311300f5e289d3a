"""Experts that are stored as one parameter, seen as the linear layers that they are.

A mixture of experts keeps each projection of all its experts in one 3-D parameter, and multiplies by slices of it.
Each slice is shown here as a linear layer of its own, whose weight is a view: what is written to it is written to the
parameter, and the module's own forward computes with it. The layers' forward pre-hooks run when that forward multiplies
by their slice, whatever function it does it with.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ATTRIBUTE = "_bitpress_experts"
# The functions by which an input, their first argument, is multiplied by a weight, their second.
_PRODUCTS = frozenset({
    F.linear, torch.matmul, torch.mm, torch.bmm,
    Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__,
})  # fmt: skip


@dataclass(frozen=True)
class Projection:
    """One projection of all experts of a module: a part of a parameter.

    Attributes:
        part: its name, for instance "gate_proj".
        parameter: the name of the parameter (experts, out, in), or (experts, in, out).
        rows: those of an expert's (out, in) matrix that are this projection's.
        transposed: True if the parameter is (experts, in, out).
        first: True if its input is the module's, False if it is another projection's output.
    """

    part: str
    parameter: str
    rows: slice
    transposed: bool
    first: bool

    def matrix(self, module: nn.Module, expert: int) -> Tensor:
        """The weight of one expert, (out, in): a view."""
        return self.within(module.get_parameter(self.parameter).data[expert])

    def within(self, whole: Tensor) -> Tensor:
        """This projection's part, (out, in), of what the parameter holds of one expert: a view."""
        return (whole.T if self.transposed else whole)[self.rows]

    def bias(self, module: nn.Module, expert: int) -> Tensor | None:
        """The bias of one expert, (out,): a view; None if there is none."""
        whole = module._parameters.get(f"{self.parameter}_bias")
        return None if whole is None else whole.data[expert, self.rows]


class ExpertLinear(nn.Linear):
    """A projection of one expert: its weight is a view of the parameter that holds those of all.

    Attributes:
        experts: all of the module's.
        expert: which of them.
        projection: which of its projections.
        local: its name below the module's.
    """

    experts: "FusedExperts"

    def __init__(self, experts: "FusedExperts", projection: Projection, expert: int) -> None:
        nn.Module.__init__(self)
        weight, bias = projection.matrix(experts.module, expert), projection.bias(experts.module, expert)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.expert = expert
        self.projection = projection
        self.local = _local(expert, projection)
        self.__dict__["experts"] = experts  # not a submodule: the module it is of holds this layer

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        """See ``nn.Module``; the hook runs when the experts' own forward multiplies by this weight."""
        handle = super().register_forward_pre_hook(*args, **kwargs)
        self.experts.listen()
        return _Handle(handle, self.experts)


class _Handle:
    """Removes a hook, and the listening with the last."""

    def __init__(self, handle: Any, experts: "FusedExperts") -> None:
        self._handle, self._experts = handle, experts

    def remove(self) -> None:
        self._handle.remove()
        self._experts.listen()


class FusedExperts:
    """The experts of a module that keeps them in 3-D parameters.

    Attributes:
        module: the module.
        projections: of each expert, in the order in which they run.
        layers: by "expert.part", for instance "3.gate_proj"; by "expert" where there is one part only.
        parameters: names of the module's parameters that the layers share out among them.
        count: how many experts there are.
        every_token: while hooks listen, let every expert see all tokens, instead of those that the router sends it.
    """

    def __init__(self, module: nn.Module, projections: list[Projection]) -> None:
        self.module = module
        self.projections = projections
        self.every_token = False
        count = min(len(module.get_parameter(p.parameter)) for p in projections)
        self.layers = {_local(e, p): ExpertLinear(self, p, e) for e in range(count) for p in projections}
        self.count = count
        named = dict.fromkeys(p.parameter for p in projections)
        biases = [f"{name}_bias" for name in named if module._parameters.get(f"{name}_bias") is not None]
        self.parameters = frozenset((*named, *biases))
        self._weights = list(named)
        self._forward: Any = None

    @property
    def current(self) -> bool:
        """False once the module's parameters have been replaced: moved to another device or dtype."""
        for layer in self.layers.values():
            if layer.expert == 0:
                weight, now = layer.weight, layer.projection.matrix(self.module, 0)
                if (weight.data_ptr(), weight.dtype, weight.device) != (now.data_ptr(), now.dtype, now.device):
                    return False
        return True

    def hooked(self) -> dict[str, ExpertLinear]:
        """The layers that have a forward pre-hook."""
        return {name: layer for name, layer in self.layers.items() if layer._forward_pre_hooks}

    def listen(self) -> None:
        """Wrap the module's forward while a layer has a hook, and only then."""
        wrapped = self._forward is not None
        if bool(self.hooked()) == wrapped:
            return
        if wrapped:
            own, self._forward = self._forward[0], None
            if own is None:
                del self.module.forward
            else:
                self.module.forward = own
        else:
            self._forward = (self.module.__dict__.get("forward"), self.module.forward)
            self.module.forward = partial(self._heard, self.module.forward)

    def _heard(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's forward, with what its layers receive announced to their hooks."""
        call = _RoutedCall.of(forward, args, kwargs, self.count)
        if not self.every_token or call is None:
            with _Announcer(self, call):
                return forward(*args, **kwargs)
        for layer in self.hooked().values():
            if layer.projection.first:
                _announce(layer, call.x, {})
        with _Announcer(self, call, first=False):
            call.to_every_expert(forward)
        return forward(*args, **kwargs)

    def find(self, weight: Tensor) -> tuple[str, list[int]] | None:
        """The parameter that a weight is a part of, and the experts in it."""
        address = weight.data_ptr()
        for name in self._weights:
            whole = self.module.get_parameter(name)
            offset = address - whole.data_ptr()
            if 0 <= offset < whole.nbytes and weight.dtype == whole.dtype:
                if weight.numel() == whole.numel():
                    return name, list(range(self.count))
                if weight.dim() == 2 and weight.numel() == whole[0].numel():
                    return name, [offset // (whole.stride(0) * whole.element_size())]
        return None


@dataclass(frozen=True)
class _RoutedCall:
    """A call of the usual form: hidden states (tokens, in), the experts of each token, and their weights."""

    x: Tensor
    index: Tensor
    weights: Tensor
    names: tuple[str, str, str]
    count: int

    @classmethod
    def of(
        cls, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], count: int
    ) -> "_RoutedCall | None":
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


class _Announcer(TorchFunctionMode):
    """Runs the hooks of experts' layers when something is multiplied by their weight."""

    def __init__(self, experts: FusedExperts, call: _RoutedCall | None, *, first: bool = True) -> None:
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
        inputs = [x] if len(experts) == 1 else [e[e.any(-1)] for e in x] if x.dim() == 3 else []
        for expert, each in zip(experts, inputs, strict=False):
            # Which tokens these rows are: known where the router's choice is.
            known = {} if self._call is None or self._experts.every_token else {
                "rows": partial(self._call.rows_of, expert)
            }  # fmt: skip
            for projection in self._experts.projections:
                if projection.parameter == parameter and (self._first or not projection.first):
                    _announce(self._experts.layers[_local(expert, projection)], each, known)


def _announce(layer: ExpertLinear, x: Tensor, known: dict[str, Any]) -> None:
    for key, hook in list(layer._forward_pre_hooks.items()):
        if key in layer._forward_pre_hooks_with_kwargs:
            hook(layer, (x,), known)
        else:
            hook(layer, (x,))


def fused_experts(module: nn.Module) -> FusedExperts | None:
    """The experts that a module keeps in 3-D parameters of its own; None if it keeps none."""
    if not any(p is not None and p.dim() == 3 for p in module._parameters.values()):
        return None
    known: FusedExperts | None = module.__dict__.get(ATTRIBUTE)
    if known is not None and known.module is module and known.current:
        return known
    projections = _projections(module)
    if not projections:
        return None
    fresh = FusedExperts(module, projections)
    if known is not None and known.layers.keys() == fresh.layers.keys():
        for name, layer in known.layers.items():
            _carry_over(layer, fresh.layers[name])
    module.__dict__[ATTRIBUTE] = fresh
    return fresh


def _carry_over(old: ExpertLinear, new: ExpertLinear) -> None:
    """What marks a layer as quantized stays with it when its weight moves."""
    for name in ("quantization_scheme", "quantization_status"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    for name, buffer in old.named_buffers(recurse=False):
        new.register_buffer(name, buffer, persistent=False)


def named_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """``module.named_modules()``, and after each module that fuses experts the layers of these."""
    for name, each in module.named_modules(prefix=prefix):
        yield name, each
        experts = fused_experts(each)
        if experts is not None:
            for local, layer in experts.layers.items():
                yield f"{name}.{local}" if name else local, layer


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The module of that name in :func:`named_layers`.

    Raises:
        AttributeError: there is none.
    """
    module = model
    parts = name.split(".") if name else []
    for position, part in enumerate(parts):
        child = module._modules.get(part)
        if child is None:
            experts, local = fused_experts(module), ".".join(parts[position:])
            if experts is None or local not in experts.layers:
                raise AttributeError(f"{type(model).__name__} has no layer {name}")
            return experts.layers[local]
        module = child
    return module


def _local(expert: int, projection: Projection) -> str:
    return f"{expert}.{projection.part}" if projection.part else str(expert)


def routers(model: nn.Module) -> Iterator[str]:
    """Names of the linear layers that decide about experts: which take a token, or how much of one goes to shared ones.

    They stand beside fused experts, and have as many outputs as there are experts, or one.
    """
    for name, module in model.named_modules():
        experts = fused_experts(module)
        if experts is None:
            continue
        beside = name.rpartition(".")[0]
        for local, layer in model.get_submodule(beside).named_modules(prefix=beside):
            if isinstance(layer, nn.Linear) and layer.out_features in (1, experts.count):
                yield local


@contextmanager
def every_token(model: nn.Module, *, enabled: bool = True) -> Iterator[None]:
    """Inside the ``with`` hooks on experts see all tokens (``enabled``), or those that the router sends."""
    all_experts = [e for e in map(fused_experts, model.modules()) if e is not None]
    before = [experts.every_token for experts in all_experts]
    try:
        for experts in all_experts:
            experts.every_token = enabled
        yield
    finally:
        for experts, value in zip(all_experts, before, strict=True):
            experts.every_token = value


def _projections(module: nn.Module) -> list[Projection]:
    """How a module's 3-D parameters divide into projections; empty if they are not those of experts."""
    stacks = {
        name: p
        for name, p in module._parameters.items()
        if p is not None and p.dim() == 3 and len(p) > 1 and p.is_floating_point()
    }
    if not stacks or isinstance(module, nn.modules.conv._ConvNd):
        return []
    if len(stacks) == 1:
        return _single(module, *next(iter(stacks.items())))
    *firsts, last = stacks
    transposed = getattr(module, "is_transposed", None)
    for flipped in (False, True) if transposed is None else (bool(transposed),):
        # (out, in) of one expert's matrices
        shapes = {n: tuple(p.shape[:0:-1]) if flipped else tuple(p.shape[1:]) for n, p in stacks.items()}
        out, middle = shapes[last]
        if all(shapes[n][1] == out and shapes[n][0] in (middle, 2 * middle) for n in firsts):
            found = [part for n in firsts for part in _parts(module, n, shapes[n][0] // middle, flipped)]
            return [*found, Projection(last, last, slice(None), flipped, first=False)]
    return []


def _parts(module: nn.Module, name: str, count: int, transposed: bool) -> list[Projection]:
    """The gate and the up projection of a parameter that holds both, one after the other or by turns."""
    if count == 1:
        return [Projection(name, name, slice(None), transposed, first=True)]
    half = module.get_parameter(name).shape[2 if transposed else 1] // 2
    if getattr(module, "is_concatenated", True):
        rows = slice(0, half), slice(half, None)
    else:
        rows = slice(0, None, 2), slice(1, None, 2)
    parts = zip(("gate_proj", "up_proj"), rows, strict=True)
    return [Projection(part, name, each, transposed, first=True) for part, each in parts]


def _single(module: nn.Module, name: str, parameter: Tensor) -> list[Projection]:
    """A module of one projection only, which says which side is which."""
    widths = [
        (getattr(module, f"output_{kind}", None), getattr(module, f"input_{kind}", None)) for kind in ("size", "dim")
    ]
    widths.append((getattr(module, "out_features", None), getattr(module, "in_features", None)))
    for out, inputs in widths:
        for transposed in (False, True):
            if tuple(parameter.shape[:0:-1] if transposed else parameter.shape[1:]) == (out, inputs):
                return [Projection("", name, slice(None), transposed, first=True)]
    return []
