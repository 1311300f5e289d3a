"""Adapters around linear layers: what their weights would be quantized without."""

from torch import nn

from bitpress.errors import BitpressError


def check_no_adapters(model: nn.Module) -> None:
    """Refuse a model whose linear layers are wrapped by adapters, as PEFT's LoRA does.

    Raises:
        BitpressError: names the first such layer, and the way out.
    """
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module) and hasattr(module, "lora_A"):
            raise BitpressError(
                f"{name} is wrapped by LoRA: quantized, it would lack the adapter. Merge it into the weights first, "
                "with model = model.merge_and_unload(), or remove it with model = model.unload()."
            )
