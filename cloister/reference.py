"""The reference pages of the federation file and of the client file, from the models that check them.

`make docs` writes them. What a setting means is the comment at its field; its class's first paragraph heads the table.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

from client.account.policy import Policy
from client.settings import ClientFile, DataFile, EnergySource, TLSFiles
from common.document import augmentation, group, schedule, schema, strategy
from common.document import federation as document
from common.document.documents import Document

PAGES: dict[str, tuple[str, str, list[tuple[str, type[Document]]]]] = {
    "federation-file": (
        "The federation file",
        "What all parties agree on before any row is touched. It holds no code and no path. The server sends it to "
        "each client, which checks it, shows its fingerprint and asks its owner's policy. "
        "[simulations/heart/federation.yaml](../simulations/heart/federation.yaml) is one. `cloister schema draft "
        "DATA.CSV` writes a first schema for a human to edit. `cloister check FILE` names every mistake at once, with "
        "its line, and warns of settings whose clipped steps cannot carry a model far enough to learn "
        "([measured](privacy.md#measured-how-far-clipped-steps-reach)).",
        [
            ("", document.Federation),
            ("schema", schema.Schema),
            ("schema.features, a number", schema.Numeric),
            ("schema.features, a category", schema.Categorical),
            ("schema.image", schema.Image),
            ("schema.group", group.Group),
            ("schema.target, classes", schema.Classes),
            ("schema.target, a number", schema.NumericTarget),
            ("model", document.Model),
            ("start", document.Start),
            ("training", document.Training),
            ("training.early_stopping", document.EarlyStopping),
            ("training.augmentation", augmentation.Augmentation),
            ("schedule", schedule.Constant),
            *(
                (f"schedule, {kind.__name__.lower()}", kind)
                for kind in (schedule.Step, schedule.Exponential, schedule.Cosine, schedule.Plateau)
            ),
            ("strategy", strategy.FedAvg),
            *(
                (f"strategy, {kind.__name__.lower()}", kind)
                for kind in (
                    strategy.FedAvgM,
                    strategy.FedAdam,
                    strategy.FedAdagrad,
                    strategy.FedYogi,
                    strategy.FedProx,
                    strategy.FedTrimmedAvg,
                    strategy.Krum,
                    strategy.MultiKrum,
                    strategy.Bulyan,
                    strategy.QFedAvg,
                    strategy.Agnostic,
                    strategy.Installed,
                )
            ),
            ("privacy", document.Privacy),
            ("privacy.row", document.RowPrivacy),
            ("privacy.client", document.ClientPrivacy),
            ("privacy.client.adaptive", document.AdaptiveClip),
            ("privacy.evaluation", document.Evaluation),
            ("wire", document.Wire),
        ],
    ),
    "client-file": (
        "The client file",
        "What is local to one data owner: the server's address, certificates, the table, and the policy that every "
        "federation must keep to. Paths are relative to the file's folder. [The data owner's guide](data-owner.md) "
        "says how to choose. `cloister check FILE` names every mistake at once, and, with `federation`, checks the "
        "table.",
        [("", ClientFile), ("tls", TLSFiles), ("data", DataFile), ("policy", Policy), ("energy", EnergySource)],
    ),
}
# By all kinds of one thing.
SHARED = {"strategy": set(strategy.FedAvg.model_fields), "schedule": set(schedule.Constant.model_fields)}
ELSEWHERE = "see below"


def page(name: str) -> str:
    """One page as Markdown."""
    title, about, sections = PAGES[name]
    out = [
        f"# {title}",
        "",
        *textwrap.wrap(about, 120, break_long_words=False, break_on_hyphens=False),
        "",
        "Written from the models that check it, by `make docs`.",
        "",
    ]
    for heading, model in sections:
        part, _, kind = heading.partition(", ")
        out += _section(heading, model, SHARED[part] if kind and part in SHARED else set())
    return "\n".join(out).rstrip() + "\n"


def _section(heading: str, model: type[Document], skipped: set[str]) -> list[str]:
    first = inspect.cleandoc(model.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    said = first if "__doc__" in vars(model) and model.__doc__ else ""
    shape, comments = model.model_json_schema(by_alias=True), _comments(model)
    rows = []
    for name, field in model.model_fields.items():
        if name in skipped:
            continue
        key = field.alias or name
        usual = "required" if field.is_required() else f"`{_plain(field.get_default())}`"
        if not field.is_required() and isinstance(field.get_default(), Document):
            usual = ELSEWHERE
        accepted = _accepted(shape["properties"][key])
        rows.append(f"| `{key}` | {accepted} | {usual} | {comments.get(name, '')} |")
    table = ["| key | accepted | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]
    return [*([f"## {heading}", ""] if heading else []), *([said, ""] if said else []), *table]


def _comments(model: type[Document]) -> dict[str, str]:
    """What stands beside each field, or in lines of their own above it."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if not (issubclass(kind, Document) and kind is not Document):
            continue
        above: list[str] = []
        for line in inspect.getsource(kind).splitlines():
            code, _, comment = line.partition("# ")
            if not code.strip() and comment:
                above.append(comment.strip())
                continue
            name = code.split(":")[0].strip()
            if name in kind.model_fields and code.startswith("    ") and not code.startswith("     "):
                found[name] = " ".join([*above, comment.strip()]).strip() or found.get(name, "")
            above = []
    return found


def _accepted(shape: dict[str, Any]) -> str:
    """What a value may be, of a piece of JSON schema."""
    if "anyOf" in shape or "oneOf" in shape:
        kinds = [_accepted(one) for one in shape.get("anyOf", shape.get("oneOf", []))]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in shape:
        return ELSEWHERE
    if "const" in shape:
        return f"`{shape['const']}`"
    if "enum" in shape:
        return ", ".join(f"`{value}`" for value in shape["enum"])
    kind = shape.get("type", "any")
    if kind == "array":
        return _list(shape)
    if kind == "object":
        return "a mapping"
    words = {"null": "`null`", "boolean": "`true`, `false`", "string": "text", "integer": "a whole number"}
    return words.get(kind, "a number" if kind == "number" else kind) + _bounds(shape)


def _list(shape: dict[str, Any]) -> str:
    if "prefixItems" in shape:
        return f"a list of {len(shape['prefixItems'])}: {_accepted(shape['prefixItems'][0])}"
    return f"a list: {_accepted(shape['items'])}"


def _bounds(shape: dict[str, Any]) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    said = [f"{sign} {shape[name]:.16g}" for name, sign in signs.items() if name in shape]
    return f" {' and '.join(said)}" if said else ""


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def main(folder: Path = Path("docs")) -> None:
    for name in PAGES:
        (folder / f"{name}.md").write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
