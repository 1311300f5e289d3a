"""Recipes: the same as objects, as YAML and by name."""

import dataclasses
from pathlib import Path

import pytest
from compressing import awq, rtn, scheme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitpress import AWQMapping, AWQModifier, BitpressError, Modifier, QuantizationModifier, Recipe
from bitpress.quantization import QuantizationArgs, QuantizationScheme
from bitpress.session.recipe import arguments_of, shipped_recipes

RECIPES = Path(__file__).parents[2] / "recipes"

# Round trips.

names = st.sampled_from(
    ["Linear", "Conv1D", "lm_head", "re:.*q_proj$", "model.layers.0.mlp", "- a: b", "#x", "yes", "1", "${x}", "$${"]
)
lists = st.lists(names, max_size=3)
args = st.builds(
    scheme,
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    strategy=st.sampled_from(["tensor", "channel", "group"]),
    group_size=st.sampled_from([16, 32, 64, 128]),
    targets=st.lists(names, min_size=1, max_size=3),
)
presets = st.sampled_from(["W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8", "NVFP4"])
activations = st.builds(
    QuantizationArgs,
    num_bits=st.just(8),
    type=st.sampled_from(["int", "float"]),
    strategy=st.sampled_from(["tensor", "attn_head"]),
)
quantization = {
    "targets": lists,
    "ignore": lists,
    "scheme": st.none()
    | presets
    | args
    | st.dictionaries(presets, st.lists(names, min_size=1), min_size=1, max_size=2),
    "config_groups": st.none()
    | st.dictionaries(names, args, min_size=1, max_size=3)
    | st.dictionaries(names, st.builds(QuantizationScheme, targets=lists, input_activations=activations), max_size=2),
    "kv_cache_scheme": st.none() | activations,
    "weight_observer": st.sampled_from([None, "minmax", "mse", "gram"]),
    "fused": st.booleans(),
}
smoothing = {
    "bits": st.none() | st.integers(2, 8),
    "symmetric": st.none() | st.booleans(),
    "group_size": st.none() | st.sampled_from([-1, 32, 128]),
    "mappings": st.none() | st.lists(st.builds(AWQMapping, names, st.lists(names, min_size=1, max_size=3)), max_size=3),
    "duo_scaling": st.sampled_from([True, False, "both"]),
    "n_grid": st.integers(1, 100),
    "clip": st.booleans(),
}
choice = {
    "choose_from": st.lists(presets | args, min_size=1, max_size=3),
    "bits_per_weight": st.floats(0.1, 16),
    "max_bytes": st.integers(1, 10**12),
}


def one_of(kind, fields):
    """The modifier with some of the fields, and a budget with something to spend it on, or none."""
    none = st.just({})
    budgets = [
        st.fixed_dictionaries({k: choice[k] for k in ("choose_from", b)}) for b in ("bits_per_weight", "max_bytes")
    ]
    chosen = st.one_of(none, *budgets)
    return st.builds(
        lambda stated, budget: kind(**stated, **budget), st.fixed_dictionaries({}, optional=fields), chosen
    )


modifiers = one_of(QuantizationModifier, quantization) | one_of(AWQModifier, {**quantization, **smoothing})


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(modifiers, min_size=1, max_size=3))
def test_yaml_gives_back_the_recipe(steps):
    recipe = Recipe.of(steps)
    text = recipe.to_yaml()
    again = Recipe.from_yaml(text)
    assert again == recipe
    assert again.to_yaml() == text
    # What was not stated is not written, so that a default may change.
    assert [m.model_fields_set for m in again.modifiers] == [m.model_fields_set for m in steps]


def test_the_designs_recipe_round_trips():
    recipe = Recipe.of(awq())
    assert [type(m) for m in recipe.modifiers] == [AWQModifier, QuantizationModifier]
    assert Recipe.of(recipe.to_yaml()) == recipe


def test_the_fields_cover_the_modifiers():
    # A new field belongs in the strategies above.
    assert {*quantization, *choice} == set(QuantizationModifier.model_fields)
    assert {*quantization, *choice, *smoothing} == set(AWQModifier.model_fields)


# Where recipes come from.


def test_objects():
    step = QuantizationModifier(scheme="W4A16")
    recipe = Recipe.of(step)
    assert recipe.modifiers == (step,)
    assert Recipe.of([step]) == Recipe.of((step,)) == recipe
    assert Recipe.of(recipe) is recipe


def test_files(tmp_path, monkeypatch):
    text = Recipe.of(awq()).to_yaml()
    for name in ("r.yaml", "r.yml", "recipe of mine", "a: b.yaml"):
        (tmp_path / name).write_text(text)
        assert Recipe.of(tmp_path / name) == Recipe.of(awq())
    monkeypatch.chdir(tmp_path)
    assert Recipe.of("r.yaml") == Recipe.of("recipe of mine") == Recipe.of(awq())


@pytest.mark.parametrize("text", ["- QuantizationModifier: {scheme: W4A16}", "QuantizationModifier:\n  scheme: W4A16"])
def test_text(text):
    assert Recipe.of(text) == Recipe.of(QuantizationModifier(scheme="W4A16"))


# Several recipes as one.


def test_recipes_are_joined():
    cache = Recipe.of("kv-cache-fp8")
    first = Recipe.of("w4a16-fast", {"group_size": 32})
    both = Recipe((*first.modifiers, *cache.modifiers))
    assert Recipe.of("w4a16-fast+kv-cache-fp8", {"group_size": 32}) == both
    assert Recipe.of("w4a16-fast + kv-cache-fp8", ["group_size=32"]) == both
    assert Recipe.of(["w4a16-fast", "kv-cache-fp8"], {"group_size": 32}) == both
    assert Recipe.of([first, *cache.modifiers]) == Recipe.of([first, [cache]]) == both


def test_files_are_joined(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("- AWQModifier:\n    bits: 4\n")
    (tmp_path / "b+c.yaml").write_text("- QuantizationModifier:\n    scheme: W4A16\n")
    a, b = AWQModifier(bits=4), QuantizationModifier(scheme="W4A16")
    assert Recipe.of(["a.yaml", tmp_path / "b+c.yaml"]) == Recipe.of([a, b])
    assert Recipe.of("b+c.yaml") == Recipe.of(b)
    (tmp_path / "d.yaml").write_text("- QuantizationModifier:\n    scheme: W4A16\n")
    assert Recipe.of("a.yaml+d.yaml") == Recipe.of([a, b])


def test_each_of_several_takes_the_arguments_that_it_has():
    recipe = Recipe.of("w4a16-fast+kv-cache-fp8", {"bits": 3, "strategy": "attn_head"})
    assert recipe.modifiers[1].config_groups["group_0"].weights.num_bits == 3
    assert recipe.modifiers[2].kv_cache_scheme.strategy == "attn_head"
    shared = Recipe.of(["w4a16", "w8a16"], {"ignore": ["x"]})
    assert [m.ignore for m in shared.modifiers] == [["x"], ["x"]]
    with pytest.raises(
        BitpressError, match=r"w4a16-fast\.yaml, kv-cache-fp8\.yaml: no argument is called 'bit'.*'bits'"
    ):
        Recipe.of("w4a16-fast+kv-cache-fp8", {"bit": 3})
    with pytest.raises(BitpressError, match="no recipe is called 'kv-cash'"):
        Recipe.of("w4a16-fast+kv-cash")


NESTED = """
{stage}:
  {modifiers}:
    AWQModifier:
      ignore: [lm_head]
      mappings:
        - smooth_layer: re:.*input_layernorm
          balance_layers: ["re:.*q_proj", "re:.*k_proj"]
        - ["re:.*v_proj", ["re:.*o_proj"]]
      config_groups:
        group_0:
          targets: [Linear]
          weights: {{num_bits: 4, type: int, symmetric: false, strategy: group, group_size: 32, dynamic: false}}
    QuantizationModifier:
      targets: Linear
      scheme: W4A16
      ignore: lm_head
"""


@pytest.mark.parametrize(
    ("stage", "modifiers"),
    [("quant_stage", "quant_modifiers"), ("DEFAULT_stage", "DEFAULT_modifiers"), ("stage", "modifiers")],
)
def test_the_nested_form_of_other_tools(stage, modifiers):
    recipe = Recipe.of(NESTED.format(stage=stage, modifiers=modifiers))
    mappings = [
        AWQMapping("re:.*input_layernorm", ["re:.*q_proj", "re:.*k_proj"]),
        AWQMapping("re:.*v_proj", ["re:.*o_proj"]),
    ]
    first = AWQModifier(ignore=["lm_head"], mappings=mappings, config_groups={"group_0": scheme()})
    assert recipe == Recipe.of([first, QuantizationModifier(targets=["Linear"], scheme="W4A16", ignore=["lm_head"])])


def test_several_stages():
    text = "a_stage:\n  m_modifiers:\n    AWQModifier:\n      bits: 4\nb_stage:\n  m_modifiers:\n"
    recipe = Recipe.of(text + "    QuantizationModifier:\n      scheme: W4A16_ASYM\n")
    assert recipe == Recipe.of([AWQModifier(bits=4), QuantizationModifier(scheme="W4A16_ASYM")])


def test_anchors():
    text = "- QuantizationModifier: &a\n    scheme: W4A16\n- QuantizationModifier:\n    <<: *a\n    ignore: [x]\n"
    first, second = Recipe.of(text).modifiers
    assert (first.ignore, second.ignore, first.scheme, second.scheme) == ([], ["x"], "W4A16", "W4A16")


def test_a_modifier_of_the_users_own():
    class Tripling(Modifier):
        factor: float = 2.0

    try:
        recipe = Recipe.of("- Tripling: {factor: 3}\n- Tripling:\n")
        assert [m.factor for m in recipe.modifiers] == [3.0, 2.0]
        assert Recipe.of(recipe.to_yaml()) == recipe
    finally:
        del Modifier.known["Tripling"]


# What is shipped.


def test_all_recipes_are_shipped():
    assert set(shipped_recipes()) == {file.stem for file in RECIPES.glob("*.yaml")}
    assert "awq-w4a16-asym" in shipped_recipes()


@pytest.mark.parametrize("file", sorted(RECIPES.iterdir()), ids=lambda file: file.name)
def test_every_shipped_recipe_loads(file):
    assert file.suffix == ".yaml"
    needed = {name: "W6A16" for name, value in arguments_of(file).items() if value is None}
    recipe = Recipe.of(file.stem, needed)
    assert recipe == Recipe.of(file, needed)
    assert Recipe.of(recipe.to_yaml()) == recipe


def test_the_shipped_recipe_is_the_designs():
    assert Recipe.of("awq-w4a16-asym") == Recipe.of(awq(group_size=128))


# What is refused.


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("awq-w4a16-asymm", r"did you mean 'awq-w4a16-asym'"),
        ("W4A16", r"did you mean 'w4a16'\?"),
        ("W4A16_ASYM", r"did you mean 'w4a16-asym'\?"),
        ("FP8_Dynamic", r"did you mean 'fp8-dynamic'\?"),
        # The name of a scheme alone finds what is made for it.
        ("w3a16", r"did you mean 'w3a16-best'\?"),
        ("w8a8", r"did you mean 'smoothquant-gptq-w8a8' or 'smoothquant-w8a8' or 'w8a8-dynamic' or 'w8a8-static'\?"),
        ("xyzzy", r"Known: attention-fp8, awq-w4a16, "),
    ],
)
def test_an_unknown_name_gets_a_suggestion(name, suggestion):
    with pytest.raises(BitpressError, match=rf"no recipe is called '{name}'.*({suggestion})"):
        Recipe.of(name)


@pytest.mark.parametrize(
    "source", [None, 3, {}, object(), AWQModifier, {"AWQModifier": {}}, b"x"], ids=lambda s: type(s).__name__
)
def test_what_is_no_recipe(source):
    with pytest.raises(BitpressError, match=r"is no recipe|not a modifier"):
        Recipe.of(source)


@pytest.mark.parametrize("source", [[], "", "  ", "\n"])
def test_an_empty_recipe(source):
    with pytest.raises(BitpressError, match="empty"):
        Recipe.of(source)


def test_what_is_no_modifier_is_named():
    with pytest.raises(BitpressError, match=r"recipe\[1\] is a int"):
        Recipe.of([QuantizationModifier(scheme="W4A16"), 3])
    with pytest.raises(BitpressError, match=r"recipe\[0\]\[1\] is a dict"):
        Recipe.of([[QuantizationModifier(scheme="W4A16"), {}]])
    with pytest.raises(BitpressError, match="no recipe is called 'AWQModifier'"):
        Recipe.of([QuantizationModifier(scheme="W4A16"), "AWQModifier"])


@pytest.mark.parametrize("name", ["no.yaml", "no/no.yml"])
def test_a_file_that_does_not_exist(name, tmp_path):
    for source in (name, tmp_path / name, tmp_path / "folder"):
        with pytest.raises(BitpressError, match="does not exist"):
            Recipe.of(source)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BitpressError, match=r"r\.yaml is not text"):
        Recipe.of(tmp_path / "r.yaml")


BAD = {
    "unknown modifier": (
        "- AWQModifier:\n    bits: 4\n- QuantisationModifier:\n    scheme: W4A16\n",
        3,
        "no modifier is called 'QuantisationModifier'; did you mean 'QuantizationModifier'",
    ),
    "unknown field": ("- AWQModifier:\n    bits: 4\n    simmetric: true\n", 3, "no field 'simmetric'; did you mean"),
    "field that is no name": ("- AWQModifier:\n    bits: 4\n    1: 2\n", 3, "no field '1'"),
    "value out of range": ("- AWQModifier:\n\n    bits: 9\n", 3, "bits: .*less than or equal to 8"),
    "value of a wrong type": ("- AWQModifier:\n    bits: many\n", 2, "bits: .*integer"),
    "unknown preset": (
        "- QuantizationModifier:\n    ignore: [lm_head]\n    scheme: W4A61\n",
        3,
        "no preset is called 'W4A61'; did you mean 'W4A16'",
    ),
    "value far inside": (
        "- QuantizationModifier:\n    config_groups:\n      g:\n        targets: [Linear]\n        weights:\n"
        "          num_bits: four\n",
        2,
        r"config_groups\.g\.weights\.num_bits: ",
    ),
    "unknown field of a scheme": (
        "- QuantizationModifier:\n    config_groups: {g: {targets: [Linear], weights: {num_bitz: 4}}}\n",
        2,
        r"config_groups\.g\.weights\.num_bitz",
    ),
    "nested": ("s_stage:\n  q_modifiers:\n    AWQModifier:\n      bitz: 4\n", 4, "did you mean 'bits'"),
    "fields that are a list": ("- AWQModifier: [bits]\n", 1, "are a mapping, not list"),
    "fields that are a number": ("- QuantizationModifier:\n    scheme: W4A16\n- AWQModifier: 4\n", 3, "not int"),
    "a bare name": ("- QuantizationModifier:\n    scheme: W4A16\n- AWQModifier\n", 3, "a modifier's name with"),
    "no YAML": ("- AWQModifier:\n    bits: [4\n", 3, "not YAML"),
    "a tab": ("- AWQModifier:\n\tbits: 4\n", 2, "not YAML"),
    "two documents": ("- AWQModifier:\n    bits: 4\n---\n- AWQModifier:\n", 3, "not YAML"),
    "an object": ("- AWQModifier:\n    bits: !!python/object/apply:os.getcwd []\n", 2, "not YAML"),
    "an unknown anchor": ("- AWQModifier:\n    bits: *four\n", 2, "not YAML"),
}


@pytest.mark.parametrize("case", BAD)
def test_yaml_that_is_wrong_is_refused_with_its_line(case, tmp_path):
    text, line, message = BAD[case]
    with pytest.raises(BitpressError, match=rf"^the recipe, line {line}: .*{message}") as error:
        Recipe.of(text)
    assert "\n" not in str(error.value)
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(BitpressError, match=rf"mine\.yaml, line {line}: .*{message}"):
        Recipe.of(tmp_path / "mine.yaml")


@pytest.mark.parametrize("text", ["# nothing\n", "3\n4\n", "\n- \n", "a: [\n"])
def test_yaml_without_modifiers(text):
    with pytest.raises(BitpressError):
        Recipe.of(text)


def test_a_recipe_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe.of(rtn()).modifiers = ()
