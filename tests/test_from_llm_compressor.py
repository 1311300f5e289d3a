"""llm-compressor's ways of use, written anew: they run with only the imports changed, and the checkpoints load."""

import json
import re
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from compressing import WORDS, sentences, tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitpress
from bitpress import oneshot
from bitpress.modifiers import QuantizationModifier
from bitpress.pipelines.data import known, prepare

# The change, as the page tells a user to make it.
PAGE = Path(__file__).parents[1] / "docs" / "from-llm-compressor.md"
IMPORTS = re.findall(r"\bs/(from .*?)/(from .*?)/", PAGE.read_text())
HEAD = """
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmcompressor import oneshot

model = AutoModelForCausalLM.from_pretrained(MODEL_ID, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(MODEL_ID)
"""
SAVE = """
model.save_pretrained(SAVE_DIR, save_compressed=True)
tokenizer.save_pretrained(SAVE_DIR)
"""
TOKENIZED = """
ds = load_dataset("chat", split="train[:8]").shuffle(seed=42)

def preprocess(example):
    return {"text": tokenizer.apply_chat_template(example["messages"], tokenize=False)}

def tokenize(sample):
    return tokenizer(sample["text"], padding=False, max_length=24, truncation=True, add_special_tokens=False)

ds = ds.map(preprocess)
ds = ds.map(tokenize, remove_columns=ds.column_names)
"""
EXAMPLES = {
    "FP8, without data": HEAD + """
from llmcompressor.modifiers.quantization import QuantizationModifier

recipe = QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])
oneshot(model=model, recipe=recipe)
""" + SAVE,
    "GPTQ, a dataset that is tokenized": HEAD + """
from llmcompressor.modifiers.quantization import GPTQModifier
""" + TOKENIZED + """
recipe = GPTQModifier(targets="Linear", scheme={"W4A16": ["re:.*mlp.*"], "W8A16": ["re:.*self_attn.*"]})
oneshot(model=model, dataset=ds, recipe=recipe, max_seq_length=24, num_calibration_samples=8)
""" + SAVE,
    "SmoothQuant and GPTQ, a list": HEAD + """
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
""" + TOKENIZED + """
recipe = [
    SmoothQuantModifier(smoothing_strength=0.8),
    GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"], dampening_frac=0.01, actorder="weight"),
]
oneshot(model=model, dataset=ds, recipe=recipe, max_seq_length=24, num_calibration_samples=8, pipeline="sequential")
""" + SAVE,
    "AWQ, that quantizes as well": HEAD + """
from llmcompressor.modifiers.awq import AWQModifier
ds = load_dataset("chat", split="train[:8]")
ds = ds.map(lambda row: {"text": tokenizer.apply_chat_template(row["messages"], tokenize=False)})
recipe = [AWQModifier(ignore=["lm_head"], scheme="W4A16_ASYM", targets=["Linear"], duo_scaling="both")]
oneshot(model=model, dataset=ds, recipe=recipe, max_seq_length=24, num_calibration_samples=8)
""" + SAVE,
    "AWQ with mappings, then a modifier that quantizes": HEAD + """
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
""" + TOKENIZED + """
weights = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=32, dynamic=False)
recipe = [
    AWQModifier(
        mappings=[
            AWQMapping("re:.*input_layernorm", ["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"]),
            AWQMapping(smooth_layer="re:.*up_proj", balance_layers=["re:.*down_proj"], activation_hook_target=None),
        ],
        offload_device=torch.device("cpu"),
    ),
    QuantizationModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]
    ),
]
oneshot(
    model=model, dataset=ds, recipe=recipe, processor=tokenizer, max_seq_length=24, num_calibration_samples=8,
    sequential_targets=["LlamaDecoderLayer"], output_dir=SAVE_DIR, save_compressed=True, data_collator="truncation",
)
""",
    "a path, a dataset by its name, a recipe in YAML": """
from llmcompressor import oneshot

recipe = '''
quant_stage:
  quant_modifiers:
    SmoothQuantModifier:
      smoothing_strength: 0.5
    GPTQModifier:
      targets: Linear
      scheme: W8A8
      ignore: [lm_head]
      kv_cache_scheme: {num_bits: 8, type: float, symmetric: true, strategy: tensor, dynamic: false}
'''
oneshot(
    model=MODEL_ID, tokenizer=MODEL_ID, dataset="open_platypus", splits={"calibration": "train[:50%]"}, recipe=recipe,
    output_dir=SAVE_DIR, max_seq_length=32, num_calibration_samples=4, pad_to_max_length=False, overwrite_cache=False,
)
""",
    "a recipe in a file": HEAD + """
with open(SAVE_DIR + ".yaml", "w") as file:
    file.write("quant_stage: {quant_modifiers: {QuantizationModifier: {scheme: FP8, ignore: lm_head}}}")
oneshot(
    model=model, dataset="ultrachat_200k", splits="train_sft[:6]", recipe=SAVE_DIR + ".yaml", tokenizer=tokenizer,
    max_seq_length=24, num_calibration_samples=6,
)
""" + SAVE,
    "NVFP4, an observer for weights": HEAD + """
from llmcompressor.modifiers.quantization import QuantizationModifier
""" + TOKENIZED + """
recipe = QuantizationModifier(targets="Linear", scheme="NVFP4", weight_observer="mse", ignore=["re:.*lm_head"])
oneshot(model=model, dataset=ds, recipe=recipe, max_seq_length=24, num_calibration_samples=4, batch_size=2,
        moe_calibrate_all_experts=True)
""" + SAVE,
    "tensors from a DataLoader": HEAD + """
from torch.utils.data import DataLoader
from llmcompressor.modifiers.quantization import QuantizationModifier

ids = torch.randint(3, 100, (4, 24), generator=torch.Generator().manual_seed(0))
loader = DataLoader([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids], batch_size=2)
recipe = QuantizationModifier(targets=["Linear"], scheme="INT8", ignore=["lm_head"])
oneshot(model=model, dataset=loader, recipe=[recipe], num_calibration_samples=4, shuffle_calibration_samples=False)
""" + SAVE,
}  # fmt: skip
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def model_id(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    options = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
    tiny.llama(**options).to(torch.bfloat16).save_pretrained(folder)
    words = tokenizer()
    words.chat_template = TEMPLATE
    words.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def hub(monkeypatch):
    """A hub with two datasets, for what asks datasets.load_dataset."""
    texts = sentences(12, 40)
    chats = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": b}]
        for a, b in zip(texts, texts[::-1], strict=True)
    ]
    tables = {
        "chat": datasets.Dataset.from_dict({"messages": chats}),
        "garage-bAInd/Open-Platypus": datasets.Dataset.from_dict({"instruction": texts, "output": texts[::-1]}),
        "HuggingFaceH4/ultrachat_200k": datasets.Dataset.from_dict({"messages": chats}),
    }

    def load_dataset(name, *config, split=None):
        asked.append((name, *config, split))
        part = re.search(r"\[:(\d+)(%?)\]", split or "")
        if part is None:
            return tables[name]
        count = int(part[1]) * (len(texts) if part[2] else 1) // (100 if part[2] else 1)
        return tables[name].select(range(count))

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def with_our_imports(text):
    for theirs, ours in IMPORTS:
        text = re.sub(theirs, ours, text)
    assert len(IMPORTS) == 2
    assert "llmcompressor" not in text
    return text


@pytest.mark.parametrize("name", EXAMPLES)
def test_only_the_imports_change(name, model_id, hub, tmp_path):
    names = {"MODEL_ID": model_id, "SAVE_DIR": str(tmp_path / "out")}
    exec(with_our_imports(EXAMPLES[name]), names)  # noqa: S102 - the examples above
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["quantization_status"] == "compressed"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    found = tiny.logits(loaded)
    assert torch.equal(tiny.logits(bitpress.load(tmp_path / "out", packed=False)), found)
    if "model" in names:
        assert torch.equal(tiny.logits(names["model"]), found)
    original = tiny.logits(AutoModelForCausalLM.from_pretrained(model_id, dtype=torch.bfloat16))
    assert 0 < (found - original).norm() < original.norm()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_its_short_names_ask_for_what_they_stand_for(hub, model_id):
    words = AutoTokenizer.from_pretrained(model_id)
    asked = {"tokenizer": words, "shuffle_calibration_samples": False, "num_calibration_samples": 1}
    data = prepare("open_platypus", **asked)
    text = words.decode(data.batches[0].kwargs["input_ids"][0])
    first, last = sentences(12, 40)[0], sentences(12, 40)[-1]
    assert text == f"{first} {last}"
    prepare("ultrachat", **asked)
    prepare("chat", dataset_config_name="mine", splits="train", **asked)
    assert hub == [
        ("garage-bAInd/Open-Platypus", None),
        ("HuggingFaceH4/ultrachat_200k", "train_sft"),
        ("chat", "mine", "train"),
    ]


@pytest.mark.parametrize("name", known.KNOWN)
def test_texts_of_the_short_names_are_made_of_columns(name):
    text = known.KNOWN[name].text
    columns = re.findall(r"{(\w+)}", text or "")
    table = datasets.Dataset.from_dict(dict.fromkeys(columns, WORDS[:2]) or {"text": WORDS[:2]})
    found = known.KNOWN[name].with_texts(table)["text"]
    assert list(found) == ["\n\n".join([word] * max(1, len(columns))) for word in WORDS[:2]]


def test_weights_alone_from_file_to_file(model_id, tmp_path):
    """What its model_free_ptq does: no model is built."""
    oneshot(model_id, recipe=QuantizationModifier(scheme="FP8_BLOCK", ignore=["lm_head"]), output_dir=tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(model_id, dtype="auto")
    oneshot(expected, recipe=QuantizationModifier(scheme="FP8_BLOCK", ignore=["lm_head"]))
    assert torch.equal(tiny.logits(bitpress.load(tmp_path / "out", packed=False)), tiny.logits(expected))
