"""DistillationModifier: tune the scales of the solved model until it predicts what the original does."""

import logging
from typing import Annotated, Literal

from pydantic import Field

from bitpress.errors import BitpressError
from bitpress.modifiers.base import Modifier
from bitpress.modifiers.state import State, Tuning

logger = logging.getLogger(__name__)

# Bits of a grid that one epoch is enough for.
ENOUGH_FOR_ONE = 4


class DistillationModifier(Modifier):
    """Tune all scales together, end to end, once every block is solved.

    Integers and zero points stay; each scale is multiplied by a factor that gradients find. That the scales alone make
    up for much is EfficientQAT's finding (Chen et al., 2024, https://arxiv.org/abs/2407.11062, section 3.3; it trains
    them on labels). Here the loss is the divergence of the compressed model's predictions from the original's (Hinton
    et al., 2015, https://arxiv.org/abs/1503.02531), which says more of each token than a label does, so that one pass
    over few samples is enough, and a second would learn them by heart. Some batches are held out: what does not bring
    these nearer to the original is not kept.

    It stands last in a recipe. It keeps the inputs of all blocks for one batch, the activations of one block, and one
    byte for each weight; an epoch costs about five forwards, or four without ``gradient_checkpointing``. Quantized
    activations are not simulated.

    Attributes:
        epochs: passes over the calibration batches; "auto" is 1 for grids of 4 bits or more, 2 for 3 bits and 3 for 2:
            what few samples teach is soon learned by heart, but coarser grids have more to learn. Behind a
            LearnedRoundingModifier it is 1 for grids of fewer than 4 bits, and none for others: they have learned it.
        learning_rate: of Adam, for the factors' logarithms on a grid of 4 bits; greater on coarser ones, by as much
            as their steps are. It falls linearly to 0.
        held_out: the share of the batches that only judge.
        gradient_checkpointing: run each block again on the way back; False keeps the activations and the weights of all
            blocks for one batch instead.
    """

    epochs: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    learning_rate: float = Field(default=1e-3, gt=0)
    held_out: float = Field(default=0.125, gt=0, lt=1)
    gradient_checkpointing: bool = True

    @property
    def needs_whole_model(self) -> bool:
        """See :attr:`Modifier.needs_whole_model`."""
        return True

    def on_initialize(self, state: State) -> None:
        """Ask for the pass, if there is data for it."""
        if not any(block.calls for block in state.blocks):
            raise BitpressError("DistillationModifier needs calibration data, but no dataset was given.")
        if state.tuning is not None:
            raise BitpressError("the recipe has two DistillationModifiers: state one.")
        coarsest = min((int(s.weights.num_bits) for s in state.schemes.values()), default=ENOUGH_FOR_ONE)
        epochs = self._epochs(coarsest, learned=state.rounding is not None) if self.epochs == "auto" else self.epochs
        if not epochs:
            logger.info("DistillationModifier: at %d bits the learned rounding leaves nothing to tune.", coarsest)
            return
        state.tuning = Tuning(epochs, self.learning_rate, self.held_out, self.gradient_checkpointing)

    @staticmethod
    def _epochs(coarsest: int, *, learned: bool) -> int:
        """What "auto" is."""
        if learned:
            return int(coarsest < ENOUGH_FOR_ONE)
        return 1 + max(0, ENOUGH_FOR_ONE - coarsest)
