"""How good a model is, and how like the original: perplexity, agreement, multiple choice, lm-eval's tasks.

`subjects` opens what is evaluated, `windows` cuts texts, `scores` turns logits into figures of tokens; `perplexity` and
`agreement` sum those up, `choices` answers questions, `outputs` compares any two modules, `harness` calls lm-eval.
"""

from bitpress.evaluation.evaluation import Evaluation

__all__ = ["Evaluation"]
