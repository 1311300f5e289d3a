"""Blocks: the repeated sub-networks of a model, which are calibrated one after the other."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from compressed_tensors.utils import is_match
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bitpress.errors import BitpressError
from bitpress.models.experts import ExpertLinear, named_layers
from bitpress.models.linears import is_linear


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module.

    Attributes:
        args: the positional ones.
        kwargs: those by name.
        within: brings back, inside a ``with``, what torch kept per thread where the call was made (autocast, modes).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    within: Callable[[], AbstractContextManager[Any]] = nullcontext

    def of(self, function: Callable[..., Any]) -> Any:
        """What ``function`` gives for these arguments."""
        with self.within():
            return function(*self.args, **self.kwargs)

    def copy(self) -> "Call":
        """The same call with tensors, containers and caches of its own: a block may write to what it is given."""
        args, kwargs = tree_map(_copied, (self.args, self.kwargs))
        return Call(args, kwargs, self.within)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, MutableMapping):  # one that pytree does not know: keys and values that later blocks share
        own = copy.copy(value)
        own.update({key: tree_map(_copied, each) for key, each in value.items()})
        return own
    return copy.deepcopy(value) if any(kind.__name__ == "Cache" for kind in type(value).__mro__) else value


@dataclass
class Block:
    """A sub-network that is run, solved and run again as one.

    Attributes:
        name: its name in the model; "" for the model itself.
        module: the sub-network.
        layers: the targeted layers in it, by their names in the model.
        calls: its calls in the dry run, in order; empty when there was none.
        first_output: what the first of these gave.
        presence: see :meth:`present`; takes the block's name.
    """

    name: str
    module: nn.Module
    layers: dict[str, nn.Module]
    calls: list[Call] = field(default_factory=list)
    first_output: Any = None
    presence: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()

    def present(self) -> AbstractContextManager[None]:
        """Inside the ``with`` its parameters are there; those of a model in memory always are."""
        return self.presence(self.name)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module of the block by its name in the model, the layers of fused experts too."""
        yield from named_layers(self.module, prefix=self.name)

    def holds(self, name: str) -> bool:
        """True if ``name`` is that of something in the block."""
        return not self.name or name.startswith(f"{self.name}.")

    def forget(self) -> None:
        """Let go of the dry run."""
        self.calls, self.first_output = [], None

    @property
    def label(self) -> str:
        """The block's name for people."""
        return self.name or "the model"


def find_blocks(
    model: nn.Module, layers: Mapping[str, nn.Module], sequential_targets: Sequence[str] | None = None
) -> list[Block]:
    """Cut a model into blocks that together hold all targeted ``layers``.

    The user's ``sequential_targets`` (names, class names or ``re:`` patterns) have the last word; then the model's
    ``_no_split_modules``; then the children of every outermost ``ModuleList`` (or ``Sequential`` of one class) that
    hold targeted layers. What is hinted at but is only a part of such a child gives way to it. A targeted layer outside
    of all of these is a block of its own; a model without any is one block.

    Args:
        model: the model; it is not run.
        layers: its targeted layers, by name.
        sequential_targets: states the blocks; by default they are found.

    Returns:
        The blocks in the order of the model's modules.

    Raises:
        BitpressError: ``sequential_targets`` match no module that holds a targeted layer.
    """
    names = _block_names(model, layers, sequential_targets)
    if not names:
        return [Block("", model, dict(layers))]
    modules = dict(model.named_modules())
    blocks = {name: Block(name, modules[name], {}) for name in names}
    for name, layer in layers.items():
        owner = next((b for b in _ancestors(name) if b in blocks), None)
        if owner is None:
            # An expert's layer is not a module that can be called: its module is.
            alone = name.removesuffix(f".{layer.local}") if isinstance(layer, ExpertLinear) else name
            block = blocks.setdefault(alone, Block(alone, modules[alone], {}))
            block.layers[name] = layer
        else:
            blocks[owner].layers[name] = layer
    return [blocks[name] for name in modules if name in blocks]


def _block_names(
    model: nn.Module, layers: Mapping[str, nn.Module], sequential_targets: Sequence[str] | None
) -> list[str]:
    holders = {ancestor for name in layers for ancestor in _ancestors(name)}
    if sequential_targets:
        patterns = [sequential_targets] if isinstance(sequential_targets, str) else list(sequential_targets)
        chosen = [n for n, m in model.named_modules() if n in holders and is_match(n, m, patterns)]
        if not chosen:
            raise BitpressError(f"sequential_targets {patterns} match no module that holds a targeted layer.")
        return _outermost(chosen)
    hints = set(getattr(model, "_no_split_modules", None) or ())
    children = [f"{n}.{c}" if n else c for n, m in model.named_modules() for c in _repeated(m)]
    listed = {n for n in children if n in holders and n not in layers}
    hinted = [n for n, m in model.named_modules() if n in holders and type(m).__name__ in hints and n not in layers]
    whole = [next((a for a in _ancestors(n) if a in listed), n) for n in hinted]
    blocks = set(_outermost(whole)) if len(set(whole)) > 1 else set()
    # The rest of the model, say an encoder whose decoder alone is hinted at
    around = {ancestor for name in blocks for ancestor in _ancestors(name)}
    blocks.update(listed - around)
    return _outermost([n for n, _ in model.named_modules() if n in blocks])


def split(block: Block) -> list[Block]:
    """The parts of a block: of a module that is never called itself, though its parts are."""
    if block.name in block.layers:
        return [block]
    parts: dict[str, Block] = {}
    for child, module in block.module.named_children():
        name = f"{block.name}.{child}" if block.name else child
        layers = {n: m for n, m in block.layers.items() if n == name or n.startswith(f"{name}.")}
        if layers:
            parts[name] = Block(name, module, layers, presence=block.presence)
    # Experts that the module itself holds cannot be had apart from it.
    return list(parts.values()) if sum(len(part.layers) for part in parts.values()) == len(block.layers) else [block]


def _repeated(module: nn.Module) -> list[str]:
    """Names of the children that are one another's kind: all of a ModuleList, a Sequential's if of one class.

    A list within a list is not called; its children are. A list of one counts where there is no longer one in it.
    """
    one_class = len({type(child) for child in module.children()}) == 1
    if not isinstance(module, nn.ModuleList) and not (isinstance(module, nn.Sequential) and one_class):
        return []
    children: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            children |= {f"{name}.{inner}": module.get_submodule(f"{name}.{inner}") for inner in _repeated(child)}
        elif not is_linear(child):
            children[name] = child
    if len(children) != 1:
        return list(children)
    only = next(iter(children.values()))
    return list(children) if isinstance(module, nn.ModuleList) and not any(map(_repeated, only.modules())) else []


def _ancestors(name: str) -> Iterator[str]:
    """``a.b.c``, ``a.b``, ``a``."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _outermost(names: Sequence[str]) -> list[str]:
    chosen = set(names)
    return [name for name in names if not any(a in chosen for a in _ancestors(name.rpartition(".")[0]))]
