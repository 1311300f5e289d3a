"""Rounding that is learned block by block, against what the blocks gave in the original model."""

import pytest
import tiny
import torch
from compressing import awq, rtn, scheme
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from bitpress import BitpressError, GPTQModifier, load, oneshot, save
from bitpress.checkpoints.attached import attached_layers, packed_weight
from bitpress.modifiers import LearnedRoundingModifier, QuantizationModifier
from bitpress.pipelines.rounding import relative_errors
from bitpress.session import Session

DATA = tiny.token_data(16)
# Of fewer tokens than a weight has values, the points learn little but these tokens.
MORE = tiny.token_data(16, rows=8)
LEARNED = LearnedRoundingModifier(iterations=24, batch_size=7)
UNSEEN = [tiny.tokens(4, seed=100 + i) for i in range(4)]


def gptq(bits, targets=("Linear",)):
    groups = {"g": scheme(bits=bits, targets=targets)}
    return [GPTQModifier(ignore=["lm_head"], config_groups=groups, dampening_frac=0.3)]


@torch.no_grad()
def off(model, original):
    """How far the last hidden state is off, on batches that nothing was learned from."""
    found = []
    for batch in UNSEEN:
        x, y = (m(**batch, output_hidden_states=True).hidden_states[-1] for m in (model, original))
        found.append(float((x - y).square().sum() / y.square().sum()))
    return sum(found) / len(found)


@pytest.mark.parametrize("before", [rtn, awq, gptq], ids=["after rtn", "after awq", "after gptq"])
@pytest.mark.parametrize(("build", "kind"), [(tiny.llama, "Linear"), (tiny.gpt2, "Conv1D")], ids=["llama", "gpt2"])
def test_the_model_comes_nearer_to_the_original(before, build, kind):
    plain, learned = build(), build()
    tiny.compress(plain, before(bits=2, targets=[kind]), MORE)
    session = tiny.compress(learned, [*before(bits=2, targets=[kind]), LEARNED], MORE)
    assert off(learned, build()) < 0.99 * off(plain, build())
    records = session.state.block_records
    better = [b for b in session.state.blocks if records[b.name]["learned_error"] < records[b.name]["solved_error"]]
    assert better
    others = attached_layers(plain)
    for name, layer in attached_layers(learned).items():
        if not any(block.holds(name) for block in better):
            continue
        mine, theirs = packed_weight(name, layer).unpack(), packed_weight(name, others[name]).unpack()
        moved = float((mine.values != theirs.values).float().mean())
        assert 0.005 < moved < 0.5
        record = session.state.layer_records[name]
        assert 0 < record["points_learned"] < 0.5
        # Without statistics there is no error to be told.
        assert before is rtn or "LearnedRounding" in record["steps"]


def test_the_errors_are_those_of_the_batches_that_are_held_out():
    model, original = tiny.llama(), tiny.llama()
    session = tiny.compress(model, [*rtn(bits=3), LearnedRoundingModifier(iterations=8)], DATA)
    batches = [DATA.batches[7].kwargs, DATA.batches[15].kwargs]
    with torch.no_grad():
        # Behind the last block there is a norm: the state before it is what hooks see.
        seen = {}
        for label, m in (("model", model), ("original", original)):
            hook = m.model.layers[-1].register_forward_hook(
                lambda _, __, out, label=label: seen.setdefault(label, []).append(
                    out if torch.is_tensor(out) else out[0]
                )
            )
            for batch in batches:
                m(**batch)
            hook.remove()
    pairs = zip(seen["model"], seen["original"], strict=True)
    found = [relative_errors(x, y, b["attention_mask"].bool()) for (x, y), b in zip(pairs, batches, strict=True)]
    expected = sum(float(error) for error, _ in found) / sum(count for _, count in found)
    name = session.state.blocks[-1].name
    record = session.state.block_records[name]
    assert min(record["learned_error"], record["solved_error"]) == pytest.approx(expected, rel=1e-3)


def test_relative_errors_count_each_token_alike_and_no_padding():
    target = torch.randn(2, 5, 8)
    target[0, 0] *= 1000
    output = target * 1.1
    output[1, 3:] = 77
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    error, count = relative_errors((output,), target, mask)
    assert count == 8
    assert float(error) == pytest.approx(8 * 0.01, rel=1e-3)
    assert relative_errors(None, target, mask)[1] == 0


def test_what_makes_it_worse_is_not_kept():
    plain, learned = tiny.llama(), tiny.llama()
    tiny.compress(plain, rtn(bits=4), DATA)
    session = tiny.compress(learned, [*rtn(bits=4), LearnedRoundingModifier(travel=30.0, iterations=2)], DATA)
    assert all(r["learned_error"] >= r["solved_error"] for r in session.state.block_records.values())
    tiny.assert_unchanged(learned, tiny.snapshot(plain))


def test_padding_does_not_count():
    batches = []
    for seed in range(8):
        batch = tiny.tokens(2, seed=seed)
        batch["attention_mask"][1, 12:] = 0
        batches.append(batch)
    others = [{**b, "input_ids": torch.where(b["attention_mask"] == 1, b["input_ids"], 5)} for b in batches]
    found = []
    for data in (batches, others):
        model = tiny.llama()
        tiny.compress(model, [*rtn(bits=3), LearnedRoundingModifier(iterations=6)], tiny.data_of(data))
        found.append(tiny.snapshot(model))
    same = [float((found[0][n] - found[1][n]).abs().max()) < 1e-5 for n in found[0]]
    assert all(same)


def test_experts_learn_too():
    def build():
        config = MixtralConfig(**tiny._GATED, num_local_experts=4, num_experts_per_tok=2)
        return tiny.seeded(lambda: MixtralForCausalLM(config))

    plain, learned = build(), build()
    tiny.compress(plain, rtn(bits=2), DATA)
    tiny.compress(learned, [*rtn(bits=2), LEARNED], DATA)
    assert off(learned, build()) < 0.99 * off(plain, build())
    others = attached_layers(plain)
    experts = {name: layer for name, layer in attached_layers(learned).items() if ".experts." in name}
    assert len(experts) == 2 * 4 * 3
    pairs = [(packed_weight(n, experts[n]).unpack(), packed_weight(n, others[n]).unpack()) for n in experts]
    assert sum(not torch.equal(mine.values, theirs.values) for mine, theirs in pairs) >= 4 * 3


def test_a_model_that_is_one_block_learns_too():
    x = [torch.randn(16, 32, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    model = tiny.seeded(lambda: tiny.MLP(32, 64, 64, 32))
    session = tiny.compress(model, [*rtn(bits=3), LEARNED], tiny.data_of(x))
    (record,) = session.state.block_records.values()
    assert record["learned_error"] < 0.97 * record["solved_error"]


@pytest.mark.parametrize("preset", ["NVFP4A16", "MXFP4A16"])
def test_grids_of_floats_learn_too_and_the_checkpoint_says_what_the_model_says(tmp_path, preset):
    recipe = [QuantizationModifier(scheme=preset, ignore=["lm_head"])]
    plain = tiny.llama()
    tiny.compress(plain, recipe, DATA)
    tiny.llama().save_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval()
    tiny.compress(model, [*recipe, LEARNED], DATA)
    assert off(model, tiny.llama()) < 0.97 * off(plain, tiny.llama())
    expected = tiny.logits(model)
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out").eval()
    assert torch.equal(tiny.logits(loaded), expected)


def test_streamed_it_is_the_same_model(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "source")
    recipe = [*gptq(3), LearnedRoundingModifier(iterations=6)]
    ids = [b.kwargs["input_ids"][0].tolist() for b in DATA.batches]
    options = {"recipe": recipe, "progress": False, "num_calibration_samples": 16}
    oneshot(tmp_path / "source", ids, output_dir=tmp_path / "streamed", stream=True, **options)
    oneshot(tmp_path / "source", ids, output_dir=tmp_path / "memory", stream=False, **options)
    oneshot(tmp_path / "source", ids, output_dir=tmp_path / "spilled", stream=True, activations="disk", **options)
    files = sorted((tmp_path / "memory").glob("*.safetensors"))
    assert files
    for file in files:
        assert (tmp_path / "streamed" / file.name).read_bytes() == file.read_bytes()
        assert (tmp_path / "spilled" / file.name).read_bytes() == file.read_bytes()


def test_the_model_and_its_gradients_are_as_they_were_until_the_end():
    model = tiny.llama()
    parameter = next(model.parameters())
    parameter.grad = torch.ones_like(parameter)
    before = tiny.snapshot(model)
    session = Session(model, [*awq(bits=3), LearnedRoundingModifier(iterations=2)])
    session.check()
    session.initialize(DATA)
    session.run()
    tiny.assert_unchanged(model, before)
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert all(p.requires_grad for p in model.parameters())


def test_it_is_refused_where_it_cannot_work():
    with pytest.raises(BitpressError, match="LearnedRoundingModifier needs calibration data"):
        oneshot(tiny.llama(), recipe=[*rtn(), LEARNED])
    with pytest.raises(BitpressError, match='block after block: leave out pipeline="basic"'):
        tiny.compress(tiny.llama(), [*rtn(), LEARNED], DATA, pipeline="basic")
    with pytest.raises(BitpressError, match="two LearnedRoundingModifiers"):
        tiny.compress(tiny.llama(), [*rtn(), LearnedRoundingModifier(), LEARNED], DATA)
    with pytest.raises(BitpressError, match="at least two calibration batches"):
        tiny.compress(tiny.llama(), [*rtn(), LearnedRoundingModifier()], tiny.token_data(1))
