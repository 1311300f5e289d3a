"""AWQ on a small network, step by step.

Trains a network on handwritten digits (or on data made up on the spot), quantizes it, and prints what happened: the
weights before and after, how each layer was solved, the errors, the answers, and the bytes.

    pip install "bitpress[examples]"
    python examples/awq.py
    python examples/awq.py --quantization-bits 8 --symmetric
    python examples/awq.py --quantization-bits 4 --input-dim 128 --hidden-dims 256 512 256 10
"""

import argparse
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bitpress.errors import BitpressError
from bitpress.models import QuantizedNN, SimpleNN, quantize_model
from bitpress.models.simple_nn import LayerInfo

console = Console(highlight=False)
wide = Console(highlight=False, width=200)  # for tables: each is as wide as it needs to be, on any terminal


class Data(NamedTuple):
    x: Tensor  # (rows, input_dim)
    y: Tensor  # (rows,), the classes
    held_out_x: Tensor  # of samples that neither training nor AWQ sees
    held_out_y: Tensor


def main() -> None:
    options = parse_options()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # so small a network gains nothing from more
    data = load_data(options)
    model = train(data, options)
    calibration = data.x[: options.calibration_samples]

    say(
        f"A network of {' -> '.join(map(str, [options.input_dim, *options.hidden_dims]))}, trained on {len(data.x)} "
        f"samples ({options.data}) on the {options.device.upper()}, is quantized to {options.quantization_bits} bits. "
        f"AWQ looks at {len(calibration)} of the samples. {len(data.held_out_x)} others test the result."
    )
    scheme = {"bits": options.quantization_bits, "symmetric": options.symmetric, "group_size": options.group_size}
    show_original(model)
    quantized, layers = show_quantization(model, calibration, scheme)
    rounded = quantize_model(model, calibration, **scheme, n_grid=0)  # plain round-to-nearest, to compare with
    show_quantized(layers)
    show_errors(model, quantized, rounded, layers, data.held_out_x)
    show_outputs(model, quantized, rounded, data)
    show_compression(model, quantized)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quantize a small network with AWQ and show each step.")
    parser.add_argument("--quantization-bits", type=int, choices=range(2, 9), default=4, help="(default: 4)")
    parser.add_argument("--symmetric", action="store_true", help="grids centred on 0, without zero points")
    parser.add_argument("--group-size", type=int, help="inputs that share a scale, -1: all (default: 64 if it fits)")
    parser.add_argument("--input-dim", type=int, default=64, help="(default: 64)")
    parser.add_argument("--hidden-dims", type=int, nargs="+", default=[128, 256, 128, 10], help="last: classes")
    parser.add_argument("--data", choices=["digits", "synthetic"], help="default: digits where 64 -> ... -> 10 fits")
    parser.add_argument("--samples", type=int, default=1797, help="of the data set (default: 1797)")
    parser.add_argument("--calibration-samples", type=int, default=512, help="that AWQ sees (default: 512)")
    parser.add_argument("--epochs", type=int, default=30, help="of the training (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    options = parser.parse_args()
    shape = (options.input_dim, options.hidden_dims[-1])
    options.data = options.data or ("digits" if shape == (64, 10) else "synthetic")
    if options.data == "digits" and shape != (64, 10):
        parser.error(f"digits have 64 inputs and 10 classes, not {shape[0]} and {shape[1]}: use --data synthetic")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def load_data(options: argparse.Namespace) -> Data:
    if options.data == "digits":
        pixels, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
    else:  # one cloud per class, in channels of very different size
        y = torch.randint(options.hidden_dims[-1], (options.samples,))
        centres = torch.randn(options.hidden_dims[-1], options.input_dim)
        x = (centres[y] + 2 * torch.randn(len(y), options.input_dim)) * torch.randn(options.input_dim).exp()
    order = torch.randperm(len(y))[: options.samples]
    x, y = x[order].to(options.device), y[order].to(options.device)
    split = len(y) * 3 // 4  # the last quarter is held out
    return Data(x[:split], y[:split], x[split:], y[split:])


def train(data: Data, options: argparse.Namespace) -> SimpleNN:
    model = SimpleNN(options.input_dim, options.hidden_dims).to(options.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(options.epochs):
        for rows in torch.randperm(len(data.x)).to(options.device).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
            optimizer.step()
    return model.requires_grad_(False)


def show_original(model: SimpleNN) -> None:
    title("1. The original weights")
    say("One matrix a layer: a row for each output, a column for each input. Of each, the top left corner.")
    for name, weight in weights(model).items():
        show_weight(name, weight, [numbers(row) for row in corner(weight)])


def show_quantization(model: SimpleNN, x: Tensor, scheme: dict) -> tuple[QuantizedNN, dict[str, LayerInfo]]:
    title("2. The quantization, layer by layer")
    say(
        "Rounding a weight hurts most where the activations it meets are large. AWQ multiplies the columns of a weight "
        "by scales before rounding and divides the activations by the same scales: the function stays, and the error "
        "moves to where it hurts less. It tries many scales and keeps those with the least error at the layer's output."
    )
    layers: dict[str, LayerInfo] = {}

    def on_layer(name: str, info: LayerInfo) -> None:
        awq, grid, before = info["awq"], info["quantized"], next(reversed(layers), None)
        layers[name] = info
        where = f"divided out of the rows of {before}" if before else "the input is divided by them (input_scale)"
        scales = f"{awq.scales.min():.3g} to {awq.scales.max():.3g}, exponent {awq.ratio}\n{' ' * 14}{where}"
        share = f"every {grid.args.group_size} values in a row" if grid.scale.shape[1] > 1 else "the values of a row"
        offset = "" if grid.args.symmetric else " and a zero point"
        console.print(f"\n[bold]{name}[/]")
        say(f"  looked at   {info['statistics'].rows} activations")
        say(f"  scales      {'none: nothing beats leaving the layer alone' if awq.ratio is None else scales}")
        say(f"  rounded to  {2**grid.args.num_bits} levels; {share} share a scale{offset}")
        say(f"  error       {info['relative_error_before']:.2%} of the output without the scales")
        say(f"              {info['relative_error']:.2%} with them")

    return quantize_model(model, x, **scheme, on_layer=on_layer), layers


def show_quantized(layers: dict[str, LayerInfo]) -> None:
    title("3. The quantized weights")
    say("The integers that are stored, and the weights they stand for (AWQ's scales taken out), to compare with above.")
    for name, info in layers.items():
        stands_for = info["quantized"].dequantize() / info["awq"].scales
        both = zip(corner(info["quantized"].values), corner(stands_for), strict=True)
        show_weight(name, stands_for, ["".join(f"{q:5d}" for q in row) + "  |" + numbers(w) for row, w in both])


def show_errors(
    model: SimpleNN, quantized: QuantizedNN, rounded: QuantizedNN, layers: dict[str, LayerInfo], x: Tensor
) -> None:
    title("4. The error analysis")
    say("Per layer: how far its own rounding moves its output, relative to the output. Most affected layers first.")
    table = new_table("layer", "round-to-nearest", "AWQ", "AWQ takes away")
    for name, info in sorted(layers.items(), key=lambda item: -item[1]["relative_error"]):
        before, after = info["relative_error_before"], info["relative_error"]
        table.add_row(name, f"{before:.3%}", f"{after:.3%}", f"{1 - after / before if before else 0:.0%}")
    wide.print(table)

    say("Accumulated across the network, first layer to last, on samples that neither training nor AWQ has seen:")
    table = new_table("after layer", "round-to-nearest", "AWQ")
    # In the quantized network, an output is smaller by the scales of the layer that it goes to.
    scales = [*[info["awq"].scales for info in layers.values()][1:], 1.0]
    outputs = zip(model.outputs(x), rounded.outputs(x), quantized.outputs(x), strict=True)
    for name, s, (y, plain, smoothed) in zip(layers, scales, outputs, strict=True):
        table.add_row(name, f"{distance(plain, y):.3%}", f"{distance(smoothed * s, y):.3%}")
    wide.print(table)


def show_outputs(model: SimpleNN, quantized: QuantizedNN, rounded: QuantizedNN, data: Data) -> None:
    title("5. The outputs before and after")
    x, y = data.held_out_x, data.held_out_y
    before, after = model(x), quantized(x)
    say("Four held-out samples: what they are, what each network answers, and the logit of each class.")
    table = new_table("is", "network", "answer", *map(str, range(min(before.shape[1], 10))))
    for label, *logits in zip(y[:4].tolist(), before, after, strict=False):
        for network, row in zip(("original", "quantized"), logits, strict=True):
            table.add_row(str(label), network, str(int(row.argmax())), *(f"{v:.2f}" for v in row[:10].tolist()))
        table.add_section()
    wide.print(table)
    same = share_of(before.argmax(1) == after.argmax(1))
    say(f"Of all {len(x)} held-out samples, {same} get the same answer from both networks. Right answers:")
    for name, network in (("original", model), ("AWQ", quantized), ("round-to-nearest", rounded)):
        say(f"  {name:<16}  {share_of(network(x).argmax(1) == y)}")


def show_compression(model: SimpleNN, quantized: QuantizedNN) -> None:
    title("6. The compression")
    say("Exact bytes of everything that is stored. Other: the shapes, and the scale of the input.")
    table = new_table("layer", "before", "after", "integers", "scales", "zero points", "other", "ratio", "saved")
    total = [0] * 6
    for (name, weight), layer in zip(weights(model).items(), quantized.layers, strict=True):
        of = {buffer: tensor.nbytes for buffer, tensor in layer.named_buffers()}
        parts = [of.pop("weight_packed"), of.pop("weight_scale"), of.pop("weight_zero_point", 0), sum(of.values())]
        sizes = [weight.nbytes, layer.nbytes(), *parts]
        total = [a + b for a, b in zip(total, sizes, strict=True)]
        table.add_row(name, *compared(sizes))
    table.add_section()
    table.add_row("all", *compared(total))
    wide.print(table)


def weights(model: SimpleNN) -> dict[str, Tensor]:
    return {f"layers.{index}": layer.weight for index, layer in enumerate(model.layers)}


def corner(matrix: Tensor) -> list[list[float]]:
    return matrix[:4, :6].tolist()


def numbers(row: list[float]) -> str:
    return "".join(f"{value:9.4f}" for value in row)


def distance(y: Tensor, reference: Tensor) -> float:
    return float((y - reference).norm() / reference.norm())


def share_of(hits: Tensor) -> str:
    return f"{float(hits.float().mean()):.2%}"


def compared(sizes: list[int]) -> list[str]:
    before, after = sizes[:2]
    return [*(f"{size:,}" for size in sizes), f"{before / after:.2f}", f"{1 - after / before:.1%}"]


def show_weight(name: str, weight: Tensor, rows: list[str]) -> None:
    console.print(f"\n[bold]{name}[/]  {weight.shape[0]} x {weight.shape[1]}")
    say(f"  min {weight.min():.4f}   mean {weight.mean():.4f}   max {weight.max():.4f}   std {weight.std():.4f}")
    for row in rows:
        wide.print(row)


def title(text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left")


def say(text: str) -> None:
    console.print(text, markup=False)


def new_table(first: str, *columns: str) -> Table:
    table = Table(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


if __name__ == "__main__":
    try:
        main()
    except BitpressError as error:
        raise SystemExit(f"error: {error}") from error
