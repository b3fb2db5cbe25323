"""Attempt: one call of a reward, whatever comes of it: scores, or Missing for each completion that it scores.

Knows nothing of completions or of processes. Comes without torch, because worker processes run it too.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from grpo.errors import WHAT_USER_CODE_RAISES, Stopped, in_words
from grpo.rewards.kept import kept
from grpo.rewards.values import Missing, Score, Unfit

ADVICE = "A crash or a time-out is never scored 0: mend the reward, or let it return None where it does not apply."
_LONGEST_TRACE = 4000  # characters
_OURS = str(Path(__file__).parents[1])  # where the frames lie that lead to the reward


def attempt(call: Callable[[], list[Score | Missing]], members: Sequence[int]) -> list[Score | Missing]:
    """What a call gives, which leaves everything else as it was. Ctrl-C goes on through it, and a copy of the process
    that it has forked ends here."""
    process, error = os.getpid(), None
    try:
        with kept():
            return call()
    except BaseException as caught:  # a class of the user's own may be no Exception
        error = caught
        return [_unless_ctrl_c(error)] * len(members)
    finally:
        if os.getpid() != process:
            _end_copy(error)


def _unless_ctrl_c(error: BaseException) -> Missing:
    if type(error) in (KeyboardInterrupt, Stopped):
        raise error
    return missing_for(error)


def missing_for(error: BaseException) -> Missing:
    """What a call gave that raised."""
    if isinstance(error, Unfit):
        return error.missing()
    return Missing(f"raised {in_words(error)} on", ADVICE, _trace(error), error)


def _trace(error: BaseException) -> str:
    """The traceback, without the frames that lead to the reward."""
    first: Any = error.__traceback__
    while first and first.tb_next and first.tb_frame.f_code.co_filename.startswith(_OURS):
        first = first.tb_next
    with suppress(*WHAT_USER_CODE_RAISES):  # it asks the error for more than its text
        return "".join(traceback.format_exception(type(error), error, first)).rstrip()[-_LONGEST_TRACE:]
    return ""


def _end_copy(error: BaseException | None) -> None:
    """A second process must not go on with the run, nor clean up what is the first one's."""
    if error is not None and not isinstance(error, SystemExit):
        traceback.print_exception(error)
    os._exit(1 if error else 0)
