"""How the ranges of a weight are chosen, by the name that its scheme has under ``observer``."""

from collections.abc import Callable

from torch import Tensor

from bitpress.errors import BitpressError
from bitpress.modifiers.base import nearest
from bitpress.quantization import QuantizationArgs
from bitpress.solvers import minmax_parameters, search_parameters
from bitpress.statistics import InputStatistics, Statistic

Ranges = tuple[Tensor, Tensor]


def _minmax(weight: Tensor, args: QuantizationArgs, _: Tensor | None, global_scale: Tensor | None) -> Ranges:
    return minmax_parameters(weight.float(), args, weight.dtype, global_scale)


def _mse(weight: Tensor, args: QuantizationArgs, _: Tensor | None, global_scale: Tensor | None) -> Ranges:
    return search_parameters(weight, args, None, weight.dtype, global_scale)


def _imatrix(weight: Tensor, args: QuantizationArgs, gram: Tensor | None, global_scale: Tensor | None) -> Ranges:
    return search_parameters(weight, args, None if gram is None else gram.diagonal(), weight.dtype, global_scale)


def _gram(weight: Tensor, args: QuantizationArgs, gram: Tensor | None, global_scale: Tensor | None) -> Ranges:
    return search_parameters(weight, args, gram, weight.dtype, global_scale)


# A weight is seen once: what other tools average or gather over several looks is the same for it.
OBSERVERS: dict[str, Callable[[Tensor, QuantizationArgs, Tensor | None, Tensor | None], Ranges]] = {
    "minmax": _minmax,
    "memoryless_minmax": _minmax,
    "static_minmax": _minmax,
    "mse": _mse,
    "memoryless_mse": _mse,
    "imatrix_mse": _imatrix,
    "gram": _gram,
}
BY_INPUTS = (_imatrix, _gram)
# Some versions of compressed-tensors fill in a name where none is stated.
UNSTATED = (None, QuantizationArgs().observer)


def check_observer(args: QuantizationArgs) -> None:
    """Refuse what is not known.

    Raises:
        BitpressError: an unknown name, or arguments for an observer.
    """
    if args.observer is not None and args.observer not in OBSERVERS:
        raise BitpressError(f"weights: no observer is called {args.observer!r}{_known(args.observer)}")
    if args.observer_kwargs:
        raise BitpressError(
            f"weights: observer_kwargs ({', '.join(args.observer_kwargs)}) are not supported: leave them out."
        )


def states_observer(args: QuantizationArgs) -> bool:
    """True if the scheme says how ranges are chosen: then no other modifier's choice counts."""
    return args.observer not in UNSTATED


def statistics_of_observer(args: QuantizationArgs) -> Statistic:
    """What has to be known of the layer's input."""
    by_inputs = states_observer(args) and OBSERVERS[args.observer] in BY_INPUTS
    return Statistic.GRAM if by_inputs else Statistic.NONE


def observed_ranges(
    weight: Tensor, args: QuantizationArgs, statistics: InputStatistics | None, global_scale: Tensor | None = None
) -> Ranges | None:
    """Scale and zero point of ``weight`` (out, in) as the scheme's observer chooses them; None if it names none.

    Of a layer that did not run nothing is known: all its inputs count alike.
    """
    if not states_observer(args):
        return None
    known = statistics is not None and statistics.rows and Statistic.GRAM in statistics.wanted
    gram = statistics.gram if statistics is not None and known else None
    return OBSERVERS[args.observer](weight, args, gram, global_scale)


def _known(name: str) -> str:
    suggestion = nearest(name, list(OBSERVERS))
    return suggestion if suggestion.startswith(".") else f"{suggestion} Known: {', '.join(OBSERVERS)}."
