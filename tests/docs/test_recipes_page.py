"""docs/recipes.md says what the recipes' comments say; what it shows of a recipe loads."""

import importlib.util
import re
from pathlib import Path

import pytest

from bitpress import Recipe
from bitpress.session.recipe import shipped_recipes

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("recipes_page", DOCS / "recipes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(script):
    assert script.PAGE.read_text() == script.page(shipped_recipes()), "run python docs/recipes.py"


def test_every_recipe_is_on_it_once(script):
    assert sorted(name for names in script.GROUPS.values() for name in names) == sorted(shipped_recipes())


def test_comments_have_a_use_and_a_cost(script):
    for file in shipped_recipes().values():
        use, cost = script.about(file)
        assert len(use) > 40
        assert len(cost) > 10


def test_the_recipe_that_it_shows_loads():
    (text,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "recipes.md").read_text(), re.DOTALL)
    awq, gptq = Recipe.of(text, {"layers": "0|1", "bits": 3}).modifiers
    assert awq.n_grid == 40
    groups = gptq.config_groups
    assert groups["some"].targets == [r"re:.*layers\.(0|1)\..*proj$"]
    assert (groups["some"].weights.num_bits, groups["others"].weights.num_bits) == (8, 3)
