"""A strategy that a Python package brings: from its name in the document to its class (docs/extending.md).

A document holds no code, and none travels: it names an entry point of the group `cloister.strategies` and the version
of the package, both of which the fingerprint covers. The package has to be installed where the server runs.
"""

from __future__ import annotations

import difflib
import inspect
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from flwr.serverapp.strategy import FedAvg

from common.document.strategy import Installed
from common.errors import ConfigError

GROUP = "cloister.strategies"
HOW = "docs/extending.md says how to add one"


def build(chosen: Installed, **how: Any) -> FedAvg:
    """The strategy that the document names, with its parameters and `how` Flower's FedAvg is to ask.

    Raises:
        ConfigError: no installed package has it, or several, or another version; it cannot be imported; it is no
            subclass of FedAvg; its constructor has no such parameters, or does not accept their values (`ValueError`).
    """
    kind = load(chosen)
    _check_parameters(kind, chosen)
    parameters: dict[str, Any] = {**how, **chosen.parameters}
    try:
        return kind(**parameters)
    except ValueError as error:
        raise ConfigError([f"strategy.parameters: {chosen.entry_point}: {error}"]) from error


def load(chosen: Installed) -> type[FedAvg]:
    """The class that the document names. Raises `ConfigError` as `build` does."""
    entry = _entry(chosen)
    found = entry.dist.version if entry.dist is not None else "none"
    if found != chosen.version:
        raise ConfigError(
            [
                f"strategy.version: the document names {chosen.version} of what brings {chosen.entry_point}, and this "
                f"Python has {found}; install that version, or agree on a document that names this one"
            ]
        )
    try:
        kind = entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError([f"strategy.entry_point: {entry.value} cannot be imported: {error}"]) from error
    if not (isinstance(kind, type) and issubclass(kind, FedAvg)):
        raise ConfigError([f"strategy.entry_point: {entry.value} must be a subclass of flwr.serverapp.strategy.FedAvg"])
    return kind


def _entry(chosen: Installed) -> EntryPoint:
    known = entry_points(group=GROUP)
    found = [entry for entry in known if entry.name == chosen.entry_point]
    if len(found) == 1:
        return found[0]
    if found:
        packages = ", ".join(sorted(entry.dist.name for entry in found if entry.dist is not None))
        raise ConfigError([f"strategy.entry_point: several packages bring {chosen.entry_point}: {packages}; keep one"])
    names = sorted({entry.name for entry in known})
    near = difflib.get_close_matches(chosen.entry_point, names, n=1)
    there = f"installed: {', '.join(names)}" if names else "none is installed"
    raise ConfigError(
        [
            f"strategy.entry_point: no package that is installed here brings {chosen.entry_point} in the group {GROUP} "
            f"({there}){f'; did you mean {near[0]}?' if near else ''}; {HOW}"
        ]
    )


def _check_parameters(kind: type[FedAvg], chosen: Installed) -> None:
    """Looks at the constructor's own parameters: those of FedAvg are the round loop's to choose."""
    shared = set(inspect.signature(FedAvg).parameters)
    own = {
        name: parameter
        for name, parameter in inspect.signature(kind).parameters.items()
        if name not in shared and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }
    accepted = f"{chosen.entry_point} has {', '.join(own) or 'none'}"
    problems = [f"strategy.parameters.{n}: is not known; {accepted}" for n in chosen.parameters if n not in own]
    problems += [
        f"strategy.parameters.{name}: is missing; {accepted}"
        for name, parameter in own.items()
        if parameter.default is parameter.empty and name not in chosen.parameters
    ]
    if problems:
        raise ConfigError(problems)
