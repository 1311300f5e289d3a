"""What layers share that serving engines fuse into one (q, k and v; gate and up): schemes, and global scales."""

from collections import defaultdict
from collections.abc import Hashable, Iterable

from torch import nn

from bitpress.models.blocks import Block
from bitpress.models.experts import ExpertLinear, find_layer, named_layers
from bitpress.models.linears import has_columns, in_features, is_linear, weight_matrix
from bitpress.modifiers.state import State
from bitpress.quantization import has_global_scale, shared_global_scale

# Layers of one parent that vLLM makes one of, as the ``packed_modules_mapping`` of its models say.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("c_fc_0", "c_fc_1"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)


def fused_by_servers(model: nn.Module) -> list[list[str]]:
    """Names of the linear layers that servers make one of, where the model has at least two of them."""
    found: dict[tuple[str, int], list[str]] = {}
    for name, module in named_layers(model):
        parent, _, local = name.rpartition(".")
        for kind, locals_ in enumerate(FUSED):
            if local in locals_ and is_linear(module):
                found.setdefault((parent, kind), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def choose_global_scales(state: State, block: Block) -> None:
    """Give each layer of the block whose scheme has a global scale its own, where none has been chosen yet.

    Layers of one parent with inputs of one width share it: those that a server fuses are among them, whatever their
    names, and for the others it costs nothing: a scale loses bits only where its group's values are 30,000 times as
    small as the greatest of all. It is taken from the weights as they are now, after all smoothing.
    """
    for names in families(state, block):
        weights = [weight_matrix(block.layers[name]) for name in names]
        shared = shared_global_scale(weights, state.schemes[names[0]].weights)
        state.global_scales |= {name: shared.clone() for name in names}


def families(state: State, block: Block) -> list[list[str]]:
    """Layers of the block that are to share a global scale, and have none yet."""
    found = defaultdict(list)
    for name, layer in block.layers.items():
        if name in state.schemes and name not in state.global_scales and has_global_scale(state.schemes[name].weights):
            found[name.rpartition(".")[0], in_features(layer)].append(name)
    return list(found.values())


def together(state: State, names: Iterable[str]) -> list[list[str]]:
    """Layers that must have one scheme, because serving engines fuse them.

    They are the layers of a block that receive the same input (query, key and value; gate and up projection), and all
    layers of the experts of one module, whether it keeps them in 3-D parameters or in a list beside a router.
    """
    blocks = {name: block for block in state.blocks for name in block.layers}
    found: dict[Hashable, list[str]] = {}
    lists = _lists_of_experts(state.model)
    for name in names:
        layer = find_layer(state.model, name)
        listed = next((owner for owner in lists if name.startswith(f"{owner}.")), None)
        key: Hashable
        if isinstance(layer, ExpertLinear):
            key = id(layer.experts.module)
        elif listed is not None:
            key = listed
        elif name in state.inputs:
            key = (blocks[name].name, state.inputs[name])
        else:
            key = (name,)
        found.setdefault(key, []).append(name)
    return list(found.values())


def _lists_of_experts(model: nn.Module) -> list[str]:
    """Names of the lists of modules that stand beside a router: a layer with one output for each of them."""
    found = []
    for name, parent in model.named_modules():
        for local, child in parent.named_children():
            if not isinstance(child, nn.ModuleList) or len(child) < 2:
                continue
            beside = [each for n, each in parent.named_children() if n != local]
            matrices = [m for each in beside for m in each.modules() if has_columns(m)]
            if any(len(m._parameters["weight"]) == len(child) for m in matrices):
                found.append(f"{name}.{local}" if name else local)
    return found
