"""oneshot: compress a model by a recipe, in one call."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from bitpress.checkpoints import bind_save_pretrained, check_destination, save
from bitpress.checkpoints.pretrained import load_named
from bitpress.checkpoints.saving import Companions
from bitpress.errors import BitpressError
from bitpress.ondisk import compress_on_disk
from bitpress.pipelines.data import CalibrationData, prepare
from bitpress.pipelines.experts import MIN_TOKENS
from bitpress.report.progress import progress_display
from bitpress.report.summary import summarize
from bitpress.session import Recipe, Session
from bitpress.session.recipe import RecipeLike
from bitpress.session.session import parameters_bytes

logger = logging.getLogger(__name__)


def oneshot(  # noqa: PLR0913
    model: nn.Module | str | os.PathLike[str],
    dataset: Any = None,
    recipe: RecipeLike | None = None,
    *,
    recipe_args: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    num_calibration_samples: int = 512,
    max_seq_length: int | None = None,
    batch_size: int = 1,
    text_column: str = "text",
    splits: Any = None,
    shuffle_calibration_samples: bool = True,
    concatenate_data: bool = False,
    seed: int = 42,
    pipeline: str | None = None,
    sequential_targets: Sequence[str] | None = None,
    moe_calibrate_all_experts: bool = True,
    moe_min_tokens: int = MIN_TOKENS,
    output_dir: str | os.PathLike[str] | None = None,
    save_compressed: bool = True,
    overwrite: bool = False,
    resume: bool = True,
    trust_remote_code_model: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """Compress a model by a recipe.

    Everything is checked before anything is computed, and the model is changed only when all is solved: an error, or
    a keyboard interrupt, leaves it as it was.

    Args:
        model: a module, changed in place; or the path or hub id of a transformers model.
        dataset: calibration data: strings, lists of token ids, a ``datasets`` dataset (text, messages or input_ids), a
            hub name, a .txt, .jsonl, .parquet or .csv path, a DataLoader, or an iterable of what the model's forward
            takes. Not needed by recipes without statistics.
        recipe: modifiers in order, a YAML file or text, or the name of a shipped recipe.
        recipe_args: values for the arguments of a YAML recipe: ``{"group_size": 64}``.
        tokenizer: for text, or its path; taken from ``model`` where that is a path. Saved beside the model.
        processor: of a multimodal model, or its path; its tokenizer is used for text. Saved beside the model.
        num_calibration_samples: sequences (rows) that are used at most.
        max_seq_length: tokens per sequence at most; by default the tokenizer's limit, or 2048.
        batch_size: sequences that run together. 1 needs no padding; padding is left out of all statistics.
        text_column: of the dataset.
        splits: of the dataset, as ``datasets.load_dataset`` names them.
        shuffle_calibration_samples: draw the samples at random, by ``seed``, instead of from the start.
        concatenate_data: join the texts and cut them to full sequences of ``max_seq_length``.
        seed: of everything random.
        pipeline: "sequential", "basic" or "datafree"; by default what the recipe and the model need. With "datafree", a
            path and an ``output_dir`` the weights go from file to file, and no model is built where none is needed.
        sequential_targets: names, class names or ``re:`` patterns of the blocks; by default they are found.
        moe_calibrate_all_experts: let every expert of a mixture see every calibration token; False shows each expert
            those that the router sends it.
        moe_min_tokens: an expert that saw fewer tokens is solved from what all experts of its layer saw, and listed in
            the report.
        output_dir: save there, with the recipe and the tokenizer.
        save_compressed: packed weights in ``output_dir``; False writes dense ones.
        overwrite: replace a model that is in ``output_dir``.
        resume: where weights go from file to file, go on with what a run that was killed has left; False starts over.
        trust_remote_code_model: let transformers run code that comes with a checkpoint.
        progress: show it in the terminal; by default if there is one.

    Returns:
        The model, with the dequantized weights; ``save_pretrained`` writes the compressed checkpoint. Where no model
        was built, its structure on the meta device: load ``output_dir`` for more.

    Raises:
        BitpressError: what is wrong, where, and the way out; nothing has been changed or written.
    """
    if recipe is None:
        raise BitpressError("oneshot needs a recipe: modifiers, a YAML file, or the name of a shipped recipe.")
    steps = Recipe.of(recipe, recipe_args)
    if output_dir is not None:
        check_destination(output_dir, overwrite=overwrite)
    if not isinstance(model, nn.Module):
        if tokenizer is None and processor is None:
            tokenizer = _find_tokenizer(model, trust_remote_code_model)
        if pipeline == "datafree" and output_dir is not None and save_compressed:
            beside = _loaded("AutoProcessor", processor, trust_remote_code_model) or _loaded(
                "AutoTokenizer", tokenizer, trust_remote_code_model
            )
            skeleton = compress_on_disk(
                model,
                steps,
                output_dir,
                beside=beside,
                sequential_targets=sequential_targets,
                trust_remote_code=trust_remote_code_model,
                resume=resume,
                progress=progress,
            )
            if skeleton is not None:
                return skeleton
        model = load_named(model, trust_remote_code=trust_remote_code_model)
    tokenizer = _loaded("AutoTokenizer", tokenizer, trust_remote_code_model)
    processor = _loaded("AutoProcessor", processor, trust_remote_code_model)
    if output_dir is not None:
        check_destination(output_dir, overwrite=overwrite, needed=parameters_bytes(model))
    session = Session(
        model,
        steps,
        pipeline=pipeline,
        sequential_targets=sequential_targets,
        seed=seed,
        moe_calibrate_all_experts=moe_calibrate_all_experts,
        moe_min_tokens=moe_min_tokens,
    )
    session.check()
    data: CalibrationData | None = None
    if dataset is not None:
        data = prepare(
            dataset,
            tokenizer=tokenizer if tokenizer is not None else getattr(processor, "tokenizer", processor),
            num_calibration_samples=num_calibration_samples,
            max_seq_length=max_seq_length,
            batch_size=batch_size,
            text_column=text_column,
            splits=splits,
            shuffle_calibration_samples=shuffle_calibration_samples,
            seed=seed,
            concatenate_data=concatenate_data,
            model=model,
        )
    session.initialize(data)
    with progress_display(len(session.state.blocks), show=progress) as on_progress:
        session.run(on_progress)
    session.finalize()
    report = summarize(session, data)
    bind_save_pretrained(model, Companions(steps.to_yaml(), processor or tokenizer, report))
    if output_dir is not None:
        save(model, output_dir, save_compressed=save_compressed, overwrite=overwrite)
    return model


def _loaded(kind: str, given: Any, trust_remote_code: bool) -> Any:
    """What the user gave, or what it names."""
    if not _is_name(given):
        return given
    import transformers  # noqa: PLC0415

    try:
        return getattr(transformers, kind).from_pretrained(os.fspath(given), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise BitpressError(f"{kind} finds nothing in {str(given)!r}: {error}") from error


def _find_tokenizer(source: str | os.PathLike[str], trust_remote_code: bool) -> Any:
    """The tokenizer beside a model, or None."""
    try:
        return _loaded("AutoTokenizer", source, trust_remote_code)
    except BitpressError as error:
        logger.info("%s", error)
        return None


def _is_name(given: Any) -> bool:
    return isinstance(given, (str, os.PathLike))
