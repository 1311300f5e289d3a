"""llm-compressor on the shared task, in an environment of its own (see docs/benchmarks.md)."""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from task import arguments, figures, start


def main() -> None:
    """Compress, and print one line of figures."""
    parser = arguments(__doc__)
    parser.add_argument("--algorithm", default="awq", choices=["rtn", "awq", "gptq", "awq+gptq"])
    args = parser.parse_args()
    # On a machine without an accelerator the peer stops at this otherwise.
    torch.Tensor.pin_memory = lambda self, *_, **__: self
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    model, tokenizer, tokens = start(args)
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    weights = QuantizationArgs(
        num_bits=args.bits, type="int", symmetric=args.symmetric, strategy="group", group_size=args.group
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    scheme = {"config_groups": groups, "ignore": ["lm_head"]}
    quantize = (GPTQModifier if "gptq" in args.algorithm else QuantizationModifier)(**scheme)
    recipe = [AWQModifier(), quantize] if "awq" in args.algorithm else [quantize]
    began = time.perf_counter()
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        max_seq_length=args.length,
        num_calibration_samples=args.samples,
    )
    seconds = time.perf_counter() - began
    figures(args, model, tokenizer, seconds, tool="llm-compressor", algorithm=args.algorithm)


if __name__ == "__main__":
    main()
