"""Finding: what is so on this machine, how much it weighs, and one remedy. Knows nothing of what is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from grpo.errors import WHAT_USER_CODE_RAISES, UserError, in_words

# stops: a run would not start. hinders: it would start, but slower than it could, with something else than was meant,
# or not get to its end. note: good to know. fine: as it should be.
Weight = Literal["stops", "hinders", "note", "fine"]
WEIGHTS: tuple[Weight, ...] = ("stops", "hinders", "note", "fine")
LONGEST = 600  # characters of what a library says was wrong


@dataclass(frozen=True)
class Finding:
    """A sentence or two for the user."""

    weight: Weight
    subject: str  # a word: what it is about
    told: str
    remedy: str = ""  # one thing to do; empty where there is nothing to mend


def ordered(findings: list[Finding]) -> list[Finding]:
    """The heaviest first, else as they were found."""
    return sorted(findings, key=lambda finding: WEIGHTS.index(finding.weight))


def would_start(findings: list[Finding]) -> bool:
    return not any(finding.weight == "stops" for finding in findings)


@contextmanager
def found(findings: list[Finding], subject: str, remedy: str = "") -> Iterator[None]:
    """Inside, whatever is raised is a finding that stops a run: a UserError as it is (its sentences say what to do), of
    anything else what it is, with this remedy. Ctrl-C is passed on."""
    try:
        yield
    except UserError as error:
        findings.append(Finding("stops", subject, shortened(str(error))))
    except WHAT_USER_CODE_RAISES as error:
        findings.append(Finding("stops", subject, f"{shortened(in_words(error))}.", remedy))


def shortened(text: str) -> str:
    """A library's error may be pages."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def looked(look: Callable[..., Any], *given: Any) -> Any:
    """What a look at the system gives; None where that cannot be had (a file that may not be read, a library's own)."""
    try:
        return look(*given)
    except Exception:
        return None
