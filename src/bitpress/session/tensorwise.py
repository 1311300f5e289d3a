"""A session that needs no model at all: weights go from file to file, each by itself."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bitpress.checkpoints.journal import Journal
from bitpress.checkpoints.layout import ShardWriter
from bitpress.checkpoints.saving import Companions, write_companions
from bitpress.checkpoints.unknown import Unknown, log_choice
from bitpress.memory import process_memory
from bitpress.pipelines import infer_pipeline
from bitpress.pipelines.data import CalibrationData
from bitpress.pipelines.solving import OnProgress
from bitpress.pipelines.tensors import check_by_tensors, check_recipe_by_tensors, most_at_once, run_by_tensors
from bitpress.session.ondisk import OnDiskSession, Summary
from bitpress.session.preflight import TENSORS, Needs


class TensorwiseSession(OnDiskSession):
    """One compression by a recipe that rounds each weight by itself, of which a few are in memory at a time.

    The CPU does it, faster than most disks deliver.
    """

    @property
    def device(self) -> torch.device:
        """See :attr:`Session.device`."""
        return torch.device("cpu")

    def check(self) -> None:
        """See :meth:`OnDiskSession.check`."""
        check_recipe_by_tensors(self.recipe.modifiers)
        super().check()
        layout, largest = self.plan.layout, most_at_once(self.state, self.plan)
        self.needs = Needs(
            {TENSORS: largest}, process_memory(), layout.nbytes, len(self.state.blocks), len(self.state.schemes)
        )

    def check_possible(self) -> None:
        """See :meth:`OnDiskSession.check_possible`."""
        check_by_tensors(self.state, self.source)
        if isinstance(self.model, Unknown):
            log_choice(self.model, self.state.schemes)

    def start(self, read_data: Callable[[nn.Module], CalibrationData | None]) -> None:  # noqa: ARG002
        """Check; what data there is is not looked at."""
        self.check()
        self.needs.check()
        self.pipeline = infer_pipeline("datafree", self.state, self.recipe.modifiers, has_data=False)

    @torch.no_grad()
    def write_to(
        self, draft: Path, journal: Journal, companions: Companions, on_progress: OnProgress, summary: Summary
    ) -> None:
        """See :meth:`OnDiskSession.write_to`."""
        with ShardWriter(draft, self.plan.layout) as writer:
            run_by_tensors(self.state, self.plan, writer, journal, on_progress)
        self.stored_bytes = self.plan.stored_bytes
        for modifier in self.recipe.modifiers:
            modifier.on_finalize(self.state)
        object.__setattr__(self.model, "bitpress", summary(companions))
        self.plan.write_config(draft)
        write_companions(self.model, draft)
