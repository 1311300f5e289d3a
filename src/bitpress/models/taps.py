"""Places whose tensors calibration looks at though no layer receives them: outputs, and the states of attention.

Keys, values and queries are seen where compressed-tensors quantizes them when the model is served: after the rotary
embedding, before the cache. Its own hooks show them, so that what is measured is what will be quantized.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from compressed_tensors.modeling import (
    IMPL_ATTR,
    KV_CACHE_ATTR,
    initialize_hooked_attention,
    initialize_hooked_kv_cache,
    register_key_hook,
    register_query_hook,
    register_value_hook,
)
from compressed_tensors.quantization.lifecycle import initialize
from torch import Tensor, nn

from bitpress.errors import BitpressError

OUTPUT = "output"
_STATES = {"q": register_query_hook, "k": register_key_hook, "v": register_value_hook}
# Its name up to 0.17 is the second.
_is_cached = getattr(initialize, "is_cached_attention_module", None) or initialize.is_attention_module


class Tap(nn.Module):
    """Receives the tensors of one place; its forward pre-hooks see them.

    Attributes:
        owner: the name of the layer or attention that the place is in.
        base: which place: "output", "q", "k" or "v".
        in_features: columns that are told apart: the heads, or 1 for none.
        ran: True once something was received.
    """

    def __init__(self, owner: str, base: str, in_features: int = 1) -> None:
        super().__init__()
        self.owner, self.base, self.in_features = owner, base, in_features
        self.ran = False

    @property
    def name(self) -> str:
        """What its statistics are called."""
        return f"{self.owner}.{self.base}"

    def forward(self, x: Tensor) -> Tensor:
        """Take in a tensor whose first dimensions are those of the batch's mask, and whose last is the columns."""
        self.ran = True
        return x

    def receive(self, states: Tensor) -> None:
        """Take in states of attention, (rows, heads, positions, channels).

        Raises:
            BitpressError: the heads are not as many as the model's config says.
        """
        if self.in_features not in (1, states.shape[1]):
            raise BitpressError(
                f"{self.name} has {states.shape[1]} heads as it is cached, where the model's config has "
                f'{self.in_features}: strategy "attn_head" does not fit it, use strategy "tensor".'
            )
        self(states.permute(0, 2, 3, 1) if self.in_features > 1 else states.transpose(1, 2))


def cached_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules that compressed-tensors gives a quantized cache, by name."""
    return {name: module for name, module in model.named_modules() if _is_cached(module)}


def hook_attention(model: nn.Module, attention: nn.Module, *, queries: bool) -> None:
    """Make an attention pass its keys and values (and queries) through compressed-tensors, as its loader does."""
    of_transformers: Any = model
    if queries:
        initialize_hooked_attention(of_transformers, attention)
    else:
        initialize_hooked_kv_cache(of_transformers, attention)


@contextmanager
def tapped(model: nn.Module, layers: Mapping[str, nn.Module], taps: Mapping[str, Tap]) -> Iterator[None]:
    """Inside the ``with`` the taps receive what passes.

    Args:
        model: the model; it is as it was afterwards.
        layers: the layers whose outputs are tapped, by name.
        taps: by :attr:`Tap.name`.
    """
    with ExitStack() as stack:
        for tap in taps.values():
            if tap.base == OUTPUT:
                handle = layers[tap.owner].register_forward_hook(_passing_to(tap))
                stack.callback(handle.remove)
        of_attention = [tap for tap in taps.values() if tap.base != OUTPUT]
        if of_attention:
            stack.enter_context(_hooked(model, of_attention))
        yield


def _passing_to(tap: Tap) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        tap(output)

    return hook


@contextmanager
def _hooked(model: Any, taps: list[Tap]) -> Iterator[None]:
    queried = {tap.owner for tap in taps if tap.base == "q"}
    attentions = {tap.owner: model.get_submodule(tap.owner) for tap in taps}
    implementation = getattr(model.config, "_attn_implementation", None)
    before = {name: set(module._forward_pre_hooks) for name, module in attentions.items()}
    try:
        for name, module in attentions.items():
            hook_attention(model, module, queries=name in queried)
        for tap in taps:
            _STATES[tap.base](attentions[tap.owner], lambda _, states, tap=tap: tap.receive(states))
        yield
    finally:
        for name, module in attentions.items():
            for handle in set(module._forward_pre_hooks) - before[name]:
                del module._forward_pre_hooks[handle]
                module._forward_pre_hooks_with_kwargs.pop(handle, None)
            for child in (KV_CACHE_ATTR, IMPL_ATTR):
                module._modules.pop(child, None)
        if queried:
            model.set_attn_implementation(implementation)
