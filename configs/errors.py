"""What is told to users: errors with their exit codes, checks that raise them, and no secret in any of it."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from typing import Any

SECRET_NAMES = re.compile("(TOKEN|SECRET|PASSWORD|PASSWD|_PASS|_AUTH|API_?KEY|ACCESS_KEY|SECRET_KEY|PRIVATE_KEY|"
                          "WEBHOOK|(?<!GOOGLE_APPLICATION_)CREDENTIALS)$", re.IGNORECASE)  # that one is a path
# What is no secret to strike out: shorter values stand in any text (a 1, a flag), and a plain word in lower case, such
# as postgres for a password, stands in paths (/home/postgres) that must stay right. From 12 letters on it may be a
# pass phrase, and is no longer a word that paths hold by chance.
NO_SECRET = re.compile(r"[\s\S]{0,7}|[a-z]{8,11}")


def redacted(text: str) -> str:
    """`text` with `***` for the values of secret variables of the environment, and for what URLs keep secret."""
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name) and not NO_SECRET.fullmatch(value):
            text = text.replace(value, "***")
    return redacted_urls(text)


def redacted_urls(text: str) -> str:
    """https://user:password@host/a.zip?signature=abc -> https://***@host/a.zip?***"""
    text = re.sub(r"""(\w://)[^/\s?'"]*@""", r"\1***@", text)
    return re.sub(r"""(\w://[^\s?'"]*\?)[^\s'"]+""", r"\1***", text)


class UserError(ValueError):
    """Wrong input: one line that names the thing, its value, the rule and the way out. Exit code 2."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*_redacted_texts(arguments))


class EnvironmentFault(RuntimeError):
    """The machine or cluster failed us (disk full, worker lost for good), and another try would meet it again."""

    exit_code = 3

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*_redacted_texts(arguments))


def _redacted_texts(arguments: tuple[Any, ...]) -> list[Any]:
    """Of an error: it may be shown, logged and written down anywhere."""
    return [redacted(argument) if isinstance(argument, str) else argument for argument in arguments]


class SaveFault(EnvironmentFault):
    """Three checkpoints in a row could not be written."""

    exit_code = 4


class CrashLoop(EnvironmentFault):
    """Training failed three times without progress."""

    exit_code = 5


class Diverged(EnvironmentFault):
    """The state was not finite once more after all roll-backs a run may have."""

    exit_code = 6


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    require(value in allowed, f"{name}={value!r} is unknown{hint(value, allowed)} Use one of: {', '.join(allowed)}.")


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def refuse_login(name: str, location: str) -> None:
    """UserError for a URL that holds a user or password: settings are written into the run folder."""
    require("@" not in re.split("[/?#]", location.partition("://")[2], maxsplit=1)[0],
            f"{name} holds a user and password, which would be written down. Put them into ~/.netrc "
            "(http) or the environment (AWS_ACCESS_KEY_ID, ...), and leave them out here.")


def refuse_query(name: str, location: str) -> None:
    require("://" not in location or "?" not in location,
            f"{name}={location!r} has a query, which the files below it cannot have. Give the folder's URL alone.")


def hint(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
