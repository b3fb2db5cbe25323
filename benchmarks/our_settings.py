"""--set FIELD=VALUE on a benchmark's command line: fields of our Config.

Imports nothing of ours before it is asked: a peer may want to be imported before anything else.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The flag."""
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="of our Config; kept as a case of its own"
    )


def settings_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[str]:
    """The words that give a case the same settings. Ends with a sentence where one makes no sense."""
    from grpo.errors import UserError

    try:
        fields_of(arguments.set)
    except (ValueError, UserError) as error:
        parser.error(str(error))
    return ["--set", *arguments.set] if arguments.set else []


def fields_of(settings: list[str]) -> dict[str, Any]:
    """FIELD=VALUE -> fields of Config.

    Raises:
        ValueError: it is none, or the value is not of its type. UserError: the value makes no sense.
    """
    from grpo.config import Config

    usual = dataclasses.asdict(Config())
    found: dict[str, Any] = {}
    for setting in settings:
        name, is_one, value = setting.partition("=")
        if not is_one or name not in usual:
            raise ValueError(f"--set takes FIELD=VALUE with a field of Config, such as recompute=none, not {setting}.")
        kind = type(usual[name])
        if kind is bool and value not in ("True", "False"):
            raise ValueError(f"{name} is True or False, not {value}.")
        found[name] = value == "True" if kind is bool else kind(value)
    Config(**found)
    return found
