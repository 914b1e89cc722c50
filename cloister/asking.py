"""Questions on a terminal, for a verb that can also be told all by its options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import typer

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Asking:
    """Puts questions to whoever is there, or takes the defaults."""

    enabled: bool

    def answer(
        self, given: str | None, option: str, question: str, check: Callable[[str], Answer], *, default: str | None
    ) -> Answer:
        """What was `given` for an option, or else what is answered to the question.

        Args:
            check: makes of it what is meant, or raises `ValueError`; who answered is then asked again.
            default: what is meant by no answer, or where nobody can be asked; None if there must be one.

        Raises:
            ConfigError: what was given does not pass, or there is neither an answer nor a default.
        """
        from common.errors import ConfigError

        if given is None and self.enabled:
            return _asked(question, check, default)
        text = default if given is None else given
        if text is None:
            raise ConfigError([f"{option} is missing"])
        try:
            return check(text)
        except ValueError as error:
            raise ConfigError([f"{option} {error} (got {text})"]) from error


def _asked(question: str, check: Callable[[str], Answer], default: str | None) -> Answer:
    def checked(text: str) -> Answer:
        try:
            return check(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error

    answered: Answer = typer.prompt(question, default=default, value_proc=checked, err=True)
    return answered
