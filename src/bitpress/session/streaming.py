"""A session whose model stays on the disk: each block is read when it is its turn, solved, written and dropped."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bitpress.checkpoints.journal import resumable_directory
from bitpress.checkpoints.layout import MAX_SHARD_SIZE
from bitpress.checkpoints.output import Output
from bitpress.checkpoints.saving import Companions, write_companions
from bitpress.checkpoints.source import CannotStreamError, Source
from bitpress.errors import BitpressError
from bitpress.models.residence import Residence
from bitpress.modifiers.activations import expected_activations
from bitpress.pipelines.data import CalibrationData
from bitpress.pipelines.solving import OnProgress
from bitpress.session.recipe import RecipeLike
from bitpress.session.session import Session

LIBRARIES = ("bitpress", "torch", "transformers", "compressed-tensors")

# Options that do not decide the bytes, or that the blocks tell of.
NOT_OF_THE_BYTES = ("sequential_targets", "activations")


class StreamedSession(Session):
    """One compression of a model that never is in memory as a whole.

    Attributes:
        source: the model.
        output: its checkpoint; settled by ``check``.
    """

    output: Output

    def __init__(
        self, source: Source, recipe: RecipeLike, *, max_shard_size: int | str = MAX_SHARD_SIZE, **options: Any
    ) -> None:
        super().__init__(source.model, recipe, residence=Residence(source.model, source.read), **options)
        self.source = source
        self._max_shard_size = max_shard_size
        self._options = options

    def check(self) -> None:
        """See :meth:`Session.check`.

        Raises:
            CannotStreamError: the recipe or the model needs all weights at once; the message says why.
        """
        super().check()
        for modifier in self.recipe.modifiers:
            if modifier.needs_whole_model:
                raise CannotStreamError(f"{type(modifier).__name__} needs all of the model at once.")
        blocks = self.state.blocks
        if len(blocks) < 2 or any(not block.name for block in blocks):
            raise CannotStreamError(f"{type(self.model).__name__} has no blocks that could be solved one by one.")
        owners: dict[int, str] = {}
        for block in blocks:
            for parameter in block.module.parameters():
                other = owners.setdefault(id(parameter), block.name)
                if other != block.name:
                    raise CannotStreamError(f"{block.name} and {other} share weights.")
        expected = expected_activations(self.state)
        self.output = Output(self.source, self.state.schemes, self.state.attentions, expected, self._max_shard_size)

    def initialize(self, data: CalibrationData | None) -> None:
        """See :meth:`Session.initialize`.

        Raises:
            CannotStreamError: the model's code uses weights in a way that nobody can foresee.
        """
        try:
            super().initialize(data)
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise
            raise CannotStreamError(
                f"{type(self.model).__name__} uses weights outside of its blocks ({error})"
            ) from error

    def write(self, path: Path, companions: Companions, on_progress: OnProgress, summary: Any, *, resume: bool) -> None:
        """Solve everything, and write the checkpoint.

        Args:
            path: its directory, which it takes when all is there. Until then it is beside it, under a name of its own:
                after an error, or a kill, the same call goes on from there.
            companions: what is saved beside the weights; its report is not looked at.
            on_progress: called with how far it is.
            summary: makes the report, when all is done.
            resume: False starts over.
        """
        self.state.scratch = path.parent
        if not self.state.ranks.is_first:
            self._follow(companions, on_progress, summary)
            _say_where(self.model, path)
            return
        facts = self.facts(companions.recipe or "")
        with resumable_directory(path, facts, resume=resume) as (draft, journal):
            self.output.start(draft, journal)
            try:
                self.state.ranks.gather(note=[str(draft), journal.entries])
                self._solve(companions, on_progress, summary)
                self.output.write_the_rest()
                self.output.write_config()
                write_companions(self.model, draft)
            finally:
                self.output.close()
        self.state.ranks.gather()
        _say_where(self.model, path)

    def _follow(self, companions: Companions, on_progress: OnProgress, summary: Callable[[], dict[str, Any]]) -> None:
        """As :meth:`write`, on a rank that writes nothing: the first does."""
        draft, entries = self.state.ranks.gather()[0].note
        self.output.follow(Path(draft), entries)
        self._solve(companions, on_progress, summary)
        self.state.ranks.gather()

    def _solve(self, companions: Companions, on_progress: OnProgress, summary: Callable[[], dict[str, Any]]) -> None:
        self.run(on_progress, self.output)
        self.stored_bytes = self.output.stored_bytes
        for modifier in self.recipe.modifiers:
            modifier.on_finalize(self.state)
        object.__setattr__(self.model, "bitpress", replace(companions, report=summary()))

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
            "ranks": self.state.ranks.size,
            "versions": {name: version(name) for name in LIBRARIES},
        }


def _say_where(model: Any, path: Path) -> None:
    """What is left of the model has no weights: whoever uses it is told where they are."""

    def refuse(*_: Any, **__: Any) -> None:
        raise BitpressError(
            f"this model's weights are in {path}, not in memory: bitpress.load({str(path)!r}) reads them."
        )

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
