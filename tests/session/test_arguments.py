"""Arguments of recipes: what is put in, and what is refused."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bitpress import BitpressError, QuantizationModifier, Recipe
from bitpress.session.arguments import escaped, fill_in, parse_assignments
from bitpress.session.recipe import arguments_of, shipped_recipes

RECIPE = """\
# A comment.
args:
  bits: 4
  size: 128
  ignore: [lm_head]
  layer: 0
modifiers:
- QuantizationModifier:
    ignore: ${ignore}
    targets: ["re:.*layers\\\\.${layer}\\\\..*_proj$"]
    config_groups:
      g: {targets: [Linear], weights: {num_bits: "${bits}", group_size: "${ size }"}}
"""


def only(args=None, text=RECIPE):
    (modifier,) = Recipe.of(text, args).modifiers
    return modifier


def test_defaults_are_filled_in():
    modifier = only()
    weights = modifier.config_groups["g"].weights
    assert (weights.num_bits, weights.group_size) == (4, 128)
    assert modifier.ignore == ["lm_head"]
    assert modifier.targets == [r"re:.*layers\.0\..*_proj$"]


def test_what_is_given_takes_the_place_of_a_default():
    modifier = only({"bits": 3, "size": -1, "ignore": ["a", "b"], "layer": "[0-3]"})
    weights = modifier.config_groups["g"].weights
    assert (weights.num_bits, weights.group_size, weights.strategy) == (3, -1, "channel")
    assert modifier.ignore == ["a", "b"]
    assert modifier.targets == [r"re:.*layers\.[0-3]\..*_proj$"]


def test_what_is_saved_has_the_values():
    recipe = Recipe.of(RECIPE, {"size": 64})
    saved = recipe.to_yaml()
    assert "$" not in saved.replace("_proj$", "")
    assert Recipe.of(saved) == recipe


def test_one_recipe_serves_several_values():
    assert only({"size": 32}) != only({"size": 64})
    assert only() == only({})


def test_files_and_names_take_arguments(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    assert Recipe.of(tmp_path / "r.yaml", {"size": 64}) == Recipe.of(RECIPE, {"size": 64})
    weights = Recipe.of("w4a16-balanced", {"group_size": 64}).modifiers[-1].config_groups["group_0"].weights
    assert (weights.group_size, weights.actorder) == (64, "static")


def test_the_nested_form_takes_arguments():
    text = "args: {bits: 3}\na_stage:\n  m_modifiers:\n    AWQModifier: {bits: '${bits}', group_size: 32}\n"
    assert only(text=text).bits == 3


@pytest.mark.parametrize("name", ["w4a16-fast", "w4a16-balanced", "w4a16-best"])
def test_the_named_qualities_take_the_same_arguments(name):
    common = {"bits": 4, "group_size": 128, "symmetric": False, "ignore": ["lm_head"]}
    found = arguments_of(shipped_recipes()[name])
    assert {argument: found.get(argument) for argument in common} == common
    assert sum(line.startswith("#") for line in shipped_recipes()[name].read_text().splitlines()) <= 3


# Properties of filling in.

text = st.text(st.sampled_from("ab$ {}:#-'\"\n\\%!&*"), max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3))


def filled(document, args):
    loader = yaml.SafeLoader(yaml.safe_dump(document))
    node = fill_in(loader, loader.get_single_node(), args, "r")
    return loader.construct_object(node, deep=True)


@settings(deadline=None)
@given(values.filter(lambda v: v is not None))
def test_an_argument_keeps_its_type(value):
    found = filled({"args": {"x": 1}, "at": ["${x}", {"in": "${x}"}]}, {"x": value})
    assert found == {"at": [value, {"in": value}]}
    assert type(found["at"][0]) is type(value)


@settings(deadline=None)
@given(values)
def test_what_is_escaped_is_read_as_it_stands(value):
    assert filled([escaped(value)], None) == [value]


@settings(deadline=None)
@given(text, text, text)
def test_within_text_it_is_put_between(before, value, after):
    document = {"args": {"x": 1}, "at": escaped(before + "<") + "${x}" + escaped(">" + after)}
    assert filled(document, {"x": value}) == {"at": f"{before}<{value}>{after}"}


# What is refused.

QUANTIZE = "modifiers:\n- QuantizationModifier:\n    scheme: "

REFUSED = {
    "unknown": (RECIPE, {"sise": 64}, 3, "no argument is called 'sise'; did you mean 'size'"),
    "names no argument": (f"args:\n  a: W4A16\n{QUANTIZE}${{b}}\n", {}, 5, "no argument is called 'b'"),
    "close to one": (f"args:\n  preset: W4A16\n{QUANTIZE}${{prest}}\n", {}, 5, "did you mean 'preset'"),
    "no arguments are stated": ("- AWQModifier:\n    bits: ${bits}\n", {}, 2, "'bits': state it under args:"),
    "no value": (f"args:\n  a:\n{QUANTIZE}${{a}}\n", {}, 2, "'a' has no value: give recipe_args="),
    "value taken away": (f"args:\n  a: W4A16\n{QUANTIZE}${{a}}\n", {"a": None}, 2, "'a' has no value"),
    "not used": (f"args:\n  b: 1\n{QUANTIZE}W4A16\n", {}, 2, "'b' is used nowhere"),
    "not closed": (f"args:\n  a: W4A16\n{QUANTIZE}${{a\n", {}, 5, "is not closed"),
    "a list in text": (f"args:\n  a: [1]\n{QUANTIZE}W${{a}}\n", {}, 5, "a list, which cannot stand within text"),
    "a list of names": (f"args: [a, b]\n{QUANTIZE}W4A16\n", {}, 1, "args is a mapping"),
    "not plain": (RECIPE, {"bits": object()}, 12, "type object cannot be an argument"),
    "a value that does not fit": (f"args:\n  a: W4A16\n{QUANTIZE}${{a}}\n", {"a": "W4A61"}, 5, "did you mean 'W4A16'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_with_its_line(case):
    recipe, args, line, message = REFUSED[case]
    with pytest.raises(BitpressError, match=rf"^the recipe, line {line}: .*{message}") as error:
        Recipe.of(recipe, args)
    assert "\n" not in str(error.value)


def test_arguments_for_a_recipe_without_any():
    with pytest.raises(BitpressError, match=r"awq-w4a16-asym-g64\.yaml has no arguments, but 'bits' is given"):
        Recipe.of("awq-w4a16-asym-g64", {"bits": 4})


@pytest.mark.parametrize("source", [QuantizationModifier(scheme="W4A16"), Recipe.of("w8a16")], ids=type)
def test_arguments_for_modifiers(source):
    for recipe in (source, [source]):
        with pytest.raises(BitpressError, match="recipe_args are for recipes in YAML"):
            Recipe.of(recipe, {"bits": 4})


def test_arguments_that_are_no_mapping():
    with pytest.raises(BitpressError, match="recipe_args is a set"):
        Recipe.of(RECIPE, {"bits=3"})


def test_arguments_as_texts():
    assert Recipe.of(RECIPE, ["bits=3", "size = 64"]) == Recipe.of(RECIPE, {"bits": 3, "size": 64})
    with pytest.raises(BitpressError, match="--arg bits has no value"):
        Recipe.of(RECIPE, ["bits"])


def test_nothing_is_evaluated():
    with pytest.raises(BitpressError, match="not YAML"):
        Recipe.of("args: {a: !!python/object/apply:os.getcwd []}\nmodifiers: []\n")
    with pytest.raises(BitpressError, match=r"no argument is called '2 \* size'"):
        Recipe.of(RECIPE.replace("${ size }", "${2 * size}"))


def test_assignments_are_read_as_yaml():
    parsed = parse_assignments(["a=4", "b=[x, y]", "c=true", "d=re:.*=1$", "e='4'", "f=[]"])
    assert parsed == {"a": 4, "b": ["x", "y"], "c": True, "d": "re:.*=1$", "e": "4", "f": []}
