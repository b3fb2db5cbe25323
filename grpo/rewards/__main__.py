"""The command `python -m grpo.rewards`: which rewards there are, what one pays for a text, what it had paid in a run.

    python -m grpo.rewards                                            every reward at hand
    python -m grpo.rewards --module my_rewards.py                     those of a file or a module too
    python -m grpo.rewards math --completion "It is 42." --answer 42  what one pays for one text
    python -m grpo.rewards math --on runs/gsm8k-...                   a run's completions, scored by another reward

Bad input ends with one sentence and exit code 2.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Annotated, Any

import tyro
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from grpo.errors import Stopped, UserError, nearest
from grpo.terminal import console, leave_a_broken_pipe, plain, plain_logs, say

PROGRAM = "python -m grpo.rewards"


@dataclass(frozen=True)
class Options:
    """List the rewards at hand, or score a text, or the completions of a run, with one of them.

    Exit codes: 0 done; 2 bad input, told in a sentence.
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")] = ""
    """The reward: its name in the list, or package.module:function. Without one, the list."""
    completion: str | None = None
    """The text to score; - reads it from standard input."""
    answer: str | None = None
    """The column `answer`, which most rewards compare with."""
    column: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Any column, as name=text, or name:=JSON for a value that is no text. May be given several times."""
    prompt: str = ""
    """What was asked, for rewards that read it."""
    module: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A Python file or a module whose rewards are at hand too. May be given several times."""
    task: str | None = None
    """A task file: its rewards are at hand too."""
    on: str | None = None
    """A run's folder: score its completions."""
    groups: int | None = None
    """With --on: at most so many of its groups, from the first step on."""
    timeout: float = 60.0
    """Seconds that one call may take; 0 for no limit."""


def main(argv: list[str] | None = None) -> int:
    """Run a command line, by default the process's own. Returns the exit code."""
    try:
        if argv is None:
            plain_logs()
        return _dispatch(_parse(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        console.file.flush()
        print(f"error: {plain(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        leave_a_broken_pipe()
        return 141
    except KeyboardInterrupt as error:
        return 128 + (error.number if isinstance(error, Stopped) else 2)


def _parse(argv: list[str]) -> Options:
    """Raises:
    UserError: a flag that does not exist, or a word that is none.
    SystemExit: after help; with code 2 after a value that cannot be read, which is told with the flag's own help.
    """
    marks = (tyro.conf.DisallowNone,)
    try:
        with redirect_stderr(StringIO()):
            given, unknown = tyro.cli(Options, args=argv, prog=PROGRAM, return_unknown_args=True, config=marks)
    except SystemExit as ended:
        if ended.code:
            tyro.cli(Options, args=argv, prog=PROGRAM, config=marks)  # says what is wrong
        raise
    if unknown:
        flags = ["--" + name for name in Options.__dataclass_fields__]
        if not unknown[0].startswith("-"):
            raise UserError(
                f"There is no use for {unknown[0]!r}: one reward is named, and the rest are flags. See --help."
            )
        flag = unknown[0].partition("=")[0]
        raise UserError(f"There is no flag {flag}.{nearest(flag, flags)} --help lists them all.")
    return given


def _dispatch(options: Options) -> int:
    from grpo.rewards.catalogue import makers
    from grpo.rewards.names import installed_rewards
    from grpo.rewards.shipped import MAKERS

    more = _more_rewards(options)
    scores = options.completion is not None or options.on is not None
    if not options.name:
        if scores:
            raise UserError(f"Say which reward is to score: {PROGRAM} NAME ... Without a name it lists those at hand.")
        _list(more)
        return 0
    if not scores and options.name in (made := {entry.key: entry for entry in makers()}) and options.name not in more:
        _entry(made[options.name])
        return 0
    written = options.name.partition("(")[0]
    if more and ":" not in written and written not in (names := [*more, *installed_rewards(), *MAKERS]):
        near = nearest(options.name, names)
        raise UserError(f"There is no reward `{options.name}` at hand.{near} At hand: {', '.join(names)}.")
    key = more.get(options.name, options.name)
    if options.completion is not None and options.on is not None:
        raise UserError("--completion scores one text and --on the completions of a run. Give one of them.")
    if not scores:
        _show(key, options.name)
    elif options.on is None:
        _score(options, key)
    else:
        _rescore(options, key)
    return 0


def _more_rewards(options: Options) -> dict[str, Callable]:
    """name -> reward: those of --module and --task."""
    from grpo.rewards.catalogue import of_module
    from grpo.rewards.names import name_of, reward_of

    more: dict[str, Callable] = {}
    for module in options.module:
        more |= of_module(module)
    if options.task is not None:
        from grpo.task import load_task

        more |= {name_of(key): reward_of(key) for key in load_task(options.task).rewards}
    return more


# ---- the list


def _list(more: dict[str, Callable]) -> None:
    from grpo.rewards.catalogue import installed, listed, makers

    rewards = [*installed(), *(listed(name, _where(function), function) for name, function in more.items())]
    made = "Made by a call, in a task file or in the name: \"tags('plan', 'code')\""
    for title, entries in (("Rewards", rewards), (made, makers())):
        say(f"{title}:\n")
        for entry in entries:
            _entry(entry)
    say(f"One of them on a text: {PROGRAM} NAME --completion TEXT --answer X. More: docs/rewards.md.")


def _entry(entry: Any) -> None:
    stated = f"   range {entry.range}" if entry.range else "   range not stated"
    console.print(Text(plain(f"{entry.key}{entry.signature}"), style="bold"), soft_wrap=True)
    say(f"    {entry.summary or 'It says nothing of itself.'}\n    {entry.source}{stated if entry.function else ''}")
    if entry.example:
        say(f"    {entry.example}")
    say("")


def _show(key: Callable | str, name: str) -> None:
    from grpo.rewards.catalogue import listed
    from grpo.rewards.names import reward_of

    function = reward_of(key)
    _entry(listed(name, _where(function), function))
    say(f"Give it a text: {PROGRAM} {name} --completion TEXT --answer X")


def _where(function: Callable) -> str:
    """The file and line of a function."""
    code = getattr(function, "__code__", None)
    return f"{os.path.relpath(code.co_filename)}:{code.co_firstlineno}" if code else type(function).__name__


# ---- one text


def _score(options: Options, key: Callable | str) -> None:
    from grpo.rewards.names import reward_of
    from grpo.rewards.one import score_text
    from grpo.rewards.samples import ARGUMENT_NAMES, NAMED_BY_ONE

    columns = _columns(options)
    function = reward_of(key)
    required = [each.name for each in inspect.signature(function).parameters.values() if _is_required(each)]
    if lacking := [name for name in required if name not in {*columns, *ARGUMENT_NAMES, *NAMED_BY_ONE}]:
        flag = "--answer X" if lacking[0] == "answer" else f"--column {lacking[0]}=value"
        raise UserError(f"`{options.name}` asks for `{lacking[0]}`, a column of the rows: give it by {flag}.")
    completion = sys.stdin.read() if options.completion == "-" else str(options.completion)
    paid = score_text(key, completion, columns, options.prompt, options.timeout or None)
    for name, value in paid.items():
        say(f"{name} {'does not apply (None)' if math.isnan(value) else f'{value:g}'}")


def _is_required(parameter: inspect.Parameter) -> bool:
    by_name = (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    return parameter.kind in by_name and parameter.default is parameter.empty


def _columns(options: Options) -> dict[str, Any]:
    columns: dict[str, Any] = {} if options.answer is None else {"answer": options.answer}
    for given in options.column:
        name, equals, value = given.partition("=")
        if not equals or not name.rstrip(":"):
            raise UserError(f"--column is {given!r}. It takes name=text, or name:=JSON.")
        if name.endswith(":"):
            try:
                columns[name[:-1]] = json.loads(value)
            except ValueError as error:
                raise UserError(f"--column {name[:-1]} is no JSON ({error}). A text is given as name=text.") from error
        else:
            columns[name] = value
    return columns


# ---- a run


def _rescore(options: Options, key: Callable | str) -> None:
    from grpo.verbs.rescore import rescore

    if options.groups is not None and options.groups < 1:
        raise UserError(f"--groups is {options.groups}. It is how many groups are scored, 1 or more.")
    anew = rescore(str(options.on), key, options.groups, options.timeout or None, tell=say)
    scored, count = anew.scored(), len(anew.records)
    if not len(scored):
        raise UserError(f"`{anew.name}` gave no score to any of the {count:,} completions of {options.on}.")
    best, paying = scored.max(), (scored > 0).mean()
    say(
        f"{anew.name} on {count:,} completions of {options.on}: mean {scored.mean():.4g}, best {best:g} "
        f"for {(scored == best).mean():.1%}, more than 0 for {paying:.1%}."
    )
    if unscored := count - len(scored):
        say(f"It gave no score to {unscored:,}, {anew.failed:,} of them because it failed.")
    table = Table(box=SIMPLE_HEAD, title="Beside what they earned then", title_justify="left", title_style="bold")
    for column in ("recorded", "mean then", "correlation", "agreement", "best only then", "best only now"):
        table.add_column(column, justify="left" if column == "recorded" else "right")
    for each in anew.agreements():
        numbers = (f"{each.mean:.4g}", f"{each.correlation:.3f}", f"{each.same:.1%}", f"{each.only_then:,}")
        shown = [number.replace("nan%", "-").replace("nan", "-") for number in (*numbers, f"{each.only_now:,}")]
        table.add_row(Text(plain(each.name)), *shown)
    console.print(table)
    say("agreement: the share that earns the most by both, or by neither.")
    for only_now, told in ((False, "the most then, not now"), (True, "the most now, not then")):
        for record in anew.differing(only_now):
            end = " ".join(record["text"].split())[-100:]
            say(f"{told}: step {record['step']}, row {record.get('prompt')}, reward {record.get('reward')}: ...{end}")


if __name__ == "__main__":
    sys.exit(main())
