"""Arguments of llm-compressor's ``oneshot`` that this one has no use for: see :mod:`bitpress.modifiers.foreign`."""

import difflib
from collections.abc import Mapping
from typing import Any

from bitpress.errors import BitpressError
from bitpress.modifiers.foreign import Foreign

_LOADED = "load it with datasets.load_dataset, and pass what that gives as dataset."
_WAITING = "activations= says where batches wait."

ARGUMENTS: Mapping[str, Foreign] = {
    "clear_sparse_session": Foreign("there is no session that lasts.", silent=True),
    "config_name": Foreign("load the model with its config, and pass it.", refused=True),
    "data_collator": Foreign(
        "pass a DataLoader that has it as its collate_fn.", (None, "truncation", "padding"), refused=True
    ),
    "dataloader_num_workers": Foreign("tokens are ready before the first forward.", (None, 0)),
    "log_dir": Foreign('the logger "bitpress" of the standard library takes handlers.'),
    "min_tokens_per_module": Foreign("moe_min_tokens= is the number that an expert must have seen."),
    "model_revision": Foreign(
        "load the model of that revision, and pass it; or what huggingface_hub.snapshot_download gives.",
        (None, "main"),
        refused=True,
    ),
    "overwrite_cache": Foreign("datasets.disable_caching() does it.", (None, False)),
    "pad_to_max_length": Foreign("padding is left out of all statistics.", (None, False)),
    "precision": Foreign("load the model with dtype=, and pass it.", (None, "auto"), refused=True),
    "preprocessing_func": Foreign("dataset.map(function) does it before.", refused=True),
    "preprocessing_num_workers": Foreign("only the samples that are used are tokenized."),
    "propagate_error": Foreign(
        'pipeline="basic" shows each block what the original model gives.', (None, True), refused=True
    ),
    "quantization_aware_calibration": Foreign("it has none there either.", silent=True),
    "raw_kwargs": Foreign(_LOADED, (None, {}), refused=True),
    "remove_columns": Foreign("columns that nobody reads are left out."),
    "sequential_offload_device": Foreign(_WAITING, (None, "cpu")),
    "sequential_prefetch": Foreign(_WAITING, (None, False)),
    "sequential_targets_per_subgraph": Foreign("sequential_targets= states larger blocks.", (None, 1)),
    "stage": Foreign("leave in the recipe the stages that are to run.", refused=True),
    "streaming": Foreign(_LOADED, (None, False), refused=True),
    "tie_word_embeddings": Foreign("untie the model's weights, and pass it.", (None, True), refused=True),
    "tracing_ignore": Foreign("nothing is traced."),
    "use_loss_mask": Foreign("every token counts that is not padding.", (None, False), refused=True),
}


def take_arguments(given: Mapping[str, Any], known: list[str]) -> None:
    """Take arguments of llm-compressor's ``oneshot``.

    Args:
        given: arguments that are not ours.
        known: the names of ours, for suggestions.

    Raises:
        BitpressError: one that asks for what is not done.
        TypeError: one that is nobody's.
    """
    for name, value in given.items():
        if name not in ARGUMENTS:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"oneshot() got an unexpected keyword argument {name!r}{hint}")
        problem = ARGUMENTS[name].take(name, value, "oneshot")
        if problem is not None:
            raise BitpressError(problem)
