"""Gradients of the loss at the weights, a few draws before anything is solved.

The loss is the divergence from the model's own predictions: labels are drawn from them, so that no data needs labels,
and the covariance of the gradients is Fisher's matrix. The blocks are run again on the way back, so that only one
block's activations are kept; a weight's gradient is let go of as soon as the modifiers have seen it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitpress.errors import BitpressError
from bitpress.models.experts import ExpertLinear, find_layer
from bitpress.models.linears import as_parameter
from bitpress.modifiers import Modifier, State
from bitpress.modifiers.state import Measured
from bitpress.pipelines.data import Batch, CalibrationData
from bitpress.pipelines.gradients import (
    first_tensor,
    keeping_inputs,
    own_gradients_kept,
    predictions,
    replaced_forwards,
)
from bitpress.pipelines.solving import OnProgress, Progress

# One gradient each: more say the same more exactly.
DRAWS = 8
POSITIONS = 256


def measure(state: State, modifiers: Sequence[Modifier], data: CalibrationData | None, on_progress: OnProgress) -> None:
    """Show the modifiers that ask for it the gradients at the weights of their layers.

    Each of at most :data:`DRAWS` draws is one sequence of at most :data:`POSITIONS` tokens, or one batch where the data
    are not token ids. The model and its parameters' own gradients are left as they were.

    Raises:
        BitpressError: the model's output does not depend on the layers in a way that has a gradient, or is not finite.
    """
    asking = [(modifier, names) for modifier in modifiers if (names := set(modifier.measured_layers(state)))]
    if not asking or data is None:
        return
    draws = _draws(data)
    generator = torch.Generator().manual_seed(state.seed)
    count = 0
    loss: Literal["kl", "output"] = "kl"
    with state.watch.phase("measure"):
        with _only_weights(state, asking), replaced_forwards(state.blocks, keeping_inputs), torch.enable_grad():
            for index, batch in enumerate(draws):
                on_progress(Progress(index, len(draws), "", "measure", "draws"))
                likelihood, values, loss = _likelihood(state.model, batch, generator)
                likelihood.backward()
                count += values
        for modifier, _ in asking:
            modifier.on_measured(state, Measured(loss, len(draws), count))


def _draws(data: CalibrationData) -> list[Batch]:
    """The first sequences, cut; batches of another kind as they are."""
    if not data.sliceable:
        return data.batches[:DRAWS]
    rows = ((batch, row) for batch in data.batches for row in range(len(next(iter(batch.kwargs.values())))))
    found = []
    for (batch, row), _ in zip(rows, range(DRAWS), strict=False):
        kwargs = {
            key: value[row : row + 1, :POSITIONS] if isinstance(value, Tensor) else value
            for key, value in batch.kwargs.items()
        }
        found.append(Batch(batch.args, kwargs))
    return found


def _likelihood(
    model: nn.Module, batch: Batch, generator: torch.Generator
) -> tuple[Tensor, int, Literal["kl", "output"]]:
    """The log-likelihood of predictions that are drawn from the model's own, how many, and the kind of the loss."""
    output = model(*batch.args, **batch.kwargs)
    logits = predictions(output, batch)
    if logits is not None:
        loss: Literal["kl", "output"] = "kl"
        scores = logits.log_softmax(-1)
        # Drawn on the CPU: the same labels on every device.
        labels = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator).to(scores.device)
        likelihood, count = scores.gather(1, labels).sum(), len(scores)
    else:
        # A normal distribution around the output, as wide as the output is large.
        loss = "output"
        values = _first_output(model, output)
        noise = torch.randn(values.shape, generator=generator).to(values.device)
        likelihood = (values * noise).sum() / values.detach().square().mean().sqrt().clamp(min=1e-30)
        count = values.numel()
    if not likelihood.requires_grad:
        raise BitpressError(
            f"the output of {type(model).__name__} has no gradient (is its forward under no_grad?), so that nothing "
            "says which layers matter: state scheme= or config_groups= in place of choose_from=."
        )
    if not bool(likelihood.isfinite()):
        raise BitpressError(f"the output of {type(model).__name__} holds NaN or infinite values.")
    return likelihood, count, loss


def _first_output(model: nn.Module, output: Any) -> Tensor:
    found = first_tensor(output, with_gradient=True)
    if found is None:
        raise BitpressError(
            f"the output of {type(model).__name__} holds no tensor that has a gradient, so that nothing says which "
            "layers matter: state scheme= or config_groups= in place of choose_from=."
        )
    return found


@contextmanager
def _only_weights(state: State, asking: Sequence[tuple[Modifier, set[str]]]) -> Iterator[None]:
    """Inside the ``with`` gradients are those at the measured weights, and go to the modifiers."""
    measured: dict[nn.Parameter, list[str]] = {}
    for name in state.schemes:
        if any(name in names for _, names in asking):
            measured.setdefault(_parameter(find_layer(state.model, name)), []).append(name)

    @torch.no_grad()
    def show(parameter: Any) -> None:
        gradient, parameter.grad = parameter.grad, None
        for name in measured[parameter]:
            of_layer = _gradient(find_layer(state.model, name), gradient)
            for modifier in (m for m, names in asking if name in names):
                modifier.on_gradient(state, name, of_layer)

    with own_gradients_kept(state.model):
        for parameter in state.model.parameters():
            parameter.requires_grad_(parameter in measured)
        handles = [parameter.register_post_accumulate_grad_hook(show) for parameter in measured]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _parameter(layer: nn.Module) -> nn.Parameter:
    """The parameter that holds a layer's weight."""
    if isinstance(layer, ExpertLinear):
        return layer.experts.module.get_parameter(layer.projection.parameter)
    return layer.get_parameter("weight")


def _gradient(layer: nn.Module, gradient: Tensor) -> Tensor:
    """The part of a parameter's gradient that is the layer's, (out, in)."""
    if isinstance(layer, ExpertLinear):
        return layer.projection.within(gradient[layer.expert])
    return as_parameter(layer, gradient)  # which undoes itself
