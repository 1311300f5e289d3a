"""Experts that are stored as one parameter, seen as the linear layers that they are.

A mixture of experts keeps each projection of all its experts in one 3-D parameter, and multiplies by slices of it.
Each slice is shown here as a linear layer of its own, whose weight is a view: what is written to it is written to the
parameter, and the module's own forward computes with it. The layers' forward pre-hooks run when that forward multiplies
by their slice, whatever function it does it with.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from bitpress.models.routing import Announcer, RoutedCall, announce
from bitpress.models.stacks import Projection, find_projections

logger = logging.getLogger(__name__)

ATTRIBUTE = "_bitpress_experts"


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
        self.expert = expert
        self.projection = projection
        self.bind(experts.module)
        self.out_features, self.in_features = self.weight.shape
        self.local = projection.of(expert)
        self.__dict__["experts"] = experts  # not a submodule: the module it is of holds this layer

    def bind(self, module: nn.Module) -> None:
        """Make the weight a view of the module's parameter."""
        weight, bias = self.projection.matrix(module, self.expert), self.projection.bias(module, self.expert)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

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
        self.layers = {p.of(e): ExpertLinear(self, p, e) for e in range(count) for p in projections}
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

    def rebind(self) -> None:
        """Make the layers views of what the module's parameters are now."""
        for layer in self.layers.values():
            layer.bind(self.module)

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
        call = RoutedCall.of(forward, args, kwargs, self.count)
        if self.every_token and call is None:
            _say_routed(type(self.module).__name__)
        if not self.every_token or call is None:
            with Announcer(self, call):
                return forward(*args, **kwargs)
        for layer in self.hooked().values():
            if layer.projection.first:
                announce(layer, call.x, {})
        with Announcer(self, call, first=False):
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


@functools.cache
def _say_routed(kind: str) -> None:
    logger.warning(
        "%s are called without an index of experts: each sees the tokens that the router sends it. Give more samples "
        "if the report lists experts with few tokens.", kind,
    )  # fmt: skip


def fused_experts(module: nn.Module) -> FusedExperts | None:
    """The experts that a module keeps in 3-D parameters of its own; None if it keeps none."""
    if not any(p is not None and p.dim() == 3 for p in module._parameters.values()):
        return None
    known: FusedExperts | None = module.__dict__.get(ATTRIBUTE)
    if known is not None and known.module is module and known.current:
        return known
    projections = find_projections(module)
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
        new.register_buffer(name, buffer.to(new.weight.device), persistent=False)


def rebind_experts(module: nn.Module) -> None:
    """The layers of all fused experts in a module whose parameters have been replaced are views of the new ones."""
    for each in module.modules():
        known: FusedExperts | None = each.__dict__.get(ATTRIBUTE)
        if known is not None:
            known.rebind()


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


def routers(model: nn.Module) -> Iterator[str]:
    """Names of the linear layers that decide about experts: which take a token, or how much of one goes to shared ones.

    They stand beside fused experts, and have as many outputs as there are experts, or one.
    """
    for name, module in model.named_modules():
        experts = fused_experts(module)
        if experts is None:
            continue
        beside = name.rpartition(".")[0]
        for local, child in model.get_submodule(beside).named_children():
            at = f"{beside}.{local}" if beside else local
            linears = [(n, m) for n, m in child.named_modules(prefix=at) if isinstance(m, nn.Linear)]
            alone = len(linears) == 1 and linears[0][1].out_features in (1, experts.count)
            if alone or (child is not module and ("router" in local or local == "gate")):
                yield from (n for n, _ in linears)


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
