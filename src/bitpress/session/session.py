"""Session: a recipe meets a model and its data; everything is checked before anything is computed."""

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from bitpress.checkpoints import attach, attach_attention, is_quantized
from bitpress.errors import BitpressError
from bitpress.models.blocks import find_blocks
from bitpress.models.experts import find_layer
from bitpress.models.linears import in_features, weight_matrix
from bitpress.models.lora import check_no_adapters
from bitpress.models.taps import tapped
from bitpress.modifiers import State
from bitpress.modifiers.activations import make_taps, resolve_attentions
from bitpress.modifiers.agreeing import resolve_all
from bitpress.pipelines import check_enough, distill, dry_run, infer_pipeline, measure, run
from bitpress.pipelines.calibrating import calibrating
from bitpress.pipelines.data import Batch, CalibrationData
from bitpress.pipelines.experts import MIN_TOKENS
from bitpress.pipelines.solving import Progress
from bitpress.quantization import stored_format
from bitpress.session.recipe import Recipe, RecipeLike
from bitpress.solvers import check_finite
from bitpress.statistics import InputCollector, Statistic

logger = logging.getLogger(__name__)


class Session:
    """One compression of one model.

    ``initialize`` checks everything and makes a dry run, ``run`` solves, ``finalize`` changes the model. Until
    ``finalize`` the model is as it was, whatever happens.

    Attributes:
        state: what the modifiers share; filled by ``initialize``.
    """

    state: State

    def __init__(
        self,
        model: nn.Module,
        recipe: RecipeLike,
        *,
        pipeline: str | None = None,
        sequential_targets: Sequence[str] | None = None,
        seed: int = 42,
        moe_calibrate_all_experts: bool = True,
        moe_min_tokens: int = MIN_TOKENS,
    ) -> None:
        self.model = model
        self.recipe = Recipe.of(recipe)
        self.pipeline = pipeline
        self._named_pipeline = pipeline
        self._sequential_targets = sequential_targets
        self._seed = seed
        self._all_experts = moe_calibrate_all_experts
        self._min_tokens = moe_min_tokens
        self._data: CalibrationData | None = None
        self._order: list[str] = []

    def check(self) -> None:
        """What can be refused before any data is read: the model, targets, schemes, shapes, blocks.

        Weights on the meta device have no values that could be refused.

        Raises:
            BitpressError: names the layer or field, and the way out.
        """
        why = is_quantized(self.model)
        if why:
            raise BitpressError(f"the model is quantized already ({why}): start from the original weights.")
        check_no_adapters(self.model)
        modifiers = list(self.recipe.modifiers)
        schemes, owners = resolve_all(modifiers, self.model)
        attentions, of_attention = resolve_attentions(modifiers, self.model)
        if not schemes and not attentions:
            raise BitpressError("the recipe quantizes nothing: give a modifier scheme= or config_groups=.")
        layers = {name: find_layer(self.model, name) for name in schemes}
        for name, layer in layers.items():
            if not weight_matrix(layer).is_meta:
                check_finite(weight_matrix(layer), name)
        blocks = find_blocks(self.model, layers, self._sequential_targets)
        self.state = State(self.model, schemes, owners, blocks, seed=self._seed, min_expert_tokens=self._min_tokens)
        self.state.attentions = attentions
        self.state.taps = make_taps(self.model, schemes, attentions)
        of_taps = {name: of_attention.get(tap.owner, owners.get(tap.owner)) for name, tap in self.state.taps.items()}
        self.state.owners = {**owners, **of_taps}
        for modifier in modifiers:
            self.state.candidates |= modifier.candidates(self.model, [n for n in schemes if owners[n] is modifier])

    def initialize(self, data: CalibrationData | None) -> None:
        """Make the dry run, prove the mappings, choose the pipeline.

        Raises:
            BitpressError: a mapping that does not hold, statistics that no data is there for.
        """
        if data is not None:
            self._data = CalibrationData(
                [self._prepared(b) for b in data.batches], data.samples, data.tokens, data.sliceable
            )
            with self._calibrating(), self._tapped(), self.state.watch.phase("dry run"):
                try:
                    self._order = self._dry_run(self._prepared(data.probe()))
                except (AttributeError, AssertionError) as error:
                    if not self.state.attentions:
                        raise
                    raise BitpressError(
                        f"{type(self.model).__name__} uses its cache as compressed-tensors' quantized one cannot be "
                        f"used ({error}): its attention's states stay as they are, without kv_cache_scheme."
                    ) from error
        with self._calibrating(), self.state.watch.phase("proofs"):
            for modifier in self.recipe.modifiers:
                modifier.on_initialize(self.state)
        check_enough(self.state, data)
        for block in self.state.blocks:
            block.forget()
        self.pipeline = infer_pipeline(
            self._named_pipeline, self.state, self.recipe.modifiers, has_data=data is not None
        )

    def _dry_run(self, probe: Batch) -> list[str]:
        """The order of the blocks; NaN and infinities are refused here, where no proof of a mapping can blame them."""
        layers = {name: layer for block in self.state.blocks for name, layer in block.layers.items()}
        widths = {name: in_features(layer) for name, layer in layers.items()}
        collector = InputCollector(layers, widths, dict.fromkeys(layers, Statistic.MAX_MAGNITUDE))
        with collector.watching(), collector.batch(0, probe.mask()):
            order = dry_run(self.state, probe)
        numbers: dict[int, int] = {}
        self.state.inputs = {
            name: numbers.setdefault(id(statistics), len(numbers)) for name, statistics in collector.statistics.items()
        }
        return order

    def run(self, on_progress: Callable[[Progress], None] = lambda _: None) -> None:
        """Solve everything. The model is as it was afterwards."""
        assert self.pipeline is not None  # noqa: S101
        # Experts one by one, each a slice of a parameter, would make a gradient of the whole parameter each.
        with calibrating(self.model, one_by_one=False):
            measure(self.state, self.recipe.modifiers, self._data, on_progress)
        with self._calibrating(), self._tapped():
            self._changes = run(self.pipeline, self.state, self.recipe.modifiers, self._data, self._order, on_progress)
        with calibrating(self.model, one_by_one=False):
            distill(self.state, self._data, self._changes, on_progress)

    @torch.no_grad()
    def finalize(self) -> None:
        """Write the new weights to the model, and to every quantized layer its scheme."""
        self._changes.commit(self.model)
        for name, packed in self._changes.packed.items():
            attach(find_layer(self.model, name), self.state.schemes[name], packed, self.state.activations.get(name, {}))
        for name, attention in self.state.attentions.items():
            tensors = self.state.activations.get(name, {})
            attach_attention(self.model, name, attention.scheme, tensors, queries=attention.queries)
        for modifier in self.recipe.modifiers:
            modifier.on_finalize(self.state)
        self.stored_bytes = {
            name: packed.nbytes(stored_format(self.state.schemes[name]))
            for name, packed in self._changes.packed.items()
        }
        del self._changes

    def _calibrating(self) -> AbstractContextManager[None]:
        return calibrating(self.model, all_experts=self._all_experts)

    def _tapped(self) -> AbstractContextManager[None]:
        return tapped(self.model, {name: find_layer(self.model, name) for name in self.state.schemes}, self.state.taps)

    def _prepared(self, batch: Batch) -> Batch:
        """On the model's device, and without a cache: a block is run more than once."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        batch = batch.to(device)
        if "use_cache" in inspect.signature(self.model.forward).parameters and "use_cache" not in batch.kwargs:
            return Batch(batch.args, {**batch.kwargs, "use_cache": False})
        return batch


def parameters_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and persistent buffers, shared ones once."""
    tensors: dict[int, Any] = {t.data_ptr(): t for t in model.state_dict().values() if isinstance(t, torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values())
