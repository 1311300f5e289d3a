"""GeneratedTextModifier: the model writes a part of its calibration text, or all of it."""

from pydantic import Field

from bitpress.modifiers.base import Modifier
from bitpress.modifiers.state import Writing


class GeneratedTextModifier(Modifier):
    """Calibrate on text of the model's own, too: beside the dataset, or without one.

    Few samples of one kind teach what they hold, and cost what they do not: the text that a model writes from random
    first tokens is of all kinds that it knows (LLM-QAT, Liu et al., 2023, https://arxiv.org/abs/2305.17888, section
    3.1). With text unlike the dataset's the compressed model loses less, the fewer bits the more; with text like it, at
    4 bits, a little more: docs/benchmarks.md. It may stand anywhere in the recipe.

    It is for models that go on with a text, in memory as a whole; beside a dataset others do without, with a warning.
    On a CPU writing takes about as long as a forward of as many tokens, since all sequences are written together.

    Attributes:
        samples: sequences; 0 for none.
        length: tokens of each.
    """

    samples: int = Field(default=64, ge=0)
    length: int = Field(default=64, ge=8)

    @property
    def needs_whole_model(self) -> bool:
        """See :attr:`Modifier.needs_whole_model`: a pass for each token."""
        return self.samples > 0

    @property
    def writes(self) -> Writing | None:
        """See :attr:`Modifier.writes`."""
        return Writing(self.samples, self.length) if self.samples else None
