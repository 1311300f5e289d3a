"""Recipes: modifiers in order, and the same as YAML.

YAML is a list with one entry per modifier, ``- AWQModifier: {bits: 4}``. The nested form of other tools of the field,
``stage: {modifiers: {AWQModifier: {...}}}``, is read too. A recipe with arguments is a mapping of ``args`` and
``modifiers``: see :mod:`bitpress.session.arguments`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bitpress.errors import BitpressError
from bitpress.modifiers.base import FieldError, Modifier, nearest
from bitpress.session.arguments import defaults, escaped, fill_in, line, split_arguments

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Recipe:
    """The modifiers of one compression, in order.

    Attributes:
        modifiers: the steps, as they are taken.
    """

    modifiers: tuple[Modifier, ...]

    @classmethod
    def of(cls, source: "RecipeLike", args: Mapping[str, Any] | None = None) -> "Recipe":
        """A recipe from a modifier, a list of them, a YAML file or text, or the name of a recipe that is shipped.

        Args:
            source: one of these.
            args: values for the arguments of a YAML recipe, in place of their defaults.

        Raises:
            BitpressError: nothing of the kind; an unknown modifier, field, value or argument, with its line in the
                YAML; arguments for a recipe that is not YAML.
        """
        if isinstance(source, (str, os.PathLike)):
            return cls._from_text_or_file(source, args)
        if args:
            raise BitpressError(
                "recipe_args are for recipes in YAML: this one is made of modifiers, which take their fields at once."
            )
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Modifier):
            return cls((source,))
        if not isinstance(source, Sequence):
            raise BitpressError(f"a {type(source).__name__} is no recipe: give modifiers, a YAML file or a name.")
        if not source:
            raise BitpressError("the recipe is empty: give at least one modifier.")
        for index, item in enumerate(source):
            if not isinstance(item, Modifier):
                raise BitpressError(f"recipe[{index}] is a {type(item).__name__}, not a modifier.")
        return cls(tuple(m for m in source if isinstance(m, Modifier)))

    @classmethod
    def _from_text_or_file(cls, source: str | os.PathLike[str], args: Mapping[str, Any] | None) -> "Recipe":
        text = os.fspath(source)
        if not text.strip():
            raise BitpressError("the recipe is empty: give at least one modifier.")
        if isinstance(source, os.PathLike) or ("\n" not in text and text.endswith(SUFFIXES)):
            return cls._from_file(Path(text).expanduser(), args)
        if "\n" in text or ":" in text.replace(":\\", ""):
            return cls.from_yaml(text, args=args)
        if Path(text).is_file():
            return cls._from_file(Path(text), args)
        shipped = shipped_recipes()
        if text not in shipped:
            raise BitpressError(f"no recipe is called {text!r}{nearest(text, list(shipped))}")
        return cls.from_yaml(shipped[text].read_text(encoding="utf-8"), f"{text}.yaml", args)

    @classmethod
    def _from_file(cls, path: Path, args: Mapping[str, Any] | None) -> "Recipe":
        if not path.is_file():
            raise BitpressError(f"the recipe file {path} does not exist.")
        try:
            text = path.read_text(encoding="utf-8")
        except ValueError as error:
            raise BitpressError(f"the recipe file {path} is not text: {error}") from error
        return cls.from_yaml(text, str(path), args)

    @classmethod
    def from_yaml(cls, text: str, where: str = "the recipe", args: Mapping[str, Any] | None = None) -> "Recipe":
        """Read YAML; see the module's docstring for its form.

        Args:
            text: the YAML.
            where: what it is called in errors.
            args: see :meth:`of`.

        Raises:
            BitpressError: it is no YAML, or not a recipe's; what :meth:`of` refuses; with the line.
        """
        try:
            loader = yaml.SafeLoader(text)
            node = fill_in(loader, loader.get_single_node(), args, where)
        except yaml.YAMLError as error:
            raise _not_yaml(error, where) from error
        found = tuple(_build(loader, key, value, where) for key, value in _entries(node, where))
        if not found:
            raise BitpressError(f"{where} names no modifier.")
        return cls(found)

    def to_yaml(self) -> str:
        """The recipe as YAML; :meth:`from_yaml` reads it back."""
        entries = [{type(m).__name__: escaped(m.model_dump(mode="json", exclude_unset=True))} for m in self.modifiers]
        text: str = yaml.safe_dump(entries, sort_keys=False, width=100)
        return text


RecipeLike = Recipe | Modifier | Sequence[Modifier] | str | os.PathLike[str]


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    package = Path(__file__).resolve().parents[1]
    folder = next((f for f in (package.parents[1] / "recipes", package / "recipes") if f.is_dir()), None)
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))} if folder else {}


def arguments_of(file: Path) -> dict[str, Any]:
    """The arguments of a recipe in a YAML file, with their defaults."""
    loader = yaml.SafeLoader(file.read_text(encoding="utf-8"))
    return defaults(loader, split_arguments(loader.get_single_node())[0], str(file))


def _entries(node: yaml.Node | None, where: str) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """The (name, fields) nodes of the modifiers, of either form."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            if not isinstance(item, yaml.MappingNode):
                raise BitpressError(f"{where}, line {line(item)}: expected a modifier's name with its fields.")
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
    at = f"{where}, line {line(key)}"
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
        lines = {str(k.value): line(k) for k, _ in value.value}
        raise BitpressError(f"{where}, line {lines.get(error.field, line(key))}: {error}") from error


def _not_yaml(error: yaml.YAMLError, where: str) -> BitpressError:
    mark = getattr(error, "problem_mark", None)
    at = f", line {mark.line + 1}" if mark is not None else ""
    return BitpressError(f"{where}{at}: not YAML: {getattr(error, 'problem', None) or error}")
