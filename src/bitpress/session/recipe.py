"""Recipes: modifiers in order, and the same as YAML.

YAML is a list with one entry per modifier, ``- AWQModifier: {bits: 4}``. The nested form of other tools of the field,
``stage: {modifiers: {AWQModifier: {...}}}``, is read too.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bitpress.errors import BitpressError
from bitpress.modifiers.base import FieldError, Modifier, nearest

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Recipe:
    """The modifiers of one compression, in order."""

    modifiers: tuple[Modifier, ...]

    @classmethod
    def of(cls, source: "RecipeLike") -> "Recipe":
        """A recipe from a modifier, a list of them, a YAML file or text, or the name of a recipe that is shipped.

        Raises:
            BitpressError: nothing of the kind; an unknown modifier, field or value, with its line in the YAML.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Modifier):
            return cls((source,))
        if isinstance(source, (str, os.PathLike)):
            return cls._from_text_or_file(source)
        if not isinstance(source, Sequence):
            raise BitpressError(f"a {type(source).__name__} is no recipe: give modifiers, a YAML file or a name.")
        if not source:
            raise BitpressError("the recipe is empty: give at least one modifier.")
        for index, item in enumerate(source):
            if not isinstance(item, Modifier):
                raise BitpressError(f"recipe[{index}] is a {type(item).__name__}, not a modifier.")
        return cls(tuple(m for m in source if isinstance(m, Modifier)))

    @classmethod
    def _from_text_or_file(cls, source: str | os.PathLike[str]) -> "Recipe":
        text = os.fspath(source)
        if not text.strip():
            raise BitpressError("the recipe is empty: give at least one modifier.")
        if isinstance(source, os.PathLike) or ("\n" not in text and text.endswith(SUFFIXES)):
            return cls._from_file(Path(text).expanduser())
        if "\n" in text or ":" in text.replace(":\\", ""):
            return cls.from_yaml(text)
        if Path(text).is_file():
            return cls._from_file(Path(text))
        shipped = shipped_recipes()
        if text not in shipped:
            raise BitpressError(f"no recipe is called {text!r}{nearest(text, list(shipped))}")
        return cls.from_yaml(shipped[text].read_text(), f"{text}.yaml")

    @classmethod
    def _from_file(cls, path: Path) -> "Recipe":
        if not path.is_file():
            raise BitpressError(f"the recipe file {path} does not exist.")
        try:
            text = path.read_text(encoding="utf-8")
        except ValueError as error:
            raise BitpressError(f"the recipe file {path} is not text: {error}") from error
        return cls.from_yaml(text, str(path))

    @classmethod
    def from_yaml(cls, text: str, where: str = "the recipe") -> "Recipe":
        """Read YAML; see the module's docstring for its form."""
        try:
            loader = yaml.SafeLoader(text)
            node = loader.get_single_node()
        except yaml.YAMLError as error:
            raise _not_yaml(error, where) from error
        found = tuple(_build(loader, key, value, where) for key, value in _entries(node, where))
        if not found:
            raise BitpressError(f"{where} names no modifier.")
        return cls(found)

    def to_yaml(self) -> str:
        """The recipe as YAML; :meth:`from_yaml` reads it back."""
        entries = [{type(m).__name__: m.model_dump(mode="json", exclude_unset=True)} for m in self.modifiers]
        text: str = yaml.safe_dump(entries, sort_keys=False, width=100)
        return text


RecipeLike = Recipe | Modifier | Sequence[Modifier] | str | os.PathLike[str]


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    package = Path(__file__).resolve().parents[1]
    folder = next((f for f in (package.parents[1] / "recipes", package / "recipes") if f.is_dir()), None)
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))} if folder else {}


def _entries(node: yaml.Node | None, where: str) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """The (name, fields) nodes of the modifiers, of either form."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            if not isinstance(item, yaml.MappingNode):
                raise BitpressError(f"{where}, line {_line(item)}: expected a modifier's name with its fields.")
            yield from item.value
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            nested = isinstance(value, (yaml.MappingNode, yaml.SequenceNode)) and str(key.value).endswith(
                ("stage", "modifiers")
            )
            yield from _entries(value, where) if nested else [(key, value)]
    else:
        raise BitpressError(f"{where} holds no list of modifiers.")


def _build(loader: yaml.SafeLoader, key: yaml.Node, value: yaml.Node, where: str) -> Modifier:
    name = str(key.value)
    at = f"{where}, line {_line(key)}"
    if name not in Modifier.known:
        raise BitpressError(f"{at}: no modifier is called {name!r}{nearest(name, list(Modifier.known))}")
    try:
        fields: Any = loader.construct_object(value, deep=True)
    except yaml.YAMLError as error:
        raise _not_yaml(error, where) from error
    if fields is None:
        fields = {}
    if not isinstance(fields, dict):
        raise BitpressError(f"{at}: the fields of {name} are a mapping, not {type(fields).__name__}.")
    try:
        return Modifier.known[name](**{str(field): stated for field, stated in fields.items()})
    except FieldError as error:
        lines = {str(k.value): _line(k) for k, _ in value.value}
        raise BitpressError(f"{where}, line {lines.get(error.field, _line(key))}: {error}") from error


def _not_yaml(error: yaml.YAMLError, where: str) -> BitpressError:
    mark = getattr(error, "problem_mark", None)
    line = f", line {mark.line + 1}" if mark is not None else ""
    return BitpressError(f"{where}{line}: not YAML: {getattr(error, 'problem', None) or error}")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
