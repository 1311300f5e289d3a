"""Collecting statistics while a block runs: once for each distinct input tensor."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from bitpress.errors import BitpressError
from bitpress.statistics.inputs import InputStatistics, Statistic

logger = logging.getLogger(__name__)


class AllSeen(BaseException):
    """Ends a block's run whose output nobody needs, once the inputs of all its layers have been seen."""


class InputCollector:
    """Watches the inputs of layers while it is entered.

    Layers that receive the same tensor (q, k and v) share one :class:`InputStatistics`: the first that runs collects.

    Attributes:
        unpaired: layers that received rows which have no counterpart in the original model: a router sent them others.
    """

    def __init__(self, layers: Mapping[str, nn.Module], features: Mapping[str, int], wanted: Mapping[str, Statistic]):
        self._layers = {name: layer for name, layer in layers.items() if wanted[name]}
        self._features = features
        self._wanted = wanted
        self._statistics: dict[str, InputStatistics] = {}
        self._seen: dict[tuple[Any, ...], _Leader] = {}
        self._batch: int | str = 0
        self._mask: Tensor | None = None
        self._output_needed = True
        self._held_out = False
        self._ran: Counter[str] = Counter()
        self._once_each = False
        self._tokens: int | None = None
        self._originals: dict[str, list[_Rows]] | None = None
        self._is_original = False
        self.unpaired: set[str] = set()

    @property
    def statistics(self) -> dict[str, InputStatistics]:
        """What was collected, by layer that ran; layers that share their input share the object."""
        return self._statistics

    @property
    def wants_any(self) -> bool:
        """False if no layer has anything to be collected."""
        return bool(self._layers)

    @contextmanager
    def watching(self) -> Iterator["InputCollector"]:
        """Hooks are on the layers inside the ``with``, and gone after it."""
        handles = [
            layer.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, layer in self._layers.items()
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    @contextmanager
    def original(self, mask: Tensor | None = None, *, tokens: int | None = None) -> Iterator[None]:
        """The run in the original model: what its layers receive is kept, and the next :meth:`batch` compared with it.

        Args:
            mask: see :meth:`batch`.
            tokens: rows of the block's input. Of a layer that is given fewer, as a 2-D tensor, nothing says which.
        """
        self._mask, self._tokens, self._originals, self._is_original = mask, tokens, {}, True
        self._seen.clear()
        try:
            yield
        finally:
            self._is_original = False
            self._seen.clear()

    @contextmanager
    def batch(
        self, index: int | str, mask: Tensor | None = None, *, output_needed: bool = True, held_out: bool = False
    ) -> Iterator[None]:
        """One run of the block.

        Args:
            index: the batch's number, for messages.
            mask: (rows, positions), bool: which positions are not padding.
            output_needed: False if only the inputs of the layers matter. After a first run in which each layer ran
                once, a run then ends inside the ``with`` when all have been seen: the last layer is not computed.
            held_out: True for one of the batches that :attr:`InputStatistics.held_out_gram` is of.
        """
        self._batch, self._mask, self._output_needed, self._held_out = index, mask, output_needed, held_out
        self._seen.clear()
        self._ran.clear()
        try:
            yield
            self._once_each = self._ran == dict.fromkeys(self._layers, 1)
        except AllSeen:
            pass
        finally:
            self._seen.clear()
            self._originals = None

    def observe(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take in one call of layer ``name``, as the hooks of :meth:`watching` do: its ``args`` and ``kwargs``."""
        if name not in self._layers:
            return
        # Whatever mode the model's forward is in: the statistics outlive it.
        with torch.inference_mode(False), torch.no_grad():
            x = args[0] if args else next(iter(kwargs.values()))
            rows = kwargs.get("rows") if args else None
            if self._is_original:
                self._keep(name, x, rows)
                return
            self._observe(name, x, rows)
        self._ran[name] += 1
        if self._once_each and not self._output_needed and len(self._ran) == len(self._layers):
            raise AllSeen

    def _hook(self, name: str) -> Any:
        return lambda _, args, kwargs: self.observe(name, args, kwargs)

    def _observe(self, name: str, x: Tensor, rows: Callable[[], Tensor] | None) -> None:
        same, held = identify(x)
        key = (*same, self._wanted[name])
        leader = self._seen.get(key)
        if leader is not None and self._follows(name, leader):
            return
        statistics = self._statistics.get(name)
        self._seen.setdefault(key, _Leader(name, statistics is None, held))
        if statistics is None:
            statistics = InputStatistics(self._features[name], self._wanted[name], x.device)
        elif any(other is statistics for n, other in self._statistics.items() if n != name) and not self._leads(name):
            # Shared its input until now: from here on it has statistics of its own.
            logger.warning(
                "%s no longer shares its input with the layers it shared it with before: it has statistics of its own "
                "from here on, and nothing needs to be done.", name,
            )  # fmt: skip
            statistics = statistics.clone()
        self._statistics[name] = statistics
        statistics.update(_without_padding(x, self._mask, rows), held_out=self._held_out)
        if Statistic.DRIFT in self._wanted[name] and self._originals is not None:
            self._compare(name, statistics, _rows(x, self._mask, rows, self._tokens))
        if not statistics.is_finite():
            raise BitpressError(
                f"the input of {name} holds NaN or infinite values in calibration batch {self._batch}. The model is "
                "left as it was. Check the model's weights and that batch, or load the model in float32 or bfloat16."
            )

    def _keep(self, name: str, x: Tensor, rows: Callable[[], Tensor] | None) -> None:
        if Statistic.DRIFT not in self._wanted[name] or self._originals is None:
            return
        same, held = identify(x)
        leader = self._seen.setdefault(same, _Leader(name, True, held))
        kept = self._originals.setdefault(name, [])
        if leader.name != name:
            kept.append(self._originals[leader.name][-1])
            return
        found = _rows(x, self._mask, rows, self._tokens)
        # The block may write to it later.
        kept.append(found._replace(values=found.values.clone()) if found.values is x else found)

    def _compare(self, name: str, statistics: InputStatistics, found: "_Rows") -> None:
        kept, call = (self._originals or {}).get(name, []), self._ran[name]
        pair = _paired(found, kept[call]) if call < len(kept) else None
        if pair is not None:
            statistics.compare(*pair)
        if pair is None or len(pair[0]) < len(found.values):
            self.unpaired.add(name)

    def _follows(self, name: str, leader: "_Leader") -> bool:
        """True if ``name`` shares (or, where both run for the first time, now begins to share) those of ``leader``."""
        own = self._statistics.get(name)
        if own is None and leader.began:
            self._statistics[name] = self._statistics[leader.name]
            return True
        return own is self._statistics[leader.name]

    def _leads(self, name: str) -> bool:
        """True if no layer that shares the statistics of ``name`` has collected into them in this run."""
        own = self._statistics[name]
        return not any(n != name and self._statistics[n] is own for n, _, _ in self._seen.values())


class _Leader(NamedTuple):
    """The layer that collected an input, whether its statistics began with it, and what keeps the input's identity."""

    name: str
    began: bool
    held: Any


class _Rows(NamedTuple):
    """Rows of an input without padding, the token that each is, if known, and whether they are all of the block's."""

    values: Tensor
    tokens: Tensor | None
    all: bool


def _rows(x: Tensor, mask: Tensor | None, rows: Callable[[], Tensor] | None, tokens: int | None) -> _Rows:
    values = _without_padding(x, mask, rows)
    chosen = rows() if rows is not None else None
    if chosen is None or x.dim() != 2 or len(chosen) != len(x):
        return _Rows(values, None, x.dim() > 2 or tokens is None or len(x) == tokens)
    return _Rows(values, _without_padding(chosen.unsqueeze(1), mask, rows)[:, 0], False)


def _paired(a: _Rows, b: _Rows) -> tuple[Tensor, Tensor] | None:
    """The rows of ``a`` that ``b`` has too, and those of ``b`` in their order; None if that is not known."""
    if a.tokens is None or b.tokens is None:
        alike = a.all and b.all and a.values.shape == b.values.shape and a.tokens is b.tokens
        return (a.values, b.values) if alike else None
    place = a.tokens.new_full((1 + max(int(t.max()) if len(t) else 0 for t in (a.tokens, b.tokens)),), -1)
    place[b.tokens] = torch.arange(len(b.tokens), device=place.device)
    found = place[a.tokens]
    return a.values[found >= 0], b.values[found[found >= 0]]


def identify(x: Tensor) -> tuple[tuple[Any, ...], Any]:
    """What views of the same rows have in common, and a reference: while it is held no other tensor has that in common.

    The reference keeps the identity of the storage, not its memory.
    """
    held = StorageWeakRef(x.untyped_storage())
    layout = () if x.is_contiguous() else (x.shape, x.stride())
    return (held.cdata, x.storage_offset(), x.shape[-1:], x.numel(), layout, x.dtype, _version(x)), held


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _without_padding(x: Tensor, mask: Tensor | None, rows: Callable[[], Tensor] | None) -> Tensor:
    """``rows`` says which tokens the rows are, where a router has chosen them."""
    if mask is None:
        return x
    chosen = rows() if rows is not None else None
    if chosen is not None and x.dim() == 2 and len(chosen) == len(x) and bool((chosen < mask.numel()).all()):
        return x[mask.flatten().to(x.device)[chosen]]
    if x.dim() >= 3 and x.shape[:2] == mask.shape:
        return x[mask.to(x.device)]
    if x.dim() == 2 and x.shape[0] == mask.numel():
        return x[mask.flatten().to(x.device)]
    return x
