"""oneshot: compress a model by a recipe, in one call."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from bitpress.checkpoints import bind_save_pretrained, check_destination, convert, save
from bitpress.checkpoints.formats import COMPRESSED, check_fits, check_format
from bitpress.checkpoints.layout import MAX_SHARD_SIZE
from bitpress.checkpoints.pretrained import load_named, split_gguf
from bitpress.checkpoints.saving import Companions
from bitpress.checkpoints.source import CannotStreamError, Source, UnknownArchitectureError, open_source
from bitpress.checkpoints.unknown import open_by_names
from bitpress.errors import BitpressError
from bitpress.pipelines.data import CalibrationData, prepare, with_generated
from bitpress.pipelines.experts import MIN_TOKENS
from bitpress.pipelines.solving import Progress
from bitpress.ranks import among_ranks, current
from bitpress.report.page import page
from bitpress.report.progress import preparing, progress_display
from bitpress.report.summary import summarize
from bitpress.session import Recipe, Session
from bitpress.session.devices import find_device, move, parameters_bytes
from bitpress.session.foreign import take_arguments
from bitpress.session.ondisk import OnDiskSession
from bitpress.session.recipe import RecipeLike
from bitpress.session.streaming import StreamedSession
from bitpress.session.tensorwise import TensorwiseSession

logger = logging.getLogger(__name__)

AnySession = TypeVar("AnySession", bound=Session)

# How a model can stay on the disk, by the pipeline that the user names; the first way that does is taken.
WAYS: dict[str | None, tuple[type[OnDiskSession], ...]] = {
    None: (TensorwiseSession, StreamedSession),
    "datafree": (TensorwiseSession, StreamedSession),
    "sequential": (StreamedSession,),
}


@among_ranks
def oneshot(  # noqa: PLR0913
    model: nn.Module | str | os.PathLike[str],
    dataset: Any = None,
    recipe: RecipeLike | None = None,
    *,
    recipe_args: Mapping[str, Any] | Sequence[str] | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    num_calibration_samples: int = 512,
    max_seq_length: int | None = None,
    batch_size: int = 1,
    text_column: str = "text",
    splits: Any = None,
    dataset_config_name: str | None = None,
    dataset_path: str | os.PathLike[str] | None = None,
    shuffle_calibration_samples: bool = True,
    concatenate_data: bool = False,
    seed: int = 42,
    pipeline: str | None = None,
    sequential_targets: Sequence[str] | None = None,
    moe_calibrate_all_experts: bool = True,
    moe_min_tokens: int = MIN_TOKENS,
    activations: Literal["memory", "disk"] | None = None,
    device: torch.device | str | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    save_compressed: bool = True,
    format: str = COMPRESSED,  # noqa: A002
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    stream: bool | None = None,
    resume: bool = True,
    trust_remote_code_model: bool = False,
    progress: bool | None = None,
    **others: Any,
) -> nn.Module:
    """Compress a model by a recipe.

    Everything is checked before anything is computed, and the model is changed only when all is solved: an error, or
    a keyboard interrupt, leaves it as it was. What it will need is shown with the progress (or logged), and what cannot
    fit is refused.

    Where torchrun has started several processes, all of them call it with the same arguments: they share the work out,
    and end with the same model; the first writes ``output_dir``. A process that fails or dies ends the others with an
    error that names it.

    Args:
        model: a module, changed in place; or the path or hub id of a transformers model; or a GGUF file, which
            transformers dequantizes to float32.
        dataset: calibration data: strings, lists of token ids, a ``datasets`` dataset (text, messages or input_ids), a
            hub name or a short one ("open_platypus"), a .txt, .jsonl, .parquet or .csv path, a DataLoader, or an
            iterable of what the model's forward takes. Not needed by recipes without statistics.
        recipe: modifiers in order, a YAML file or text, the name of a shipped recipe, or a list of these; names are
            joined by a plus, too: "w4a16-balanced+kv-cache-fp8".
        recipe_args: values for the arguments of YAML recipes: ``{"group_size": 64}``, or ``["group_size=64"]``.
        tokenizer: for text, or its path; taken from ``model`` where that is a path, or was loaded from one. Saved
            beside the model.
        processor: of a multimodal model, or its path; its tokenizer is used for text. Saved beside the model.
        num_calibration_samples: sequences (rows) that are used at most.
        max_seq_length: tokens per sequence at most; by default the tokenizer's limit, or 2048.
        batch_size: sequences that run together. 1 needs no padding; padding is left out of all statistics.
        text_column: of the dataset.
        splits: of the dataset, as ``datasets.load_dataset`` names them.
        dataset_config_name: the configuration of a dataset on the hub.
        dataset_path: of a file or folder, in place of ``dataset``.
        shuffle_calibration_samples: draw the samples at random, by ``seed``, instead of from the start.
        concatenate_data: join the texts and cut them to full sequences of ``max_seq_length``.
        seed: of everything random.
        pipeline: "sequential", "basic" or "datafree"; by default what the recipe and the model need.
        sequential_targets: names, class names or ``re:`` patterns of the blocks; by default they are found.
        moe_calibrate_all_experts: let every expert of a mixture see every calibration token; False shows each expert
            those that the router sends it.
        moe_min_tokens: an expert that saw fewer tokens is solved from what all experts of its layer saw, and listed in
            the report.
        activations: where batches that wait for their turn keep their activations: "memory" or "disk"; by default on
            the disk where they would take more than a quarter of the free memory. Those of a GPU go to the host's
            memory before they go to the disk.
        device: where a model that is given by its name is computed, "cuda:1" for instance; by default a CUDA device if
            there is one (each process of torchrun its own), or the CPU. Of a streamed model one block at a time is
            there. A module is computed where it is.
        output_dir: save there, with the recipe, the tokenizer, the report and a model card.
        save_compressed: packed weights in ``output_dir``; False writes dense ones.
        format: of ``output_dir``: "compressed-tensors", "awq", "gptq" or "gguf"; see :func:`bitpress.convert`. A
            streamed run writes compressed-tensors beside it first.
        overwrite: replace a model that is in ``output_dir``.
        max_shard_size: of a file in ``output_dir``, in bytes or as "5GB".
        stream: never hold the model: read each block from the disk when it is its turn, and write it when it is solved.
            Where each weight is rounded by itself, without data, no block is built: tensors go from file to file. By
            default whenever ``model`` is a name, ``output_dir`` is given and the recipe allows it; False loads the
            model, True is an error where that is needed.
        resume: of a streamed run that was interrupted or killed: go on where it was. False starts over.
        trust_remote_code_model: let transformers run code that comes with a checkpoint.
        progress: False shows none; by default it is shown as two live lines in a terminal, and elsewhere as a line
            every ten seconds at most. True shows what the run will need without a terminal, too.
        others: arguments of llm-compressor's ``oneshot``: each is taken, with a warning if it has no meaning here, or
            refused with the way out; see :data:`bitpress.session.foreign.ARGUMENTS`.

    Returns:
        The model, with the dequantized weights; ``save_pretrained`` writes the compressed checkpoint. Of a streamed run
        the model without weights: they are in ``output_dir``.

    Raises:
        BitpressError: what is wrong, where, and the way out; nothing has been changed or written.
        TypeError: an argument that nobody has.
    """
    take_arguments(others, [name for name in locals() if name != "others"])
    dataset = dataset if dataset_path is None else dataset_path
    pipeline = None if pipeline == "independent" else pipeline
    if recipe is None:
        raise BitpressError("oneshot needs a recipe: modifiers, a YAML file, or the name of a shipped recipe.")
    if isinstance(model, nn.Module) and device is not None:
        raise BitpressError("device= is for a model that is given by its path: move the module itself there.")
    place, name = find_device(device), _name_of(model)
    steps = Recipe.of(recipe, recipe_args)
    output = _Destination(output_dir, save_compressed, format, overwrite, max_shard_size)
    output.check()
    writing = next((m.writes for m in steps.modifiers if m.writes is not None), None)
    reads = dataset is not None or writing is not None
    if tokenizer is None and processor is None and (not isinstance(model, nn.Module) or reads):
        tokenizer = _find_tokenizer(model, trust_remote_code_model)
    tokenizer = _loaded("AutoTokenizer", tokenizer, trust_remote_code_model)
    processor = _loaded("AutoProcessor", processor, trust_remote_code_model)
    options: dict[str, Any] = {
        "pipeline": pipeline,
        "sequential_targets": sequential_targets,
        "seed": seed,
        "moe_calibrate_all_experts": moe_calibrate_all_experts,
        "moe_min_tokens": moe_min_tokens,
        "activations": activations,
    }

    text_tokenizer = tokenizer if tokenizer is not None else getattr(processor, "tokenizer", processor)

    def read_data(of: nn.Module) -> CalibrationData | None:
        given = None if dataset is None else read_dataset(of)
        return given if writing is None else with_generated(given, of, writing, text_tokenizer, seed)

    def read_dataset(of: nn.Module) -> CalibrationData:
        return prepare(
            dataset,
            tokenizer=text_tokenizer,
            num_calibration_samples=num_calibration_samples,
            max_seq_length=max_seq_length,
            batch_size=batch_size,
            text_column=text_column,
            splits=splits,
            shuffle_calibration_samples=shuffle_calibration_samples,
            seed=seed,
            concatenate_data=concatenate_data,
            dataset_config_name=dataset_config_name,
            model=of,
        )

    shown = progress if current().is_first else False
    if stream is not False:
        streamed = _start_on_disk(
            model, steps, output, {**options, "device": place}, read_data, trust_remote_code_model, must=stream is True,
            show=shown,
        )  # fmt: skip
        if streamed is not None:
            path, companions = output.check(), Companions(steps.to_yaml(), processor or tokenizer, page=page)
            with progress_display(**_figures(streamed), show=shown) as on_progress:
                between = output.between(path)
                streamed.write(
                    between, companions, on_progress,
                    lambda known: replace(known, report=summarize(streamed, streamed.data, name)),
                    resume=resume, ends_in=path,
                )  # fmt: skip
            output.convert(between, path)
            return streamed.model
    if not isinstance(model, nn.Module):
        model = move(load_named(model, trust_remote_code=trust_remote_code_model), place, stated=device is not None)
    output.check(needed=parameters_bytes(model))
    session = Session(model, steps, **options)
    _started(session, read_data, output, shown)
    with progress_display(**_figures(session), show=shown) as on_progress:
        session.run(on_progress)
        on_progress(Progress(len(session.state.blocks), len(session.state.blocks), "the model", "write"))
        session.finalize()
        report = summarize(session, session.data, name)
        bind_save_pretrained(model, Companions(steps.to_yaml(), processor or tokenizer, report, page))
        output.write(model)
    return model


@dataclass(frozen=True)
class _Destination:
    """Where the checkpoint goes, if it is written, and how."""

    directory: str | os.PathLike[str] | None
    compressed: bool
    format: str
    overwrite: bool
    max_shard_size: int | str

    def check(self, needed: int = 0) -> Path:
        """See :func:`check_destination`; where nothing is written all is well."""
        check_format(self.format)
        if self.format != COMPRESSED and (self.directory is None or not self.compressed):
            raise BitpressError(
                f"format={self.format!r} is of output_dir, and of compressed weights: see bitpress.save."
            )
        if self.directory is None:
            return Path()
        if not current().is_first:
            return Path(self.directory)
        return check_destination(self.directory, overwrite=self.overwrite, needed=needed)

    def write(self, model: nn.Module) -> None:
        if self.directory is None or not current().is_first:
            return
        sharding = {"max_shard_size": self.max_shard_size} if hasattr(model, "save_pretrained") else {}
        save(
            model,
            self.directory,
            save_compressed=self.compressed,
            format=self.format,
            overwrite=self.overwrite,
            **sharding,
        )

    def check_fits(self, session: Session) -> None:
        """See :func:`check_fits`."""
        if self.format != COMPRESSED:
            check_fits(self.format, session.model, session.state.schemes)

    def between(self, path: Path) -> Path:
        """Where a streamed run writes: ``path``, or beside it what is made into another format then."""
        return path if self.format == COMPRESSED else path.with_name(f".{path.name}.{COMPRESSED}")

    def convert(self, between: Path, path: Path) -> None:
        """Make the format of what a streamed run has written, if it is another."""
        if between == path or not current().is_first:
            return
        sharding = self.max_shard_size
        convert(between, path, format=self.format, overwrite=self.overwrite, max_shard_size=sharding)
        shutil.rmtree(between)


def _start_on_disk(
    model: Any,
    steps: Recipe,
    output: _Destination,
    options: dict[str, Any],
    read_data: Callable[[nn.Module], CalibrationData | None],
    trust_remote_code: bool,
    *,
    must: bool,
    show: bool | None,
) -> OnDiskSession | None:
    """A session, ready to run, of a model that stays on the disk; None if it has to be loaded and ``must`` not stay.

    Raises:
        BitpressError: it must stay there, and cannot; or what :class:`Session` refuses.
    """
    possible = not isinstance(model, nn.Module) and output.directory is not None and output.compressed
    ways = WAYS.get(options["pipeline"], ())
    if not possible or not ways:
        if must:
            raise BitpressError(
                "stream=True needs the path or hub id of a model, output_dir, save_compressed=True and the sequential "
                "or datafree pipeline."
            )
        return None
    options = {**options, "max_shard_size": output.max_shard_size, "check_room": output.check}
    try:
        source, ways = _open(model, ways, trust_remote_code)
        for way in ways[:-1]:
            with suppress(CannotStreamError):
                return _started(way(source, steps, **options), read_data, output, show)
        return _started(ways[-1](source, steps, **options), read_data, output, show)
    except CannotStreamError as error:
        if must:
            raise
        logger.info("%s The model is loaded as a whole.", error)
        return None


def _open(
    model: str | os.PathLike[str], ways: tuple[type[OnDiskSession], ...], trust_remote_code: bool
) -> tuple[Source, tuple[type[OnDiskSession], ...]]:
    """The model on the disk, and the ways that are open to it."""
    try:
        return open_source(model, trust_remote_code=trust_remote_code), ways
    except UnknownArchitectureError:
        if TensorwiseSession not in ways:
            raise
        return open_by_names(model), (TensorwiseSession,)


def _started(
    session: AnySession,
    read_data: Callable[[nn.Module], CalibrationData | None],
    output: _Destination,
    show: bool | None,
) -> AnySession:
    with preparing(show=show):
        session.start(read_data)
    output.check_fits(session)
    return session


def _figures(session: Session) -> dict[str, Any]:
    """What the display of progress says of a session that is ready to run."""
    return {
        "total": len(session.state.blocks),
        "needs": session.needs.lines(),
        "tokens": session.data.tokens if session.data else 0,
        "device": str(session.device),
    }


def _loaded(kind: str, given: Any, trust_remote_code: bool, **options: Any) -> Any:
    """What the user gave, or what it names."""
    if not _is_name(given):
        return given
    import transformers  # noqa: PLC0415

    place, file = split_gguf(given)
    try:
        return getattr(transformers, kind).from_pretrained(
            place, trust_remote_code=trust_remote_code, **file, **options
        )
    except (OSError, ValueError) as error:
        raise BitpressError(f"{kind} finds nothing in {str(given)!r}: {error}") from error


def _find_tokenizer(model: nn.Module | str | os.PathLike[str], trust_remote_code: bool) -> Any:
    """The tokenizer beside a model, or beside what it was loaded from if that is on this machine; None without one."""
    in_memory = isinstance(model, nn.Module)
    source = getattr(getattr(model, "config", None), "_name_or_path", "") if in_memory else model
    if not source:
        return None
    try:
        return _loaded("AutoTokenizer", source, trust_remote_code, **({"local_files_only": True} if in_memory else {}))
    except Exception as error:  # whatever a tokenizer's own code lacks: the data may need none
        logger.info("%s", error)
        return None


def _name_of(model: Any) -> str:
    """What the report calls the model."""
    return os.fspath(model) if _is_name(model) else str(getattr(getattr(model, "config", None), "name_or_path", ""))


def _is_name(given: Any) -> bool:
    return isinstance(given, (str, os.PathLike))
