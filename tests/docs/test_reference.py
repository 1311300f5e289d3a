"""The reference names all that is public; the check of docstrings finds what is missing."""

import importlib.util
import re

import pages
import pytest

from bitpress import BitpressError

pytest.importorskip("griffe", reason='the check reads docstrings with griffe: pip install ".[docs]"')


@pytest.fixture(scope="module")
def lint():
    spec = importlib.util.spec_from_file_location("docstrings", pages.ROOT / "docs" / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_names_all_that_is_public(lint):
    text = (pages.ROOT / "docs" / "reference.md").read_text()
    for full, _ in lint.exported():
        module, _, name = full.rpartition(".")
        of_module = re.search(rf"^::: {re.escape(module)}\n.*\n +members: \[(.*)\]$", text, re.MULTILINE)
        assert f"::: {full}\n" in text or (of_module and name in of_module[1].split(", ")), full


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no docstring"),
        ("Do it.", "parameter weight is not described"),
        ("Do it.\n\nArgs:\n    weight: the weight.", "its shape is not said"),
        ("Do it.\n\nArgs:\n    weight: (out, in).\n", "raises BitpressError"),
        ("Do it.\n\nArgs:\n    weight: (out, in).\n\nRaises:\n    BitpressError: always.", None),
    ],
)
def test_what_is_missing_is_found(lint, text, problem):
    def refuse(weight: "Tensor"):  # noqa: F821
        raise BitpressError("no")

    refuse.__doc__ = text
    found = list(lint.check("bitpress.refuse", refuse))
    assert (found == []) if problem is None else any(problem in each for each in found), found


def test_a_solver_without_a_source_is_found(lint):
    def solve():
        """Solve it."""

    assert list(lint.check("bitpress.solvers.solve", solve)) == ["names no source"]
