"""Mistakes in a document, as sentences: what was found, what is accepted and, for an unknown key, the nearest
known one. pydantic finds them; unions and their tags need some help to be told as one mistake each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

Key = tuple[str | int, ...]  # where a value stands: ("schema", "features", 0, "bounds")
Problem = tuple[Key, str]

# Text that a reader would take for a number, a boolean or nothing, so it is shown in quotes.
LOOKS_LIKE_MORE = re.compile(r"\s*|[-+.]?\d[-+.\deE]*|true|false|null|~", re.IGNORECASE)


def explain(error: ValidationError, value: Any, model: type[BaseModel]) -> Iterator[Problem]:
    """Every mistake that `model` found in `value`, a document as plain values."""
    sentences: dict[Key, list[str]] = {}
    wrong_kind: set[Key] = set()
    for item in error.errors(include_url=False):
        if item["type"] == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]:
            continue  # pydantic does not count entries that have mistakes of their own
        key = _key(item["loc"], value)
        if item["type"].startswith("union_tag"):
            key = (*key, item["ctx"]["discriminator"].strip("'"))
        if item["type"].endswith("_type") or item["type"] == "literal_error":
            wrong_kind.add(key)
        sentences.setdefault(key, []).append(_sentence(dict(item), key, value, model))
    for key, said in sentences.items():
        # A union reports one mistake once for each of its members; the one that fits best went deepest.
        deeper = any(other[: len(key)] == key and other != key for other in sentences)
        if not (deeper and key in wrong_kind):
            yield key, _either(said)


def _either(sentences: list[str]) -> str:
    """What the members of a union ask for, as one sentence."""
    for sentence in sentences:
        if sentence.startswith("must be a finite number"):
            return sentence
    asked = [sentence.partition(" (got ") for sentence in dict.fromkeys(sentences)]
    if len(asked) == 1 or not all(sentence.startswith("must be ") for sentence, *_ in asked):
        return sentences[0]
    kinds = [sentence.removeprefix("must be ") for sentence, *_ in asked]
    if "a number" in kinds and "a whole number" in kinds:
        kinds.remove("a whole number")
    listed = " or ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]]))
    return f"must be {listed} (got {asked[0][2]}"


def _key(loc: tuple[int | str, ...], value: Any) -> Key:
    """pydantic's location without the names of union members, which do not stand in the file."""
    key: list[str | int] = []
    for i, part in enumerate(loc):
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and part in range(len(value))):
            key.append(part)
            value = value[part]  # type: ignore[index]  # a list has numbers, a mapping names
        elif isinstance(value, dict) and i == len(loc) - 1:
            key.append(part)  # a key that is missing
    return tuple(key)


def _sentence(item: dict[str, Any], key: Key, document: Any, model: type[BaseModel]) -> str:
    kind, context, found = item["type"], item.get("ctx", {}), show(item["input"])
    if kind == "missing":
        return f"has too few entries (got {found})" if isinstance(item["loc"][-1], int) else "is missing"
    if kind == "extra_forbidden":
        return _unknown(key, document, _members(model, key[:-1], document))
    if kind == "union_tag_not_found":
        tags = [tag for member in _members(model, key[:-1], document) for tag in _tags(member).get(str(key[-1]), ())]
        return f"is missing; it is one of {', '.join(tags)}"
    context = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in context.items()}
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
        "too_short": "must have {min_length} or more entries",
        "too_long": "must have {max_length} or fewer entries",
        "string_too_short": "must not be empty",
        "string_pattern_mismatch": "must match {pattern}",
        "literal_error": "must be one of {expected}",
        "union_tag_invalid": "must be one of {expected_tags}",
        "none_required": "must be null",
    }.get(kind)
    if kind == "union_tag_invalid":
        found = show(context.get("tag"))
    if kind == "value_error":
        return f"{context['error']} (got {found})"
    sentence = (
        accepted.format(**context) if accepted else "is not accepted: " + item["msg"][0].lower() + item["msg"][1:]
    )
    near = difflib.get_close_matches(found, re.findall(r"'([^']+)'", sentence), n=1) if " one of " in sentence else []
    return f"{sentence} (got {found}{f'; did you mean {near[0]}?' if near else ''})"


def _unknown(key: Key, document: Any, members: list[Any]) -> str:
    name = str(key[-1])
    if owners := [member for member in members if name in fields_of(member)]:  # of another member of a union
        for part in key[:-1]:
            document = document[part]
        rivals = [other for other in document if not any(other in fields_of(owner) for owner in owners)]
        return f"cannot stand beside {', '.join(rivals)}"
    known = list(dict.fromkeys(field for member in members for field in fields_of(member)))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
    return f"is an unknown key; {hint}"


def _members(model: type[BaseModel], key: Key, document: Any) -> list[Any]:
    """The models that may stand at `key`: several in a union, unless its tag says which is meant."""
    members: list[Any] = [model]
    for part in key:
        document = document[part]
        members = [m for member in members for m in _inside(member, part)]
        tagged = isinstance(document, dict)
        fit = [m for m in members if tagged and all(document.get(k) in tags for k, tags in _tags(m).items())]
        members = fit or members
    return members


def _inside(annotation: Any, part: str | int) -> Iterator[Any]:
    """The members of what stands at `part` of a model, a list or a mapping."""
    if fields := fields_of(annotation):
        yield from _flat(fields[str(part)].annotation)
    else:
        arguments = get_args(annotation)
        yield from _flat(arguments[0] if isinstance(part, int) else arguments[-1])


def _flat(annotation: Any) -> Iterator[Any]:
    """The members of a union, or what is no union itself."""
    if get_origin(annotation) is Annotated:
        yield from _flat(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _flat(member)
    elif annotation is not type(None):
        yield annotation


def fields_of(model: Any) -> dict[str, FieldInfo]:
    """A model's fields by the names that stand in a file."""
    return {field.alias or name: field for name, field in getattr(model, "model_fields", {}).items()}


def _tags(model: Any) -> dict[str, tuple[Any, ...]]:
    """The fields by which a union tells its members apart, and what they say in this one."""
    return {k: get_args(f.annotation) for k, f in fields_of(model).items() if get_origin(f.annotation) is Literal}


def dotted(key: Key) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".")


def show(value: Any) -> str:
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
    if isinstance(value, str) and LOOKS_LIKE_MORE.fullmatch(value):
        text = f'"{value}"'
    return text if len(text) <= 60 else text[:57] + "..."
