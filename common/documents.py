"""YAML documents: read once, checked once, all mistakes at once, each with its line.

YAML is read by PyYAML with the surprises taken out: `1e-5` is a number, `no` and dates are text, and a key
that stands twice is an error. Checking is pydantic's; this module turns its errors into sentences that say
where, what was found, what is accepted and, for an unknown key, the nearest known one.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import ConfigError

Key = tuple[str | int, ...]  # where a value stands: ("schema", "features", 0, "bounds")
Problem = tuple[Key, str]


class Document(BaseModel):
    """Base of everything that is read from a file: frozen, strict, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def contradictions(self) -> Iterator[Problem]:
        """Mistakes that no single value shows, as (key, sentence). Asked for once every value is valid."""
        yield from ()


D = TypeVar("D", bound=Document)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's idea of numbers and booleans."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
]:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(f"^(?:{_pattern})$"),
        list(_first) + ([""] if _tag == "null" else []),
    )


class _Text:
    """A document as plain values, and the line at which each of them stands."""

    def __init__(self, text: str) -> None:
        self.lines: dict[Key, int] = {}
        self.problems: list[Problem] = []
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            self.value = self._value(loader, node, ()) if node is not None else None
        finally:
            loader.dispose()

    def _value(self, loader: _Loader, node: yaml.Node, key: Key) -> Any:
        self.lines.setdefault(key, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            mapping: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                name = str(loader.construct_object(key_node, deep=True))
                here = (*key, name)
                if name in mapping:
                    line = key_node.start_mark.line + 1
                    self.problems.append((here, f"stands twice (again on line {line}); keep one of them"))
                    continue
                self.lines[here] = key_node.start_mark.line + 1
                mapping[name] = self._value(loader, value_node, here)
            return mapping
        if isinstance(node, yaml.SequenceNode):
            return [self._value(loader, item, (*key, i)) for i, item in enumerate(node.value)]
        return loader.construct_object(node, deep=True)

    def line(self, key: Key) -> int:
        """The line of `key`, or of the nearest thing around it that is in the file."""
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)


def load(path: Path, model: type[D]) -> D:
    """Reads and checks one document.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or has mistakes: all of them, in the file's order.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from error
    try:
        document = _Text(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or str(error)
        raise ConfigError([f"{place}: not valid YAML: {reason}"]) from error
    if not isinstance(document.value, dict):
        accepted = ", ".join(model.model_fields)
        raise ConfigError([f"{path}: expected a mapping with the keys {accepted}; found {_show(document.value)}"])
    problems = list(document.problems)
    checked: D | None = None
    try:
        checked = validate(document.value, model)
    except Mistakes as error:
        problems += error.problems
    if checked is not None and not problems:
        return checked
    located = sorted((document.line(key), _dotted(key), sentence) for key, sentence in problems)
    raise ConfigError([f"{path}:{line}: {key}{' ' if key else ''}{sentence}" for line, key, sentence in located])


class Mistakes(Exception):
    """What `validate` found, still with its keys, for callers that know better where they stand."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(f"{_dotted(key)} {sentence}" for key, sentence in self.problems))


def validate(value: Any, model: type[D]) -> D:
    """Checks plain values against a model. Raises `Mistakes` with every problem."""
    try:
        # By way of JSON, whose strict mode takes lists for tuples and text for choices, and nothing else.
        checked = model.model_validate_json(json.dumps(value, default=str))
    except ValidationError as error:
        raise Mistakes(_explain(error, value, model)) from error
    contradictions = list(checked.contradictions())
    if contradictions:
        raise Mistakes(contradictions)
    return checked


def _explain(error: ValidationError, value: Any, model: type[BaseModel]) -> Iterator[Problem]:
    seen: set[Key] = set()
    for item in error.errors(include_url=False):
        key = _key(item["loc"], value)
        if key in seen:  # a union reports one mistake once for each of its members
            continue
        seen.add(key)
        yield key, _sentence(dict(item), key, value, model)


def _key(loc: tuple[int | str, ...], value: Any) -> Key:
    """pydantic's location without the names of union members, which do not stand in the file."""
    key: list[str | int] = []
    for i, part in enumerate(loc):
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and part in range(len(value))):
            key.append(part)
            value = value[part]  # type: ignore[index]
        elif isinstance(value, dict) and i == len(loc) - 1:
            key.append(part)  # a key that is missing
    return tuple(key)


def _sentence(item: dict[str, Any], key: Key, document: Any, model: type[BaseModel]) -> str:
    kind, context, found = item["type"], item.get("ctx", {}), _show(item["input"])
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        known = _known_keys(model, key[:-1], document)
        near = difflib.get_close_matches(str(key[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"is an unknown key; {hint}"
    if kind == "union_tag_not_found":
        return f"is missing; one of {context['discriminator']} decides what else is accepted here"
    accepted = {
        "greater_than": "must be greater than {gt}",
        "greater_than_equal": "must be at least {ge}",
        "less_than": "must be less than {lt}",
        "less_than_equal": "must be at most {le}",
        "finite_number": "must be a finite number",
        "float_type": "must be a number",
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "string_type": "must be text",
        "bool_type": "must be true or false",
        "dict_type": "must be a mapping",
        "model_type": "must be a mapping",
        "model_attributes_type": "must be a mapping",
        "tuple_type": "must be a list",
        "list_type": "must be a list",
        "too_short": "must have at least {min_length} entries",
        "too_long": "must have at most {max_length} entries",
        "string_too_short": "must not be empty",
        "string_pattern_mismatch": "must match {pattern}",
        "literal_error": "must be one of {expected}",
        "union_tag_invalid": "must be one of {expected_tags}",
        "none_required": "must be null",
    }.get(kind)
    if kind == "union_tag_invalid":
        found = _show(context.get("tag"))
    if kind == "value_error":
        return f"{context['error']} (got {found})"
    sentence = (
        accepted.format(**context) if accepted else "is not accepted: " + item["msg"][0].lower() + item["msg"][1:]
    )
    near = difflib.get_close_matches(found, re.findall(r"'([^']+)'", sentence), n=1) if " one of " in sentence else []
    return f"{sentence} (got {found}{f'; did you mean {near[0]}?' if near else ''})"


def _known_keys(model: type[BaseModel], key: Key, document: Any) -> list[str]:
    """The keys that the model accepts at `key`."""
    annotation: Any = model
    for part in key:
        document = document[part]
        if isinstance(part, int):
            annotation = next((a for a in get_args(annotation) if a is not Ellipsis), None)
        elif fields := getattr(_member(annotation, None), "model_fields", None):
            annotation = fields[part].annotation
        else:
            annotation = get_args(annotation)[-1]
        annotation = _member(annotation, document)
    return list(getattr(annotation, "model_fields", {}))


def _member(annotation: Any, document: Any) -> Any:
    """The member of a union (also inside Annotated) that a mapping means, by its tag."""
    if get_origin(annotation) is not None and hasattr(annotation, "__metadata__"):
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Union or type(annotation).__name__ == "UnionType":
        members = [m for m in map(lambda a: _member(a, document), get_args(annotation)) if m is not type(None)]
        for member in members:
            for name, field in getattr(member, "model_fields", {}).items():
                if get_origin(field.annotation) is Literal and isinstance(document, dict):
                    if document.get(name) in get_args(field.annotation):
                        return member
        return members[0]
    return annotation


def _dotted(key: Key) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".")


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        text = str(value)
        return text if len(text) < 40 else f"a list of {len(value)}"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
