"""Session: a recipe meets a model and its data; everything is checked before anything is computed."""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Literal

import torch
from torch import nn

from bitpress.checkpoints import Changes, attach, attach_attention, is_quantized
from bitpress.errors import BitpressError
from bitpress.models.blocks import find_blocks
from bitpress.models.devices import device_of
from bitpress.models.experts import find_layer
from bitpress.models.linears import in_features, weight_matrix
from bitpress.models.lora import check_no_adapters
from bitpress.models.residence import Residence
from bitpress.models.taps import tapped
from bitpress.modifiers import State
from bitpress.modifiers.activations import make_taps, resolve_attentions
from bitpress.modifiers.agreeing import resolve_all
from bitpress.pipelines import check_enough, distill, dry_run, infer_pipeline, measure, run
from bitpress.pipelines.calibrating import calibrating
from bitpress.pipelines.data import Batch, CalibrationData
from bitpress.pipelines.experts import MIN_TOKENS
from bitpress.pipelines.solving import Progress
from bitpress.pipelines.starting import check_same_start
from bitpress.quantization import stored_format
from bitpress.session.preflight import Needs, bytes_per_token, estimate, wanted_statistics
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
        data: the calibration data, as the model takes it.
        needs: what it will need; known after ``initialize``.
    """

    state: State
    needs: Needs

    def __init__(  # noqa: PLR0913
        self,
        model: nn.Module,
        recipe: RecipeLike,
        *,
        pipeline: str | None = None,
        sequential_targets: Sequence[str] | None = None,
        seed: int = 42,
        moe_calibrate_all_experts: bool = True,
        moe_min_tokens: int = MIN_TOKENS,
        activations: Literal["memory", "disk"] | None = None,
        residence: Residence | None = None,
        on_disk: bool = False,
    ) -> None:
        self.model = model
        self.residence = residence
        self._on_disk = on_disk or residence is not None
        self.recipe = Recipe.of(recipe)
        self.pipeline = pipeline
        self._named_pipeline = pipeline
        self._sequential_targets = sequential_targets
        self._seed = seed
        self._activations = activations
        self._all_experts = moe_calibrate_all_experts
        self._min_tokens = moe_min_tokens
        self.data: CalibrationData | None = None
        self._order: list[str] = []

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        if self.residence is not None:
            return self.residence.device
        return device_of(self.model)

    def check(self) -> None:
        """What can be refused before any data is read: the model, targets, schemes, shapes, blocks.

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
        blocks = find_blocks(self.model, layers, self._sequential_targets)
        for name, layer in {} if self._on_disk else layers.items():
            check_finite(weight_matrix(layer), name)
        if self.residence is not None:
            self.residence.expect([block.name for block in blocks])
            for block in blocks:
                block.presence = self.residence.present
        self.state = State(self.model, schemes, owners, blocks, seed=self._seed, min_expert_tokens=self._min_tokens)
        self.state.activations_on = self._activations
        self.state.attentions = attentions
        self.state.taps = make_taps(self.model, schemes, attentions)
        of_taps = {name: of_attention.get(tap.owner, owners.get(tap.owner)) for name, tap in self.state.taps.items()}
        self.state.owners = {**owners, **of_taps}
        for modifier in modifiers:
            self.state.candidates |= modifier.candidates(self.model, [n for n in schemes if owners[n] is modifier])

    def start(self, read_data: Callable[[nn.Module], CalibrationData | None]) -> None:
        """Check, then read the calibration data, then initialize.

        Args:
            read_data: makes the batches for the model; None where there is no data.

        Raises:
            BitpressError: see :meth:`check` and :meth:`initialize`.
        """
        self.check()
        self.initialize(read_data(self.model))

    def initialize(self, data: CalibrationData | None) -> None:
        """Make the dry run, prove the mappings, choose the pipeline.

        Raises:
            BitpressError: a mapping that does not hold, statistics that no data is there for.
        """
        if data is not None:
            self.data = CalibrationData(
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
        self.needs = self._estimate(data)
        self.needs.check()
        for block in self.state.blocks:
            block.forget()
        self.pipeline = infer_pipeline(
            self._named_pipeline, self.state, self.recipe.modifiers, has_data=data is not None
        )

    def _estimate(self, data: CalibrationData | None) -> Needs:
        """What it will need; the blocks still have their calls of the dry run."""
        return estimate(
            self.state,
            wanted_statistics(self.state, self.recipe.modifiers),
            tokens=0 if data is None else data.tokens,
            per_token=bytes_per_token(self.state.blocks),
            streamed=self._on_disk,
            learns=self.state.rounding is not None,
            device=self.device,
        )

    def _dry_run(self, probe: Batch) -> list[str]:
        """The order of the blocks; NaN and infinities are refused here, where no proof of a mapping can blame them."""
        layers = {name: layer for block in self.state.blocks for name, layer in block.layers.items()}
        widths = {name: in_features(layer) for name, layer in layers.items()}
        collector = InputCollector(layers, widths, dict.fromkeys(layers, Statistic.MAX_MAGNITUDE))
        with self._weights_checked(), collector.watching(), collector.batch(0, probe.mask()):
            order = dry_run(self.state, probe)
        numbers: dict[int, int] = {}
        self.state.inputs = {
            name: numbers.setdefault(id(statistics), len(numbers)) for name, statistics in collector.statistics.items()
        }
        return order

    @contextmanager
    def _weights_checked(self) -> Iterator[None]:
        """Inside the ``with`` what is read from the disk is refused if it holds NaN or infinities."""
        residence = self.residence
        if residence is None:
            yield
            return
        layers = {block.name: block.layers for block in self.state.blocks}

        @contextmanager
        def checked(name: str) -> Iterator[None]:
            with residence.present(name):
                for layer_name, layer in layers[name].items():
                    check_finite(weight_matrix(layer), layer_name)
                yield

        try:
            for block in self.state.blocks:
                block.presence = checked
            yield
        finally:
            for block in self.state.blocks:
                block.presence = residence.present

    def run(self, on_progress: Callable[[Progress], None] = lambda _: None, changes: Changes | None = None) -> None:
        """Solve everything. The model is as it was afterwards.

        Args:
            on_progress: called with how far it is.
            changes: where the new weights go; by default they are kept in memory, for :meth:`finalize`.
        """
        assert self.pipeline is not None  # noqa: S101
        self._changes = changes or Changes()
        check_same_start(self.state, self.data)
        # Experts one by one, each a slice of a parameter, would make a gradient of the whole parameter each.
        with calibrating(self.model, one_by_one=False):
            measure(self.state, self.recipe.modifiers, self.data, on_progress)
        with self._calibrating(), self._tapped():
            run(
                self.pipeline, self.state, self.recipe.modifiers, self.data, self._order, self._changes, on_progress
            )  # fmt: skip
        with calibrating(self.model, one_by_one=False):
            distill(self.state, self.data, self._changes, on_progress)

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

    @contextmanager
    def _calibrating(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(calibrating(self.model, all_experts=self._all_experts))
            if self.residence is not None:
                stack.enter_context(self.residence.around({block.name for block in self.state.blocks}))
            yield

    def _tapped(self) -> AbstractContextManager[None]:
        return tapped(self.model, {name: find_layer(self.model, name) for name in self.state.schemes}, self.state.taps)

    def _prepared(self, batch: Batch) -> Batch:
        """On the model's device, and without a cache: a block is run more than once."""
        batch = batch.to(self.device)
        if "use_cache" in inspect.signature(self.model.forward).parameters and "use_cache" not in batch.kwargs:
            return Batch(batch.args, {**batch.kwargs, "use_cache": False})
        return batch
