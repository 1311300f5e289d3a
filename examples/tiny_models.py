"""Tiny language models, trained on a novel in seconds: to try the examples without a download.

    python examples/tiny_models.py /tmp/tiny
    python examples/llama_awq.py /tmp/tiny/llama

`llama` and `moe` (a mixture of experts) predict the next token, `bert` the tokens that are masked. They speak broken
Austen, but their figures mean something: they have learned, and as in large models a few channels carry values many
times those of the others, which is what makes quantization hard.
"""

from pathlib import Path

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

NOVEL = Path(__file__).resolve().parent.parent / "benchmarks" / "data" / "emma.txt"
VOCABULARY, ROWS, LENGTH = 512, 8, 64
MASK = 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
LOUD_CHANNELS, LOUDNESS = 2, 30.0


def main(output_dir: Path, steps: int = 400) -> None:
    """Train a tiny llama, moe and bert, and save them with their tokenizer in OUTPUT_DIR."""
    text = NOVEL.read_text()[:400_000]
    tokenizer = train_tokenizer(text)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    for kind in ("llama", "moe", "bert"):
        torch.manual_seed(0)
        model = build(kind)
        loss = train(model, ids, steps)
        if kind != "bert":
            make_outliers(model)
        model.eval().save_pretrained(output_dir / kind)
        tokenizer.save_pretrained(output_dir / kind)
        print(f"{output_dir / kind}: {model.num_parameters():,} parameters, {loss:.2f} nats a token")


def build(kind: str) -> PreTrainedModel:
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**SIZES))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-pair encoding, with the first three ids for an end, padding and a mask."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "<end>", "pad_token": "<pad>", "mask_token": "<mask>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text[:100_000]], trainer)
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, model_input_names=inputs, **special
    )  # fmt: skip


def train(model: PreTrainedModel, ids: Tensor, steps: int) -> float:
    """Adam on random pieces of the text; returns the mean loss of the last steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (ROWS, 1))
        x = ids[starts + torch.arange(LENGTH)]
        labels = x.clone()
        if isinstance(model, BertForMaskedLM):
            hidden = torch.rand(x.shape) < 0.15
            x, labels = x.masked_fill(hidden, MASK), labels.masked_fill(~hidden, -100)
        loss = model(input_ids=x, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return sum(losses[-20:]) / len(losses[-20:])


@torch.no_grad()
def make_outliers(model: PreTrainedModel) -> None:
    """Make some channels behind each norm loud, and the weights that read them as much smaller: nothing changes."""
    for layer in model.model.layers:
        for norm, readers in ((layer.input_layernorm, layer.self_attn), (layer.post_attention_layernorm, layer.mlp)):
            loud = torch.randperm(SIZES["hidden_size"])[:LOUD_CHANNELS]
            norm.weight[loud] *= LOUDNESS
            for name, weight in readers.named_parameters():
                if weight.shape[-1] == SIZES["hidden_size"] and "o_proj" not in name and "down_proj" not in name:
                    weight[..., loud] /= LOUDNESS


if __name__ == "__main__":
    typer.run(main)
