"""Peak memory and time of streamed compression, on a Llama of random weights that is bigger than what it may take.

Each line is a process of its own; peak memory is all that it ever held (VmHWM): interpreter, libraries and file pages
included; on a GPU also what torch ever took there. The checkpoint is made once, block by block, in ``--directory``.

On a GPU, a Llama of 8 billion weights: --shape 8b --layers 32 --samples 256 --device cuda
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

# Vocabulary, width, width of the MLP, heads, heads of keys
SHAPES = {"2048": (32000, 2048, 5632, 32, 8), "8b": (128256, 4096, 14336, 32, 8)}


def make(directory: Path, layers: int, shape: str = "2048") -> Path:
    """A bfloat16 Llama checkpoint of random weights, in shards of a block each."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    vocabulary, width, mlp, heads, groups = SHAPES[shape]
    path = directory / f"llama-{layers}x{width}"
    if (path / "model.safetensors.index.json").is_file():
        return path
    path.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(path)
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()

    def block(i: int) -> dict[str, torch.Tensor]:
        at = f"model.layers.{i}."
        keys = width // heads * groups
        shapes = {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width),
            "mlp.down_proj": (width, mlp),
        }  # fmt: skip
        norms = {f"{at}{n}.weight": 1 + weight(width) for n in ("input_layernorm", "post_attention_layernorm")}
        return {**{f"{at}{n}.weight": weight(*shape) for n, shape in shapes.items()}, **norms}

    names = {}
    for i in range(layers + 1):
        file = f"model-{i + 1:05d}-of-{layers + 1:05d}.safetensors"
        tensors = (
            block(i)
            if i < layers
            else {
                "model.embed_tokens.weight": weight(vocabulary, width),
                "model.norm.weight": 1 + weight(width),
                "lm_head.weight": weight(vocabulary, width),
            }
        )
        save_file(tensors, path / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return path


def run(args: argparse.Namespace) -> None:
    """Compress, and print one line of figures."""
    began = time.perf_counter()
    import torch

    torch.set_num_threads(args.threads)
    from bitpress import oneshot
    from bitpress.modifiers import AWQModifier, QuantizationModifier

    loaded = time.perf_counter() - began
    ids = torch.randint(
        0, SHAPES[args.shape][0], (args.samples, args.length), generator=torch.Generator().manual_seed(1)
    )
    recipe = [AWQModifier(), QuantizationModifier(scheme="W4A16_ASYM", ignore=["lm_head"])]
    began = time.perf_counter()
    model = oneshot(
        str(args.model), ids.tolist(), recipe, output_dir=args.output, stream=args.run == "streamed",
        overwrite=True, resume=False,
        max_seq_length=args.length, num_calibration_samples=args.samples, progress=False, device=args.device,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    figures = {"run": args.run, "layers": model.config.num_hidden_layers, "threads": args.threads}
    figures |= {"seconds": round(seconds, 1), "import_seconds": round(loaded, 1)}
    figures["peak_gb"] = round(int(status["VmHWM"].split()[0]) * 1024 / 1e9, 3)
    figures |= {"device": args.device, "samples": args.samples, "length": args.length}
    if args.device != "cpu":
        figures["device_peak_gb"] = round(torch.cuda.max_memory_reserved(args.device) / 1e9, 3)
        figures["device"] = torch.cuda.get_device_name(args.device)
    print("RESULT", json.dumps({**figures, "phases": model.bitpress.report["seconds"]}), flush=True)


def main() -> None:
    """Run one line, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="with room for the checkpoints")
    parser.add_argument("--layers", type=int, nargs="*", default=[24, 48])
    parser.add_argument("--shape", choices=SHAPES, default="2048")
    parser.add_argument("--kinds", nargs="*", choices=["streamed", "memory"], help="by default both, of the first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("BENCH_THREADS", "2")))
    parser.add_argument("--run", choices=["streamed", "memory"], help="only this, in this process")
    parser.add_argument("--model", type=Path, help="for --run")
    parser.add_argument("--output", type=Path, help="for --run")
    args = parser.parse_args()
    if args.run:
        run(args)
        return
    for layers in args.layers:
        model = make(args.directory, layers, args.shape)
        kinds = args.kinds or (["streamed", "memory"] if layers == args.layers[0] else ["streamed"])
        for kind in kinds:
            output = args.directory / f"{model.name}-{kind}"
            options = ["--samples", args.samples, "--length", args.length, "--threads", args.threads]
            options += ["--shape", args.shape, "--device", args.device]
            command = [sys.executable, __file__, "--directory", args.directory, "--run", kind, "--model", model]
            subprocess.run([str(part) for part in [*command, "--output", output, *options]], check=True)
        if len(kinds) > 1:
            outputs = [args.directory / f"{model.name}-{kind}" for kind in kinds]
            files = sorted(file.name for file in outputs[1].glob("*.safetensors"))
            same = all((outputs[0] / f).read_bytes() == (outputs[1] / f).read_bytes() for f in files)
            print("RESULT", json.dumps({"identical": same, "files": files}), flush=True)


if __name__ == "__main__":
    main()
