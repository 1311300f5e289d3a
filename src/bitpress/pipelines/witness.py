"""For the report: one batch that also goes through the original model, to see how far the blocks' outputs are off.

The witness is the first batch. What each block makes of it is kept three times: in the original model, with the
original weights behind compressed blocks, and with the new weights. That is one more forward of one batch, of many.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bitpress.pipelines.data import Batch

# In the original model; its weights in the compressed one; the compressed model.
ORIGINAL, BEFORE, AFTER = "original", "before", "after"
# What one more forward may cost: a batch of so many, or so few positions that nobody waits for them.
ONE_IN, FEW_POSITIONS = 8, 4096


class Witness:
    """The outputs of one block at a time for one batch.

    Attributes:
        index: of the batch; None for no witness.
    """

    def __init__(self, index: int | None, mask: Tensor | None) -> None:
        self.index = index
        self._mask = mask
        self._outputs: dict[str, Tensor] = {}

    @classmethod
    def of(cls, batches: Mapping[int, Batch]) -> "Witness":
        """The first batch of this process; none where that is a large part of the work."""
        index = next(iter(batches), None)
        if index is None:
            return cls(None, None)
        mask = batches[index].mask()
        small = mask is None or len(batches) >= ONE_IN or mask.numel() <= FEW_POSITIONS
        return cls(index, mask) if small else cls(None, None)

    def see(self, index: int, which: str, output: Any) -> None:
        """Keep a block's output if the batch is the witness; the last that is seen counts."""
        found = _hidden(output) if index == self.index else None
        if found is not None:
            # The model may write to it when it goes on.
            self._outputs[which] = found.detach().clone()

    def knows(self, which: str) -> bool:
        """True if an output of that kind was seen since :meth:`judge`."""
        return which in self._outputs

    def judge(self) -> dict[str, float]:
        """What is known of the block, and forget its outputs.

        Returns:
            ``own_error``, of its new weights, and ``accumulated_error``, of these and of all blocks before: the squared
            error of a position's output relative to its square, in the mean over positions that are not padding.
        """
        seen, self._outputs = self._outputs, {}
        errors = {
            name: _relative(seen.get(AFTER), seen.get(which), self._mask)
            for name, which in (("own_error", BEFORE), ("accumulated_error", ORIGINAL))
        }
        return {name: error for name, error in errors.items() if error is not None}


def _hidden(output: Any) -> Tensor | None:
    leaves = (x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1)
    return next(leaves, None)


def _relative(output: Tensor | None, reference: Tensor | None, mask: Tensor | None) -> float | None:
    if output is None or reference is None or output.shape != reference.shape:
        return None
    if mask is not None and output.shape[:2] == mask.shape:
        output, reference = output[mask.to(output.device)], reference[mask.to(output.device)]
    rows, exact = (x.reshape(-1, x.shape[-1]).float() for x in (output, reference))
    energy = exact.square().sum(-1)
    errors = (rows - exact).square_().sum(-1)[energy > 0] / energy[energy > 0]
    found = float(errors.mean()) if len(errors) else 0.0
    return found if torch.tensor(found).isfinite() else None
