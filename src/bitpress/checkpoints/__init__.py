"""Reading and writing of compressed weights."""

from bitpress.checkpoints.attached import attach, attach_attention, attached_layers, is_quantized, packed_weight
from bitpress.checkpoints.changes import Changes
from bitpress.checkpoints.directory import check_destination
from bitpress.checkpoints.formats import convert
from bitpress.checkpoints.keeping import Keep
from bitpress.checkpoints.loading import load
from bitpress.checkpoints.saving import bind_save_pretrained, save

__all__ = [
    "Changes",
    "Keep",
    "attach",
    "attach_attention",
    "attached_layers",
    "bind_save_pretrained",
    "check_destination",
    "convert",
    "is_quantized",
    "load",
    "packed_weight",
    "save",
]
