"""How the 3-D parameters of a module divide into the projections of its experts."""

from dataclasses import dataclass

from torch import Tensor, nn


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

    def of(self, expert: int) -> str:
        """What the layer of one expert is called below the module: "3.gate_proj"; "3" where there is one part only."""
        return f"{expert}.{self.part}" if self.part else str(expert)

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


def find_projections(module: nn.Module) -> list[Projection]:
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
    squares = len({*(tuple(p.shape[1:]) for p in stacks.values()), tuple(stacks[last].shape[:0:-1])}) == 1
    if squares and not any("expert" in name for name in (type(module).__name__.lower(), *vars(module))):
        return []  # rather the blocks of block-diagonal matrices
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
