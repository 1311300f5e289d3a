"""An architecture that no library knows: its mappings found, stated by you, and a wrong one refused.

A small network of gated blocks learns handwritten digits. AWQ needs to know which layer absorbs a scale for which:
bitpress finds out by running a block, you may state it (AWQMapping), and what you state is tried before it is used.

    pip install "bitpress[examples]"
    python examples/custom_architecture.py
"""

import copy

import torch
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from bitpress import AWQMapping, AWQModifier, BitpressError, QuantizationModifier, evaluate, find_mappings, oneshot
from bitpress.quantization import QuantizationArgs, QuantizationScheme


class GatedBlock(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, hidden)
        self.value = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.out(F.gelu(self.gate(h)) * self.value(h))


class DigitReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(GatedBlock(64, 128) for _ in range(3))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


# Dividing the outputs of the first by a scale, and multiplying the inputs of the others by it, changes nothing.
MAPPINGS = [
    AWQMapping("re:.*norm$", ["re:.*gate$", "re:.*value$"]),
    AWQMapping("re:.*value$", ["re:.*out$"]),
]
# The gate goes to `out`, too, but through GELU: a scale does not come out of that as it went in.
WRONG = AWQMapping("re:.*gate$", ["re:.*out$"])

THREE_BITS = QuantizationModifier(
    ignore=["head"],
    scheme=QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=3, group_size=32)),
)


def main() -> None:
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(y))
    seen, held_out = order[:1400], order[1400:]
    model = train(DigitReader(), x[seen], y[seen])

    print("What bitpress finds by itself:")
    found = find_mappings(model, x[seen[:64]], ignore=["head"])
    Console().print(found)
    print(found.as_code())

    print("What it says of a wrong mapping:")
    try:
        oneshot(copy.deepcopy(model), x[seen], [AWQModifier(mappings=[WRONG]), THREE_BITS])
    except BitpressError as error:
        print(f"  {error}\n")

    print(f"Digits that it has not seen, 3 bits (in full precision: {right(model, x[held_out], y[held_out])}):")
    for name, recipe in (("rounded", THREE_BITS), ("AWQ", [AWQModifier(mappings=MAPPINGS, clip=False), THREE_BITS])):
        compressed = oneshot(copy.deepcopy(model), x[seen], recipe)
        outputs = evaluate(compressed, x[held_out], original=model).outputs
        score = right(compressed, x[held_out], y[held_out])
        print(f"  {name:<8} {score} right, outputs are off by {outputs.relative_error:.1%}")

    print("\nThe squared error at the outputs of each mapping's balance layers:")
    for each in compressed.bitpress.report["mappings"]:
        won = 1 - each["error"] / each["error_before"]
        print(f"  {each['smooth_layer']:<15} ({each['source']}) {won:.0%} less")


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int = 20) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def right(model: nn.Module, x: Tensor, y: Tensor) -> str:
    return f"{float((model(x).argmax(1) == y).float().mean()):.1%}"


if __name__ == "__main__":
    main()
