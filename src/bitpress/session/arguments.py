"""Arguments of a recipe: names with defaults, and ``${name}`` where their values go.

``args: {group_size: 128}`` at the top of the YAML states them. ``group_size: ${group_size}`` is the value itself, of
whatever type; within other text it is written out. In a flow collection a placeholder is quoted: ``{bits: "${bits}"}``.
``$${`` stands for the characters ``${``. Nothing is evaluated.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from bitpress.errors import BitpressError
from bitpress.modifiers.base import nearest

ARGUMENTS = "args"
_PLACEHOLDER = re.compile(r"\$\$\{|\$\{([^}]*)\}?")


def split_arguments(root: yaml.Node | None) -> tuple[yaml.Node | None, yaml.Node | None]:
    """The node of the arguments, None if there are none, and the recipe without it."""
    if isinstance(root, yaml.MappingNode):
        stated = [value for key, value in root.value if key.value == ARGUMENTS]
        rest = [(key, value) for key, value in root.value if key.value != ARGUMENTS]
        if stated:
            return stated[-1], yaml.MappingNode(root.tag, rest, root.start_mark, root.end_mark)
    return None, root


def defaults(loader: yaml.SafeLoader, stated: yaml.Node | None, where: str) -> dict[str, Any]:
    """The arguments with their defaults; None for one that has to be given.

    Raises:
        BitpressError: they are no mapping; with its line.
    """
    if stated is None:
        return {}
    found: Any = loader.construct_object(stated, deep=True)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise BitpressError(f"{where}, line {line(stated)}: {ARGUMENTS} is a mapping of names to defaults.")
    return found


def fill_in(
    loader: yaml.SafeLoader, root: yaml.Node | None, given: Mapping[str, Any] | None, where: str
) -> yaml.Node | None:
    """The recipe with every placeholder replaced.

    Args:
        loader: makes values of nodes.
        root: the whole recipe, with its arguments.
        given: values in place of the defaults: scalars, lists and mappings as YAML has them.
        where: the recipe's name, for errors.

    Raises:
        BitpressError: an argument that is unknown, has no value or is not used, a placeholder that names none, a list
            within text; with its line.
    """
    stated, recipe = split_arguments(root)
    values = defaults(loader, stated, where)
    at = where if stated is None else f"{where}, line {line(stated)}"
    for name, value in as_mapping(given).items():
        if not values:
            raise BitpressError(f"{where} has no arguments, but {name!r} is given.")
        if name not in values:
            raise BitpressError(f"{at}: no argument is called {name!r}{nearest(str(name), list(values))}")
        values[name] = value
    missing = next((name for name, value in values.items() if value is None), None)
    if missing is not None:
        raise BitpressError(
            f"{where}, line {_lines(stated)[missing]}: argument {missing!r} has no value: give "
            f"recipe_args={{{missing!r}: ...}}, on the command line --arg {missing}=VALUE."
        )
    filling = _Filling(values, where)
    filled = None if recipe is None else filling.replace(recipe)
    unused = next((name for name in values if name not in filling.used), None)
    if unused is not None:
        raise BitpressError(f"{where}, line {_lines(stated)[unused]}: argument {unused!r} is used nowhere.")
    return filled


def escaped(value: Any) -> Any:
    """``value`` (strings, lists, mappings) with every ``${`` in a string written so that it is read as it stands."""
    if isinstance(value, str):
        return value.replace("${", "$${")
    if isinstance(value, list):
        return [escaped(item) for item in value]
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    return value


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """``name=value``, as the command line has it, to names and values; a value is read as YAML.

    Raises:
        BitpressError: no ``=``, or a value that is not YAML.
    """
    found: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise BitpressError(f"--arg {assignment}: the value is not YAML.") from error
        if not equals or value is None:
            raise BitpressError(f"--arg {assignment} has no value: write --arg {name.strip() or 'NAME'}=VALUE.")
        found[name.strip()] = value
    return found


def line(node: yaml.Node) -> int:
    """The line of a node, from 1 on."""
    return int(node.start_mark.line) + 1


class _Filling:
    """Replaces placeholders; remembers which arguments were used, and what an anchor has become."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where
        self.used: set[str] = set()
        self._done: dict[int, tuple[yaml.Node, yaml.Node]] = {}

    def replace(self, node: yaml.Node) -> yaml.Node:
        if id(node) not in self._done:
            # The node is kept, so that no other takes its identity.
            self._done[id(node)] = node, self._scalar(node) if isinstance(node, yaml.ScalarNode) else node
            if isinstance(node, yaml.SequenceNode):
                node.value = [self.replace(item) for item in node.value]
            elif isinstance(node, yaml.MappingNode):
                node.value = [(key, self.replace(item)) for key, item in node.value]
        return self._done[id(node)][1]

    def _scalar(self, node: yaml.ScalarNode) -> yaml.Node:
        whole = _PLACEHOLDER.fullmatch(node.value)
        if whole is not None and whole[1] is not None:
            return self._node(self._value(whole, node), node)
        text = _PLACEHOLDER.sub(lambda found: "${" if found[1] is None else self._text(found, node), node.value)
        return node if text == node.value else yaml.ScalarNode(node.tag, text, node.start_mark, node.end_mark)

    def _value(self, found: re.Match[str], node: yaml.Node) -> Any:
        name = found[1].strip()
        at = f"{self.where}, line {line(node)}"
        if not found[0].endswith("}"):
            raise BitpressError(f"{at}: {found[0]!r} is not closed; write $${{ for the characters themselves.")
        if name not in self.values:
            known = nearest(name, list(self.values)) if self.values else f": state it under {ARGUMENTS}:."
            raise BitpressError(f"{at}: no argument is called {name!r}{known}")
        self.used.add(name)
        return self.values[name]

    def _text(self, found: re.Match[str], node: yaml.Node) -> str:
        value = self._value(found, node)
        if isinstance(value, (list, tuple, dict)):
            raise BitpressError(
                f"{self.where}, line {line(node)}: {found[0]} is a {type(value).__name__}, which cannot stand within "
                "text."
            )
        return str(value).lower() if isinstance(value, bool) else str(value)

    def _node(self, value: Any, at: yaml.Node) -> yaml.Node:
        try:
            node = yaml.SafeLoader(yaml.safe_dump(value)).get_single_node()
        except yaml.YAMLError as error:
            kind = type(value).__name__
            raise BitpressError(
                f"{self.where}, line {line(at)}: a value of type {kind} cannot be an argument: give a number, text, a "
                "truth value, or a list or mapping of them."
            ) from error
        assert node is not None  # noqa: S101
        return node


def as_mapping(given: Any) -> Mapping[str, Any]:
    """Values for arguments: a mapping, or texts ``name=value``; empty for None.

    Raises:
        BitpressError: neither.
    """
    if isinstance(given, (list, tuple)) and all(isinstance(each, str) for each in given):
        return parse_assignments(given)
    if given is None or isinstance(given, Mapping):
        return given or {}
    raise BitpressError(f"recipe_args is a {type(given).__name__}: give a mapping of names to values.")


def _lines(stated: yaml.Node | None) -> dict[str, int]:
    return {str(key.value): line(key) for key, _ in stated.value} if stated is not None else {}
