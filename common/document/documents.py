"""YAML documents: read once, checked once, all mistakes at once, each with its line.

YAML is read by PyYAML with the surprises taken out: `1e-5` is a number, `no` and dates are text, and a key
that stands twice is an error. `<<: *other` takes over the keys of another mapping that do not stand beside it.
Checking is pydantic's; `mistakes` turns its errors into sentences.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from common.document import mistakes
from common.document.mistakes import Key, Problem
from common.errors import ConfigError


class Document(BaseModel):
    """Base of everything that is read from a file: frozen, strict, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def contradictions(self) -> Iterator[Problem]:
        """Mistakes that no single value shows, as (key, sentence). Asked for once every value is valid."""
        yield from ()


def unless(usual: object) -> FieldInfo:
    """A field that is left out of the canonical text where it is as usual, as in documents older than the field."""
    info: FieldInfo = Field(exclude_if=lambda value: value == usual)
    return info


MERGE = "<<"
MOST_REPEATED = 1_000_000  # characters that aliases may add to what is written

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
    """A document as plain values, and the line at which each of them stands: where it is written, if it was taken over
    from another mapping."""

    def __init__(self, text: str) -> None:
        self.lines: dict[Key, int] = {}
        self.problems: list[Problem] = []
        self._left = 2 * len(text) + MOST_REPEATED  # a value is counted as one character more than it has
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            self.value = self._value(loader, node, ()) if node is not None else None
        finally:
            loader.dispose()

    def _value(self, loader: _Loader, node: yaml.Node, key: Key) -> Any:
        self.lines.setdefault(key, node.start_mark.line + 1)
        self._count(node)
        implied = loader.resolve(type(node), node.value, (True, False))  # type: ignore[no-untyped-call]  # PyYAML has no types
        if node.tag not in (implied, "tag:yaml.org,2002:str"):
            raise _refused(f"the tag {node.tag} is not accepted", node)
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            self._fill(mapping, loader, node, key)
            return mapping
        if isinstance(node, yaml.SequenceNode):
            return [self._value(loader, item, (*key, i)) for i, item in enumerate(node.value)]
        return loader.construct_object(node, deep=True)

    def _count(self, node: yaml.Node) -> None:
        """A few aliases of aliases can stand for billions of values."""
        self._left -= 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if self._left < 0:
            raise _refused(f"aliases that repeat more than {MOST_REPEATED:,} characters are not accepted", node)

    def _fill(self, mapping: dict[str, Any], loader: _Loader, node: yaml.MappingNode, key: Key) -> None:
        """Adds a node's keys to those that are there already, which stand beside a `<<` that names it, and win."""
        self._count(node)
        beside = set(mapping)
        merged: list[yaml.Node] = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refused("a key must be text", key_node)
            name: str = key_node.value  # as it is written: a class may be called true or 1.0
            line, here = key_node.start_mark.line + 1, (*key, name)
            if name == MERGE and key_node.style is None:  # not in quotes
                merged.append(value_node)
            elif name in mapping and name not in beside:
                self.problems.append((here, f"stands twice (again on line {line}); keep one of them"))
            elif name not in mapping:
                self.lines[here] = line
                mapping[name] = self._value(loader, value_node, here)
        if len(merged) > 1:
            raise _refused(f"{MERGE} stands twice; give one, with a list of mappings", merged[1])
        for other in merged:
            for each in other.value if isinstance(other, yaml.SequenceNode) else [other]:  # the first of a list wins
                if not isinstance(each, yaml.MappingNode):
                    raise _refused(f"{MERGE} must be given a mapping, or a list of mappings", each)
                self._fill(mapping, loader, each, key)

    def line(self, key: Key) -> int:
        """The line of `key`, or of the nearest thing around it that is in the file."""
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)


def _refused(reason: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=reason, problem_mark=node.start_mark)


def plain_value(text: str) -> Any:
    """A value as it would stand in a document. Raises ValueError."""
    try:
        read = _Text(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"not valid YAML: {str(error).splitlines()[0]}") from error
    if read.problems:
        raise ValueError("; ".join(f"{mistakes.dotted(key)} {sentence}" for key, sentence in read.problems))
    return read.value


def load(path: Path, model: type[D], *, changes: Mapping[Key, Any] | None = None) -> D:
    """Reads and checks one document.

    Args:
        changes: what stands in the place of some keys' values in the file.

    Raises:
        ConfigError: the file cannot be read, is no YAML, or has mistakes: all of them, in the file's order. Or a change
            is of a key in something that has no keys.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from error
    try:
        document = _Text(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = ", ".join(filter(None, [error.context, error.problem]))
        raise ConfigError([f"{place}: not valid YAML: {reason}"]) from error
    except RecursionError as error:
        raise ConfigError([f"{path}: not valid YAML: nested too deeply, or in itself"]) from error
    except (yaml.YAMLError, ValueError) as error:  # unprintable characters, a number of thousands of digits
        raise ConfigError([f"{path}: not valid YAML: {str(error).splitlines()[0]}"]) from error
    if not isinstance(document.value, dict):
        accepted = ", ".join(mistakes.fields_of(model))
        raise ConfigError(
            [f"{path}: expected a mapping with the keys {accepted}; found {mistakes.show(document.value)}"]
        )
    for key, value in (changes or {}).items():
        _put(document.value, key, value)
    problems = list(document.problems)
    checked: D | None = None
    try:
        checked = validate(document.value, model)
    except Mistakes as error:
        problems += error.problems
    if checked is not None and not problems:
        return checked
    located = sorted((document.line(key), mistakes.dotted(key), sentence) for key, sentence in problems)
    raise ConfigError([f"{path}:{line}: {key}{' ' if key else ''}{sentence}" for line, key, sentence in located])


def _put(value: dict[str, Any], key: Key, new: Any) -> None:
    """Replaces what is at a key. A mapping on the way there that is missing, or nothing, is made."""
    for depth, name in enumerate(key[:-1], start=1):
        inner = value.get(str(name))
        if inner is None:
            inner = value[str(name)] = {}
        if not isinstance(inner, dict):
            raise ConfigError(
                [f"{mistakes.dotted(key)}: {mistakes.dotted(key[:depth])} is not a mapping, and has no keys"]
            )
        value = inner
    value[str(key[-1])] = copy.deepcopy(new)  # into which other changes may go


class Mistakes(Exception):
    """What `validate` found, still with its keys, for callers that know better where they stand."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(f"{mistakes.dotted(key)} {sentence}".strip() for key, sentence in self.problems))


def validate(value: Any, model: type[D]) -> D:
    """Checks plain values against a model. Raises `Mistakes` with every problem."""
    try:
        # By way of JSON, whose strict mode takes lists for tuples and text for choices, and nothing else.
        checked = model.model_validate_json(json.dumps(value, default=str))
    except ValidationError as error:
        raise Mistakes(mistakes.explain(error, value, model)) from error
    contradictions = list(checked.contradictions())
    if contradictions:
        raise Mistakes(contradictions)
    return checked
