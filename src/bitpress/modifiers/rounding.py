"""LearnedRoundingModifier: once a block is solved, learn from what it should give how its weights are best rounded."""

from typing import Annotated, Literal

from pydantic import Field

from bitpress.errors import BitpressError
from bitpress.modifiers.base import Modifier
from bitpress.modifiers.state import Rounding, State

# Bits of a grid on which few steps are enough.
FINE = 4


class LearnedRoundingModifier(Modifier):
    """Learn the rounding of all layers of a block together, against the block's output in the original model.

    A solver rounds one layer after the other, each for itself. Here gradients of the error of the block's output, of
    the inputs that the compressed model gives it, move all points and scales of the block at once (SignRound, Cheng et
    al., 2023, https://arxiv.org/abs/2309.05516, known as AutoRound): layers make up for one another, and a block for
    those before it. It starts from what the modifiers before it have solved, GPTQ best of all, and so needs a fraction
    of the iterations that a start from the nearest points takes; coarse grids gain most. One in eight batches is held
    out: a block that is not nearer to the original on these stays as it was solved.

    It states no scheme: it stands behind the modifier that quantizes, and before a DistillationModifier. Zero points
    stay, and so do scales that are powers of two or 8-bit floats. Quantized activations are not simulated. A block
    takes ``iterations`` times ``batch_size`` forwards and backwards of a batch, however many batches there are, and,
    while it is learned, some 20 bytes for each of its weights.

    What few samples teach is soon learned by heart, and text unlike them then fares worse: have a GeneratedTextModifier
    in the recipe, too.

    Attributes:
        iterations: steps for each block; "auto" is 32 for grids of 4 bits or more, and 96 for coarser ones, which have
            more to learn.
        batch_size: calibration batches for each step, at least one for each process: many small steps learn more than
            few large ones.
        travel: how far a value goes, in distances between two points, if all gradients have one sign.
        learning_rate: of Adam, for the logarithms of the scales' factors. Both fall linearly to 0.
    """

    iterations: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    batch_size: int = Field(default=1, ge=1)
    travel: float = Field(default=0.5, gt=0)
    learning_rate: float = Field(default=5e-3, gt=0)

    @property
    def learns_blocks(self) -> bool:
        """See :attr:`Modifier.learns_blocks`."""
        return True

    def on_initialize(self, state: State) -> None:
        """Ask for it, if there is data for it."""
        if not any(block.calls for block in state.blocks):
            raise BitpressError("LearnedRoundingModifier needs calibration data, but no dataset was given.")
        if state.rounding is not None:
            raise BitpressError("the recipe has two LearnedRoundingModifiers: state one.")
        coarsest = min((int(s.weights.num_bits) for s in state.schemes.values() if s.weights is not None), default=FINE)
        iterations = self.iterations if self.iterations != "auto" else 32 if coarsest >= FINE else 96
        state.rounding = Rounding(iterations, self.batch_size, self.travel, self.learning_rate)
