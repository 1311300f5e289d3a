"""Recipes, texts and a tokenizer for tests that compress a model from end to end."""

import random

import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bitpress.modifiers import AWQModifier, QuantizationModifier
from bitpress.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy

WORDS = [f"w{i}" for i in range(tiny.VOCABULARY - 3)]


def scheme(
    bits=4, symmetric=False, strategy=QuantizationStrategy.GROUP, targets=("Linear",), group_size=32
) -> QuantizationScheme:
    return QuantizationScheme(
        targets=list(targets),
        weights=QuantizationArgs(
            num_bits=bits,
            type="int",
            dynamic=False,
            symmetric=symmetric,
            strategy=strategy,
            group_size=group_size if strategy == QuantizationStrategy.GROUP else None,
        ),
    )


def rtn(ignore=("lm_head",), **options) -> list:
    """Round-to-nearest: needs no data."""
    return [QuantizationModifier(ignore=list(ignore), config_groups={"group_0": scheme(**options)})]


def awq(ignore=("lm_head",), mappings=None, **options) -> list:
    """The design's recipe."""
    groups = scheme(**options).weights
    stated = {} if mappings is None else {"mappings": mappings}
    return [
        AWQModifier(bits=groups.num_bits, symmetric=groups.symmetric, **stated),
        *rtn(ignore, **options),
    ]


def sentences(count=12, length=40, seed=0) -> list[str]:
    draw = random.Random(seed)  # noqa: S311
    return [" ".join(draw.choices(WORDS, k=length)) for _ in range(count)]


def token_ids(count=6, length=24, seed=0) -> list[list[int]]:
    draw = random.Random(seed)  # noqa: S311
    return [[draw.randrange(3, tiny.VOCABULARY) for _ in range(length)] for _ in range(count)]


def tokenizer() -> PreTrainedTokenizerFast:
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    words = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    plain = Tokenizer(models.WordLevel(words))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, **special)
