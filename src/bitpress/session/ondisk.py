"""Sessions whose model stays on the disk."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bitpress.checkpoints.journal import Journal, resumable_directory
from bitpress.checkpoints.layout import MAX_SHARD_SIZE
from bitpress.checkpoints.planned import Planned
from bitpress.checkpoints.saving import Companions
from bitpress.checkpoints.source import Source
from bitpress.errors import BitpressError
from bitpress.models.residence import Residence
from bitpress.modifiers.activations import expected_activations
from bitpress.pipelines.data import CalibrationData
from bitpress.pipelines.solving import OnProgress
from bitpress.session.preflight import Needs
from bitpress.session.recipe import RecipeLike
from bitpress.session.session import Session

LIBRARIES = ("bitpress", "torch", "transformers", "compressed-tensors")

# Options that do not decide the bytes, or that the blocks tell of.
NOT_OF_THE_BYTES = ("sequential_targets", "activations")

# Completes what is saved beside the weights, when all is done.
Summary = Callable[[Companions], Companions]


class OnDiskSession(Session):
    """One compression of a model that never is in memory as a whole.

    Attributes:
        source: the model.
        plan: its checkpoint; settled by ``check``.
    """

    plan: Planned

    def __init__(
        self,
        source: Source,
        recipe: RecipeLike,
        *,
        max_shard_size: int | str = MAX_SHARD_SIZE,
        check_room: Callable[[int], object] = lambda _: None,
        residence: Residence | None = None,
        device: torch.device | str = "cpu",  # noqa: ARG002
        **options: Any,
    ) -> None:
        super().__init__(source.model, recipe, residence=residence, on_disk=True, **options)
        self.source = source
        self._max_shard_size = max_shard_size
        self._check_room = check_room
        self._options = options

    def check(self) -> None:
        """See :meth:`Session.check`.

        Raises:
            CannotStreamError: the recipe or the model needs all weights at once; the message says why.
        """
        super().check()
        self.check_possible()
        expected = expected_activations(self.state)
        self.plan = Planned.of(self.source, self.state.schemes, self.state.attentions, expected, self._max_shard_size)
        self._check_room(self.plan.layout.nbytes)

    def _estimate(self, data: CalibrationData | None) -> Needs:
        return replace(super()._estimate(data), disk=self.plan.layout.nbytes)

    def check_possible(self) -> None:
        """Refuse what cannot be done this way, once layers, schemes and blocks are known.

        Raises:
            CannotStreamError: says why.
        """
        raise NotImplementedError

    def write(
        self,
        path: Path,
        companions: Companions,
        on_progress: OnProgress,
        summary: Summary,
        *,
        resume: bool,
        ends_in: Path | None = None,
    ) -> None:
        """Solve everything, and write the checkpoint.

        Args:
            path: its directory, which it takes when all is there. Until then it is beside it, under a name of its own:
                after an error, or a kill, the same call goes on from there.
            companions: what is saved beside the weights, but for the report.
            on_progress: called with how far it is.
            summary: adds the report, when all is done.
            resume: False starts over.
            ends_in: where the checkpoint will be in the end, if not there.
        """
        if self.state.ranks.is_first:
            with resumable_directory(path, self.facts(companions.recipe or ""), resume=resume) as (draft, journal):
                self.write_to(draft, journal, companions, on_progress, summary)
        else:
            self.follow(companions, on_progress, summary)
        self.state.ranks.gather()
        _say_where(self.model, ends_in or path, loads=ends_in in (None, path))

    def write_to(
        self, draft: Path, journal: Journal, companions: Companions, on_progress: OnProgress, summary: Summary
    ) -> None:
        """Write all files to the directory ``draft``; see :meth:`write`."""
        raise NotImplementedError

    def follow(self, companions: Companions, on_progress: OnProgress, summary: Summary) -> None:
        """What a rank does that writes nothing, while the first does."""

    def facts(self, recipe: str) -> dict[str, Any]:
        """All that decides the bytes of the checkpoint."""
        config: Any = self.model.config
        return {
            "model": self.source.shards.facts(),
            "config": _digest([config.to_json_string().encode()]),
            "recipe": recipe,
            **{name: value for name, value in self._options.items() if name not in NOT_OF_THE_BYTES},
            "data": None if self.data is None else _data_digest(self.data),
            "blocks": [block.name for block in self.state.blocks],
            "max_shard_size": self._max_shard_size,
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "ranks": self.state.ranks.size,
            "versions": {name: version(name) for name in LIBRARIES},
        }


def _say_where(model: Any, path: Path, *, loads: bool) -> None:
    """What is left of the model has no weights: whoever uses it is told where they are, and what loads them."""
    reader = f": bitpress.load({str(path)!r}) reads them." if loads else "."

    def refuse(*_: Any, **__: Any) -> None:
        raise BitpressError(f"this model's weights are in {path}, not in memory{reader}")

    model.register_forward_pre_hook(refuse)
    model.save_pretrained = refuse


def _data_digest(data: CalibrationData) -> str:
    tensors = [leaf for b in data.batches for leaf in tree_leaves((b.args, b.kwargs)) if isinstance(leaf, Tensor)]
    return _digest(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
