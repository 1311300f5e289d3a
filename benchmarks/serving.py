"""Speed and memory of packed models, against bfloat16 and against the compressed checkpoint in transformers.

SmolLM2-135M, and a Llama of random weights whose bytes decide; 4-bit asymmetric groups, rounded to nearest, the head
dense. All ways are in one process and take turns; a ratio is the median of those of the turns. transformers unpacks a
compressed checkpoint in its first forward: that one is timed, and what follows.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from memory import make as make_llama
from task import load_smollm2, report
from torch import nn
from transformers import AutoModelForCausalLM

import bitpress
from bitpress import oneshot
from bitpress.checkpoints import attached_layers
from bitpress.modifiers import QuantizationModifier
from bitpress.quantization import QuantizationArgs, QuantizationScheme

MODELS = ("smollm2", "llama")


def make(name: str, args: argparse.Namespace) -> tuple[Path, Path]:
    """The bfloat16 checkpoint and the compressed one; made the first time."""
    if name == "llama":
        source = make_llama(args.directory, args.layers)
    elif not (source := args.directory / "smollm2-bfloat16").exists():
        load_smollm2(torch.bfloat16)[0].save_pretrained(source)
    output = args.directory / f"{source.name}-g{args.group}"
    if not output.exists():
        weights = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=args.group)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        recipe = [QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])]
        oneshot(source, None, recipe, output_dir=output, progress=False)
    return source, output


def ways(source: Path, output: Path) -> dict[str, Callable[[], nn.Module]]:
    """How each contestant is loaded."""
    return {
        "bfloat16": lambda: AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16),
        "packed": lambda: bitpress.load(output),
        "transformers": lambda: AutoModelForCausalLM.from_pretrained(output, dtype=torch.bfloat16),
    }


def resident(model: nn.Module, names: list[str]) -> int:
    """Bytes that the layers hold for their weights."""
    held = {}
    for name in names:
        layer = model.get_submodule(name)
        for kind, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            if kind != "bias":
                held[tensor.untyped_storage().data_ptr()] = tensor.nbytes
    return sum(held.values())


def prompt(model: nn.Module, ids: torch.Tensor) -> tuple[float, object, torch.Tensor]:
    """Seconds of a prompt, with the cache and the next token."""
    began = time.perf_counter()
    given = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    seconds = time.perf_counter() - began
    return seconds, given.past_key_values, given.logits[:, -1:].argmax(-1)


def decode(model: nn.Module, ids: torch.Tensor, count: int) -> float:
    """Seconds of one token, the mean of ``count``."""
    _, cache, token = prompt(model, ids)
    began = time.perf_counter()
    for _ in range(count):
        given = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = given.logits[:, -1:].argmax(-1)
    return (time.perf_counter() - began) / count


def shares(model: nn.Module, ids: torch.Tensor, names: list[str], count: int) -> dict[str, float]:
    """Seconds a token in the quantized layers and in the head; hooks take some themselves."""
    spent = {"layers": 0.0, "head": 0.0}
    began: list[float] = []
    handles = []
    _, cache, token = prompt(model, ids)
    for kind, layer in [*(("layers", model.get_submodule(n)) for n in names), ("head", model.lm_head)]:

        def after(*_: object, kind: str = kind) -> None:
            spent[kind] += time.perf_counter() - began.pop()

        handles.append(layer.register_forward_pre_hook(lambda *_: began.append(time.perf_counter())))
        handles.append(layer.register_forward_hook(after))
    start = time.perf_counter()
    for _ in range(count):
        token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    spent["all"] = time.perf_counter() - start
    for handle in handles:
        handle.remove()
    return {kind: round(seconds / count * 1e3, 2) for kind, seconds in spent.items()}


@torch.no_grad()
def compare(name: str, args: argparse.Namespace) -> None:
    """Print the figures of one model."""
    source, output = make(name, args)
    models, first = {}, {}
    draw = torch.Generator().manual_seed(0)
    for way, load in ways(source, output).items():
        if way not in args.ways:
            continue
        models[way] = load().eval()
        short = torch.randint(3, models[way].config.vocab_size, (1, args.context), generator=draw)
        first[way], *_ = prompt(models[way], short)
        gc.collect()
    long = torch.randint(3, models["bfloat16"].config.vocab_size, (1, args.prompt), generator=draw)
    names = list(attached_layers(models["packed"]))
    row = {"model": name, "group": args.group, "threads": torch.get_num_threads()}
    dense = resident(models["bfloat16"], names)
    for way, model in models.items():
        report(
            **row, way=way, mb=round(resident(model, names) / 1e6, 1), of_dense=round(resident(model, names) / dense, 3)
        )
    times: dict[str, dict[str, list[float]]] = {what: {way: [] for way in models} for what in ("token", "prompt")}
    for _ in range(args.repetitions):
        for way, model in models.items():
            times["token"][way].append(decode(model, short, args.tokens))
            times["prompt"][way].append(prompt(model, long)[0])
    for what, of_way in times.items():
        for way, seconds in of_way.items():
            ratios = [one / other for one, other in zip(of_way["bfloat16"], seconds, strict=True)]
            spread = {"least": round(min(ratios), 2), "greatest": round(max(ratios), 2)}
            milliseconds = round(statistics.median(seconds) * 1e3, 1)
            report(
                **row, what=what, way=way, ms=milliseconds, times_as_fast=round(statistics.median(ratios), 2), **spread
            )
    for way, model in models.items():
        report(
            **row,
            way=way,
            first_forward_ms=round(first[way] * 1e3, 1),
            ms_of_a_token=shares(model, short, names, args.tokens),
        )


def main() -> None:
    """Compare the models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="with room for the checkpoints")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--ways", nargs="*", default=["bfloat16", "packed", "transformers"])
    parser.add_argument("--layers", type=int, default=24, help="of the Llama")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--context", type=int, default=32, help="tokens before those that are decoded")
    parser.add_argument("--tokens", type=int, default=16, help="decoded a turn")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("BENCH_THREADS", "2")))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.directory.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        compare(name, args)


if __name__ == "__main__":
    main()
