"""Datasets of the hub by the short names that llm-compressor has for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Known:
    """One dataset.

    Attributes:
        hub: its name on the hub.
        config: its configuration, if it has several.
        split: what calibrates where the user does not say.
        text: how a row is written, by its columns; None where the dataset has texts or conversations.
    """

    hub: str
    config: str | None = None
    split: str | None = None
    text: str | None = None

    def with_texts(self, dataset: Any) -> Any:
        """The dataset with a column "text"."""
        text = self.text
        return dataset if text is None else dataset.map(lambda row: {"text": text.format(**row)})


_ULTRACHAT = Known("HuggingFaceH4/ultrachat_200k", split="train_sft")
KNOWN: dict[str, Known] = {
    "c4": Known("allenai/c4", "en"),
    "cnn_dailymail": Known("abisee/cnn_dailymail", "3.0.0", text="{article}\n\n{highlights}"),
    "evolcodealpaca": Known("theblackcat102/evol-codealpaca-v1", text="{instruction}\n\n{output}"),
    "gsm8k": Known("openai/gsm8k", "main", text="{question}\n\n{answer}"),
    "open_platypus": Known("garage-bAInd/Open-Platypus", text="{instruction}\n\n{output}"),
    "ultrachat": _ULTRACHAT,
    "ultrachat_200k": _ULTRACHAT,
    "wikitext": Known("Salesforce/wikitext", "wikitext-2-raw-v1"),
}
