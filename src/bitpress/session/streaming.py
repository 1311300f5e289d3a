"""A session whose model stays on the disk: each block is read when it is its turn, solved, written and dropped."""

from pathlib import Path
from typing import Any

import torch

from bitpress.checkpoints.journal import Journal
from bitpress.checkpoints.output import Output
from bitpress.checkpoints.saving import Companions, write_companions
from bitpress.checkpoints.source import CannotStreamError, Source
from bitpress.models.residence import Residence
from bitpress.pipelines.data import CalibrationData
from bitpress.pipelines.solving import OnProgress
from bitpress.session.ondisk import OnDiskSession, Summary
from bitpress.session.recipe import RecipeLike


class StreamedSession(OnDiskSession):
    """One compression of a model of which one block is in memory at a time."""

    def __init__(
        self, source: Source, recipe: RecipeLike, *, device: torch.device | str = "cpu", **options: Any
    ) -> None:
        # On a CPU the files are in the system's cache or on a disk that this process waits for anyway.
        ahead = None if torch.device(device).type == "cpu" else source.read_pinned
        residence = Residence(source.model, source.read, device, ahead)
        super().__init__(source, recipe, residence=residence, **options)

    def check_possible(self) -> None:
        """See :meth:`OnDiskSession.check_possible`."""
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

    def write(self, path: Path, *args: Any, **options: Any) -> None:
        """See :meth:`OnDiskSession.write`."""
        self.state.scratch = path.parent
        super().write(path, *args, **options)

    def write_to(
        self, draft: Path, journal: Journal, companions: Companions, on_progress: OnProgress, summary: Summary
    ) -> None:
        """See :meth:`OnDiskSession.write_to`."""
        output = Output(self.plan)
        output.start(draft, journal)
        try:
            self.state.ranks.gather(note=[str(draft), journal.entries])
            self._solve(output, companions, on_progress, summary)
            output.write_the_rest()
            self.plan.write_config(draft)
            write_companions(self.model, draft)
        finally:
            output.close()

    def follow(self, companions: Companions, on_progress: OnProgress, summary: Summary) -> None:
        """See :meth:`OnDiskSession.follow`."""
        output = Output(self.plan)
        draft, entries = self.state.ranks.gather()[0].note
        output.follow(Path(draft), entries)
        self._solve(output, companions, on_progress, summary)

    def _solve(self, output: Output, companions: Companions, on_progress: OnProgress, summary: Summary) -> None:
        self.run(on_progress, output)
        self.stored_bytes = self.plan.stored_bytes
        for modifier in self.recipe.modifiers:
            modifier.on_finalize(self.state)
        object.__setattr__(self.model, "bitpress", summary(companions))
