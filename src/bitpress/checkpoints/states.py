"""What a checkpoint says and holds of activations: of layers, and of the states of attention."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import is_match
from torch import Tensor, nn

from bitpress.checkpoints.attached import ACTIVATIONS, STATES, attach_attention
from bitpress.checkpoints.experts import checkpoint_names
from bitpress.models.taps import cached_attentions
from bitpress.quantization import QuantizationScheme


class StoredAttention(NamedTuple):
    """The scheme of an attention, whether it is its queries' too, and what is stored of static scales."""

    scheme: QuantizationScheme
    queries: bool
    states: dict[str, Tensor]

    def attach_to(self, model: nn.Module, name: str) -> None:
        """Make the attention of that name quantize its states."""
        attach_attention(model, name, self.scheme, self.states, queries=self.queries)


def take_activations(stored: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The static scales of the layer that is stored as ``name``; they are taken out of ``stored``."""
    return {kind: stored.pop(f"{name}.{kind}") for kind in ACTIVATIONS if f"{name}.{kind}" in stored}


def take_attentions(
    stored: dict[str, Tensor], config: Mapping[str, Any], model: nn.Module
) -> dict[str, StoredAttention]:
    """The attentions that a checkpoint's config quantizes, by their names in ``model``."""
    if "quantization_config" not in config:
        return {}
    stated = QuantizationConfig(**config["quantization_config"])
    groups = [group for group in stated.config_groups.values() if group.weights is None]
    if stated.kv_cache_scheme is None and not groups:
        return {}
    attentions = cached_attentions(model)
    names = checkpoint_names(model, list(attentions))
    found: dict[str, StoredAttention] = {}
    for name, module in attentions.items():
        at = names[name]
        of_itself = next((group for group in groups if is_match(name, module, group.targets)), None)
        if of_itself is None and stated.kv_cache_scheme is None:
            continue
        states = {kind: stored.pop(f"{at}.{kind}") for kind in STATES if f"{at}.{kind}" in stored}
        of_cache = QuantizationScheme(targets=[type(module).__name__], input_activations=stated.kv_cache_scheme)
        found[name] = StoredAttention(of_itself or of_cache, of_itself is not None, states)
    return found
