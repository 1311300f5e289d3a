"""The tokenizer of a checkpoint, as GGUF has it."""

import json
import logging
from pathlib import Path
from typing import Any

from bitpress.errors import BitpressError

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How llama.cpp calls a way to split text into words before pairs of bytes are merged, by the pattern it is done by.
_LLAMA3, _QWEN2 = _WORDS % "{1,3}", _WORDS % ""
_PATTERNS = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2"}


def add_vocabulary(writer: Any, directory: Path, size: int) -> None:
    """Give a ``gguf.GGUFWriter`` the tokens, their kinds, merges and special tokens.

    Args:
        writer: the writer.
        directory: of the checkpoint. Without a tokenizer.json the model is written without a tokenizer.
        size: of the model's vocabulary; what the tokenizer lacks is filled up.

    Raises:
        BitpressError: the tokenizer is of a kind that is not written.
    """
    import gguf  # noqa: PLC0415

    file = directory / TOKENIZER_FILE
    if not file.is_file():
        logger.info("%s has no %s: the model is written without a tokenizer.", directory, TOKENIZER_FILE)
        writer.add_tokenizer_model("none")
        return
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    kind = pre_tokenizer(tokenizer)
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for added in tokenizer.get("added_tokens", ()):
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(directory, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer.json splits text.

    Raises:
        BitpressError: it is none of those that are known.
    """
    model, steps = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if model.get("type") == "BPE" and not model.get("byte_fallback"):
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
        pattern = steps[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
        if pattern in _PATTERNS:
            # Llama 3 takes a word that is a token as it is; the others merge it from its bytes all the same.
            whole = bool(model.get("ignore_merges"))
            return "dbrx" if pattern == _LLAMA3 and not whole else _PATTERNS[pattern]
    raise BitpressError(
        f"a tokenizer of the kind {model.get('type')} with {' and '.join(map(str, kinds))} is not written to GGUF: "
        f"known are those of GPT-2, SmolLM, Llama 3 and Qwen 2. Remove {TOKENIZER_FILE} from the source to write the "
        "model alone."
    )
