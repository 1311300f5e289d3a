"""What layers share that servers fuse into one: q, k and v, or gate and up."""

from collections import defaultdict

from bitpress.models.blocks import Block
from bitpress.models.linears import in_features, weight_matrix
from bitpress.modifiers.state import State
from bitpress.quantization import has_global_scale, shared_global_scale


def choose_global_scales(state: State, block: Block) -> None:
    """Give each layer of the block whose scheme has a global scale its own, where none has been chosen yet.

    Layers of one parent with inputs of one width share it: those that a server fuses are among them, whatever their
    names, and for the others it costs nothing: a scale loses bits only where its group's values are 30,000 times as
    small as the greatest of all. It is taken from the weights as they are now, after all smoothing.
    """
    families = defaultdict(list)
    for name, layer in block.layers.items():
        if name in state.schemes and name not in state.global_scales and has_global_scale(state.schemes[name].weights):
            families[name.rpartition(".")[0], in_features(layer)].append(name)
    for names in families.values():
        weights = [weight_matrix(block.layers[name]) for name in names]
        shared = shared_global_scale(weights, state.schemes[names[0]].weights)
        state.global_scales |= {name: shared.clone() for name in names}
