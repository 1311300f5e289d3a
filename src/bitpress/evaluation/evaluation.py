"""What an evaluation found, for people and for programs."""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from bitpress.evaluation.agreement import Agreement
from bitpress.evaluation.choices import Accuracy
from bitpress.evaluation.continuations import Continuation
from bitpress.evaluation.harness import Results
from bitpress.evaluation.outputs import OutputAgreement
from bitpress.evaluation.perplexity import Perplexity
from bitpress.evaluation.tokens import TokenScores, WorstToken


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How good a model is; what was not asked for is None.

    Attributes:
        model: its path, hub id, or class.
        original: the same of what it was compared with.
        perplexity: on the dataset's texts.
        agreement: with the original's predictions, on the same.
        outputs: agreement with the original's outputs, of a module that does not predict tokens.
        choices: accuracy on the questions.
        tasks: figures of lm-eval's tasks.
        original_tasks: the original's.
        continuations: of the prompts.
        tokens: the figures of each scored token; not in :meth:`to_dict`.
    """

    model: str
    original: str | None = None
    perplexity: Perplexity | None = None
    agreement: Agreement | None = None
    outputs: OutputAgreement | None = None
    choices: Accuracy | None = None
    tasks: Results | None = None
    original_tasks: Results | None = None
    continuations: tuple[Continuation, ...] | None = None
    tokens: TokenScores | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: without what is None; numbers that are infinite or none at all are None."""
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "tokens"}
        if self.continuations is not None:
            parts["continuations"] = [asdict(each) for each in self.continuations]
        return {
            name: _finite(asdict(part) if hasattr(part, "__dataclass_fields__") else part)
            for name, part in parts.items()
            if part is not None
        }

    def lines(self) -> list[str]:
        """For people."""
        found = [self.model if self.original is None else f"{self.model}, beside {self.original}"]
        found += _of_perplexity(self.perplexity) if self.perplexity else []
        found += _of_agreement(self.agreement) if self.agreement else []
        found += _of_outputs(self.outputs) if self.outputs else []
        found += _of_choices(self.choices) if self.choices else []
        found += [line for each in self.continuations or () for line in _of_continuation(each)]
        for task, figures in (self.tasks or {}).items():
            beside = (self.original_tasks or {}).get(task, {})
            found += [
                _line(f"{task} {name.removesuffix(',none')}", f"{value:.4f}" + _beside(beside.get(name)))
                for name, value in figures.items()
            ]
        return found


def _line(name: str, value: str) -> str:
    return f"  {name:<24} {value}"


def _beside(original: float | None) -> str:
    return "" if original is None else f", the original {original:.4f}"


def _of_perplexity(found: Perplexity) -> list[str]:
    spelled = "" if found.bits_per_byte is None else f", {found.bits_per_byte:.4f} bits a byte"
    error = found.perplexity * found.standard_error
    return [
        _line("perplexity", f"{found.perplexity:.4f} ± {error:.4f}"),
        _line("", f"{found.nll:.4f} nats a token{spelled}"),
        _line("", f"{found.tokens} tokens of {found.windows} windows of {found.max_seq_length} at most"),
    ]


def _of_agreement(found: Agreement) -> list[str]:
    lines = [
        _line("original's perplexity", f"{found.original_perplexity:.4f}"),
        _line("ratio", f"{found.perplexity_ratio:.5f} ± {found.ratio_standard_error:.5f}"),
        _line("KL divergence", f"{found.divergence:.6f} ± {found.standard_error:.6f} nats a token"),
        _line("", f"median {found.median:.6f}, 99% {found.percentile_99:.6f}, maximum {found.maximum:.6f}"),
        _line("same token on top", f"{found.top1:.2%}"),
    ]
    if found.worst and found.maximum > 0:
        lines.append("  Where they differ most:")
        lines += [line for each in found.worst for line in _of_token(each)]
    return lines


def _of_token(each: WorstToken) -> list[str]:
    said = {name: _quoted(getattr(each, name)) for name in ("context", "token", "original_says", "model_says")}
    return [
        f"    {each.divergence:8.4f}  {said['context']} → {said['token']}",
        f"    {'':8}  the original says {said['original_says']}, the model {said['model_says']}",
    ]


def _of_continuation(each: Continuation) -> list[str]:
    lines = [_line("prompt", _quoted(each.prompt)), _line("", f"the model says {_quoted(each.model)}")]
    return lines if each.original is None else [*lines, _line("", f"the original says {_quoted(each.original)}")]


def _of_outputs(found: OutputAgreement) -> list[str]:
    lines = [
        _line("relative error", f"{found.relative_error:.6f}"),
        _line("cosine", f"{found.cosine:.6f}"),
        _line("", f"{found.values} values of {found.samples} samples"),
    ]
    if found.top1 is not None and found.divergence is not None:
        lines.append(_line("same class on top", f"{found.top1:.2%}"))
        lines.append(_line("KL divergence", f"{found.divergence:.6f} nats a row"))
    return lines


def _of_choices(found: Accuracy) -> list[str]:
    share = f"{found.accuracy:.4f} ± {found.standard_error:.4f}{_beside(found.original_accuracy)}"
    norm = f"{found.accuracy_norm:.4f} ± {found.norm_standard_error:.4f}{_beside(found.original_accuracy_norm)}"
    lines = [_line("accuracy", share), _line("accuracy by length", norm), _line("", f"{found.questions} questions")]
    if found.same_answers is not None:
        lines.append(_line("same answers", f"{found.same_answers:.2%}"))
    return lines


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value
