"""Recipes: modifiers in order, and the same as YAML.

YAML is a list with one entry per modifier, ``- AWQModifier: {bits: 4}``. The nested form of llm-compressor,
``quant_stage: {quant_modifiers: {AWQModifier: {...}}}``, is read too: see :mod:`bitpress.modifiers.foreign` for what it
may say. A recipe with arguments is a mapping of ``args`` and ``modifiers``: see :mod:`bitpress.session.arguments`.
"""

import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bitpress.errors import BitpressError, nearest_file
from bitpress.modifiers.base import FieldError, Modifier, nearest
from bitpress.modifiers.foreign import ABSENT
from bitpress.session.arguments import as_mapping, defaults, escaped, fill_in, line, split_arguments

SUFFIXES = (".yaml", ".yml", ".json")
# Between the names of recipes that are joined.
JOINED = "+"
# Keys that hold modifiers, or stages of them.
_NESTED = re.compile(r"(stage|modifiers)(_\d+)?$")
_OBJECT = "tag:yaml.org,2002:python/"


@dataclass(frozen=True)
class Recipe:
    """The modifiers of one compression, in order.

    Attributes:
        modifiers: the steps, as they are taken.
    """

    modifiers: tuple[Modifier, ...]

    @classmethod
    def of(cls, source: "RecipeLike", args: Mapping[str, Any] | Sequence[str] | None = None) -> "Recipe":
        """A recipe from a modifier, a YAML file or text, the name of a recipe that is shipped, or a list of these.

        Args:
            source: one of these. Names, and files, are joined by a plus, too: "w4a16-balanced+kv-cache-fp8".
            args: values for the arguments of YAML recipes, in place of their defaults: a mapping, or texts
                ``name=value``. Of several recipes each takes those that it has.

        Raises:
            BitpressError: nothing of the kind; an unknown modifier, field, value or argument, with its line in the
                YAML; arguments for a recipe that is not YAML.
        """
        parts = list(_parts(source))
        written = [part for part in parts if isinstance(part, _Written)]
        if args and not written:
            raise BitpressError(
                "recipe_args are for recipes in YAML: this one is made of modifiers, which take their fields at once."
            )
        if isinstance(source, Recipe):
            return source
        shares = iter(_share(written, args))
        found: list[Modifier] = []
        for part in parts:
            read = (
                (part,) if isinstance(part, Modifier) else cls.from_yaml(part.text, part.where, next(shares)).modifiers
            )
            found.extend(read)
        return cls(tuple(found))

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


RecipeLike = Recipe | Modifier | str | os.PathLike[str] | Sequence["Recipe | Modifier | str | os.PathLike[str]"]


@dataclass(frozen=True)
class _Written:
    """YAML, and what errors call it."""

    text: str
    where: str = "the recipe"


def _parts(source: Any, place: str = "") -> Iterator[Modifier | _Written]:
    """The modifiers, and the YAML that states others, in order."""
    if isinstance(source, Recipe):
        yield from source.modifiers
    elif isinstance(source, Modifier):
        yield source
    elif isinstance(source, (str, os.PathLike)):
        yield from _texts(source)
    elif isinstance(source, Sequence) and not isinstance(source, bytes):
        if not source:
            raise BitpressError("the recipe is empty: give at least one modifier.")
        for index, item in enumerate(source):
            yield from _parts(item, f"{place}[{index}]")
    elif place:
        raise BitpressError(f"recipe{place} is a {type(source).__name__}, not a modifier.")
    else:
        raise BitpressError(f"a {type(source).__name__} is no recipe: give modifiers, a YAML file or a name.")


def _texts(source: str | os.PathLike[str]) -> Iterator[_Written]:
    text = os.fspath(source)
    if not text.strip():
        raise BitpressError("the recipe is empty: give at least one modifier.")
    if isinstance(source, os.PathLike):
        yield _of_file(Path(text).expanduser())
        return
    named = "\n" not in text and text.endswith(SUFFIXES)
    if not named and ("\n" in text or ":" in text.replace(":\\", "")):
        yield _Written(text)
    elif Path(text).expanduser().is_file():
        yield _of_file(Path(text).expanduser())
    elif JOINED in text:
        for part in text.split(JOINED):
            yield from _texts(part.strip())
    else:
        yield _of_file(Path(text).expanduser()) if named else _shipped(text)


def _of_file(path: Path) -> _Written:
    if not path.is_file():
        raise BitpressError(f"the recipe file {path} does not exist{nearest_file(path) or '.'}")
    try:
        return _Written(path.read_text(encoding="utf-8"), str(path))
    except ValueError as error:
        raise BitpressError(f"the recipe file {path} is not text: {error}") from error


def _shipped(name: str) -> _Written:
    shipped = shipped_recipes()
    if name in shipped:
        return _Written(shipped[name].read_text(encoding="utf-8"), f"{name}.yaml")
    plain = name.lower().replace("_", "-")
    # The name of a scheme, which several recipes have in theirs.
    close = [known for known in shipped if plain in known]
    if plain in shipped or not close:
        raise BitpressError(f"no recipe is called {name!r}{nearest(plain, list(shipped))}")
    raise BitpressError(f"no recipe is called {name!r}; did you mean {' or '.join(map(repr, close))}?")


def _share(written: Sequence[_Written], args: Mapping[str, Any] | Sequence[str] | None) -> list[Mapping[str, Any]]:
    """The arguments of each recipe: all of them where there is one, else those that it has.

    Raises:
        BitpressError: none of several has one of them.
    """
    given = as_mapping(args)
    if len(written) < 2:
        return [given for _ in written]
    known = [_arguments(each.text, each.where) if given else {} for each in written]
    unknown = next((name for name in given if not any(name in names for names in known)), None)
    if unknown is not None:
        everything = sorted({name for names in known for name in names})
        raise BitpressError(
            f"{', '.join(each.where for each in written)}: no argument is called {unknown!r}"
            f"{nearest(unknown, everything) if everything else '.'}"
        )
    return [{name: value for name, value in given.items() if name in names} for names in known]


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    package = Path(__file__).resolve().parents[1]
    folder = next((f for f in (package.parents[1] / "recipes", package / "recipes") if f.is_dir()), None)
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))} if folder else {}


def arguments_of(file: Path) -> dict[str, Any]:
    """The arguments of a recipe in a YAML file, with their defaults."""
    return _arguments(file.read_text(encoding="utf-8"), str(file))


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        loader = yaml.SafeLoader(text)
        return defaults(loader, split_arguments(loader.get_single_node())[0], where)
    except yaml.YAMLError as error:
        raise _not_yaml(error, where) from error


def _entries(node: yaml.Node | None, where: str) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """The (name, fields) nodes of the modifiers, of either form."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            if not isinstance(item, yaml.MappingNode):
                raise BitpressError(f"{where}, line {line(item)}: expected a modifier's name with its fields.")
            yield from item.value
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            nested = isinstance(value, (yaml.MappingNode, yaml.SequenceNode)) and _NESTED.search(str(key.value))
            if nested:
                yield from _entries(value, where)
            elif not _is_run_type(key, value, where):
                yield key, value
    else:
        raise BitpressError(f"{where} holds no list of modifiers.")


def _is_run_type(key: yaml.Node, value: yaml.Node, where: str) -> bool:
    """True for what llm-compressor's stages say of themselves.

    Raises:
        BitpressError: the stage is one of training.
    """
    if key.value == "run_type" and value.value != "oneshot":
        raise BitpressError(f"{where}, line {line(key)}: run_type {value.value!r}: bitpress compresses at once only.")
    return bool(key.value == "run_type")


def _build(loader: yaml.SafeLoader, key: yaml.Node, value: yaml.Node, where: str) -> Modifier:
    name = str(key.value)
    at = f"{where}, line {line(key)}"
    if name not in Modifier.known and name in ABSENT:
        raise BitpressError(f"{at}: llm-compressor's {name} is not there: {ABSENT[name]}.")
    if name not in Modifier.known:
        raise BitpressError(f"{at}: no modifier is called {name!r}{nearest(name, list(Modifier.known))}")
    _name_objects(value, Modifier.known[name].foreign)
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


def _name_objects(fields: yaml.Node, foreign: Container[str]) -> None:
    """llm-compressor writes a device as an object of Python: in a field that is not used here its name will do."""
    for i, (key, value) in enumerate(fields.value if isinstance(fields, yaml.MappingNode) else ()):
        if key.value in foreign and value.tag.startswith(_OBJECT):
            text = value.tag.removeprefix(_OBJECT)
            fields.value[i] = key, yaml.ScalarNode("tag:yaml.org,2002:str", text, value.start_mark, value.end_mark)


def _not_yaml(error: yaml.YAMLError, where: str) -> BitpressError:
    mark = getattr(error, "problem_mark", None)
    at = f", line {mark.line + 1}" if mark is not None else ""
    return BitpressError(f"{where}{at}: not YAML: {getattr(error, 'problem', None) or error}")
