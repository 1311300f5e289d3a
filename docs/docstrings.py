"""Check the docstrings of all public names: make lint runs this.

Public is what the packages below export, and what the classes among it have without a leading underscore.

- It has a docstring. A function's names all parameters (under "Args", or in the text), and under "Raises" the
  BitpressErrors and ValueErrors that its own code raises.
- A tensor that goes in or comes out has a shape: "(out, in)", "any shape", "the shape of ...".
- A class's docstring, or its bases', describes all fields (of pydantic, of dataclasses) under "Attributes".
- A solver names where it is from: a paper by its address, or another solver; what is the house's own says "Own".

What overrides a documented method need not say it again, nor what begins with another's name (":func:`gptq` of ...").
"""

import ast
import dataclasses
import importlib
import inspect
import logging
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import griffe
from pydantic import BaseModel

PACKAGES = (
    "bitpress",
    "bitpress.models",
    "bitpress.modifiers",
    "bitpress.quantization",
    "bitpress.runtime",
    "bitpress.solvers",
    "bitpress.statistics",
)
ERRORS = ("BitpressError", "ValueError")
SHAPE = re.compile(r"\([\w .*/:+-]*(?:,[\w .*/:+-]*)*\)|\bshapes?\b")
SOURCE = re.compile(r"https://|:func:|\bOwn\b")


def main() -> int:
    """Print what is missing, a line each; 1 if anything is."""
    logging.getLogger("griffe").setLevel(logging.ERROR)
    problems = sorted({f"{name}: {problem}" for name, value in public() for problem in check(name, value)})
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def public() -> Iterator[tuple[str, Any]]:
    """Every public name, those of methods too."""
    for full, value in exported():
        yield full, value
        if inspect.isclass(value):
            yield from ((f"{full}.{name}", member) for name, member in members(value))


def exported() -> Iterator[tuple[str, Any]]:
    """What the packages export and is bitpress' own, by the module that defines it."""
    seen: set[str] = set()
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            value = getattr(module, name)
            home = getattr(value, "__module__", "")
            full = f"{home}.{name}"
            if not home.startswith("bitpress") or full in seen:
                continue
            seen.add(full)
            yield full, value


def members(of: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class defines itself."""
    for name, value in vars(of).items():
        if name.startswith("_") or not (inspect.isroutine(value) or isinstance(value, (property, classmethod))):
            continue
        inherited = next((vars(base)[name] for base in of.__mro__[1:] if name in vars(base)), None)
        own = name not in getattr(of, "__dataclass_fields__", {})
        if own and (inherited is None or not getattr(inherited, "__doc__", None) or not value.__doc__):
            yield name, value


def check(name: str, value: Any) -> Iterator[str]:
    """What the docstring of a name lacks."""
    if isinstance(value, property):
        value = value.fget
    value = inspect.unwrap(getattr(value, "__func__", value))
    text = inspect.cleandoc(value.__doc__ or "")
    if inspect.isclass(value):
        if "__doc__" not in vars(value) or not text:
            yield "has no docstring"
        else:
            yield from fields_missing(value)
    elif inspect.isroutine(value):
        if not text:
            yield "has no docstring"
        else:
            yield from function_problems(name, value, text)


def fields_missing(of: type) -> Iterator[str]:
    """Fields that no docstring of the class and its bases describes."""
    documented = " ".join(f"{kind.__doc__ or ''}" for kind in of.__mro__)
    if issubclass(of, BaseModel):
        fields = list(of.model_fields)
    elif dataclasses.is_dataclass(of):
        fields = [f.name for f in dataclasses.fields(of) if not f.name.startswith("_")]
    else:
        return
    described = set(re.findall(r"^\s+([\w, ]+):", documented, re.MULTILINE))
    names = {name.strip() for each in described for name in each.split(",")}
    yield from (f"field {field} is not described" for field in fields if field not in names)


def function_problems(name: str, function: Callable[..., Any], text: str) -> Iterator[str]:
    """What a function's docstring lacks."""
    sections = griffe.Docstring(text).parse("google", warnings=False)
    described = {}
    for section in sections:
        if section.kind is griffe.DocstringSectionKind.parameters:
            described |= {p.name.lstrip("*"): p.description for p in section.value}
    prose = " ".join(s.value for s in sections if s.kind is griffe.DocstringSectionKind.text)
    raised = {str(e.annotation) for s in sections if s.kind is griffe.DocstringSectionKind.raises for e in s.value}
    delegates = re.match(r"(?:See )?:(?:func|meth|attr):", text) is not None
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
    for parameter in parameters:
        about = described.get(parameter.name)
        if about is None and not delegates and re.search(rf"``{parameter.name}\b", prose) is None:
            yield f"parameter {parameter.name} is not described"
        elif "Tensor" in str(parameter.annotation) and about is not None and not has_shape(about):
            yield f"parameter {parameter.name} is a tensor, and its shape is not said"
        elif "Tensor" in str(parameter.annotation) and about is None and not has_shape(prose):
            yield f"parameter {parameter.name} is a tensor, and no shape is said"
    returned = str(inspect.signature(function).return_annotation)
    if "Tensor" in returned and not is_delegated(text) and not has_shape(text):
        yield "returns a tensor, and its shape is not said"
    yield from (f"raises {error}, which is not under Raises" for error in raises(function) if error not in raised)
    if name.startswith("bitpress.solvers.") and not has_source(function, text):
        yield "names no source"


def is_delegated(text: str) -> bool:
    """True for what another docstring says: "See :func:`...`"."""
    return re.search(r":(?:func|meth|attr|class):", text) is not None


def has_shape(text: str) -> bool:
    """True if a text says a shape, or where it is said."""
    return SHAPE.search(text) is not None or is_delegated(text)


def has_source(function: Callable[..., Any], text: str) -> bool:
    """True if a solver, or its module, says where it is from."""
    return SOURCE.search(text) is not None or SOURCE.search(sys.modules[function.__module__].__doc__ or "") is not None


def raises(function: Callable[..., Any]) -> list[str]:
    """The errors of ours that the function's own code raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = (n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise))
    names = {c.func.id for c in calls if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)}
    return sorted(names.intersection(ERRORS))


if __name__ == "__main__":
    sys.exit(main())
