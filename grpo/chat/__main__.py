"""The command: `python -m grpo.chat RUN` talks to what a run has learned, beside what it learned it on.

    python -m grpo.chat runs/gsm8k-20260101-120000
    python -m grpo.chat RUN --prompt "What is 3 + 4?" --temperature 0 --json

Exit codes: 0 done, 2 bad input, 130 stopped by Ctrl-C. One ends an answer, a second one the program.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress

from grpo.errors import UserError
from grpo.terminal import console, leave_a_broken_pipe, plain, plain_logs, say, working

LONGEST = 512  # tokens of an answer, where no run says so


def main(argv: list[str] | None = None) -> int:
    """Run a command line, by default the process's own. Returns the exit code."""
    given = _parser().parse_args(argv)
    plain_logs()
    try:
        return _talk(given)
    except UserError as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            leave_a_broken_pipe()
        else:
            print(f"error: {plain(str(error))}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m grpo.chat", description="Talk to a trained policy and its base, side by side."
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's folder, a checkpoint, an adapter's folder, or a model")
    add("--prompt", help="answer this and stop; - reads it from standard input")
    add("--checkpoint", default="best", help="of a run: best, last or a step (best)")
    add("--model", help="the base, where it is elsewhere than the adapter says")
    add("--base", choices=["float32", "bf16", "nf4"], help="how the base is kept; a run's own, else 16 bits")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--temperature", help="0 takes the likeliest token; the run's own")
    add("--max-completion-tokens", type=int, help="an answer is cut off after so many; the run's own")
    add("--system", help="the system prompt; the task's own")
    add("--seed", type=int, default=0)
    add("--no-base", action="store_true", help="let the trained policy answer alone")
    add("--json", action="store_true", help="a line of JSON for each prompt")
    return parser


def _talk(given: argparse.Namespace) -> int:
    from grpo.chat.dialogue import Dialogue, checked_temperature  # torch comes with it, and --help needs none
    from grpo.chat.trained import Asked, open_trained

    if given.temperature is not None:
        checked_temperature(given.temperature)
    if given.max_completion_tokens is not None and given.max_completion_tokens < 1:
        raise UserError(f"--max-completion-tokens is {given.max_completion_tokens}. Use 1 or more.")
    tell = (lambda text: None) if given.json else say
    asked = Asked(given.run, given.checkpoint, given.model, given.base, given.device)
    with working("model") as progressed:
        trained = open_trained(asked, tell, progressed)
    dialogue = Dialogue(
        trained,
        temperature=trained.config.temperature if given.temperature is None else float(given.temperature),
        max_tokens=given.max_completion_tokens or trained.config.max_completion_tokens or LONGEST,
        seed=given.seed,
        system=trained.system if given.system is None else given.system,
        with_base=not given.no_base,
    )
    tell(f"{trained.title}. Temperature {dialogue.temperature:g}, at most {dialogue.max_tokens:,} tokens.")
    if dialogue.system:
        tell(f"system prompt{'' if given.system else ' of the task'}: {dialogue.system}")
    return Session(dialogue, given.json).run(given.prompt)


class Session:
    """Prompts in, answers out."""

    def __init__(self, dialogue, is_json: bool):
        from grpo.chat.screen import as_json, screen_for

        self.dialogue, self.is_json, self.as_json = dialogue, is_json, as_json
        self.screen = screen_for(dialogue.speakers)
        self.interrupts = 0  # since the last prompt

    def run(self, prompt: str | None) -> int:
        """One prompt, or one after the other; returns the exit code."""
        if prompt is not None:
            self._answer(sys.stdin.read() if prompt == "-" else prompt)
            return 0
        if sys.stdin.isatty() and not self.is_json:
            with suppress(ImportError):
                import readline  # noqa: F401  # lines can be edited, and the last ones come back
            from grpo.chat.dialogue import COMMANDS

            say(COMMANDS)
        for line in self._lines():
            if line.strip() == "/quit":
                break
            self._line(line)
        return 0

    def _line(self, line: str) -> None:
        """A command or a prompt. What is wrong with it is told, and the next one may come."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                told = self.dialogue.command(line.strip())
                if not self.is_json:
                    say(told)
            elif line.strip():
                self._answer(line[1:] if line.startswith("//") else line)
        except UserError as error:
            console.file.flush()
            print(f"error: {plain(str(error))}", file=sys.stderr)

    def _lines(self) -> Iterator[str]:
        """What is typed, until there is no more of it."""
        while True:
            try:
                line = input("> ") if sys.stdin.isatty() and not self.is_json else sys.stdin.readline()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._interrupted()
                say("Ctrl-C again, or /quit, ends this.")
                continue
            if line == "" and not (sys.stdin.isatty() and not self.is_json):
                return
            self.interrupts = 0
            yield line.rstrip("\n")

    def _answer(self, prompt: str) -> None:
        if self.is_json:
            answers = self.dialogue.ask(prompt, lambda who: lambda text: None, self._interrupted)
            console.file.write(self.as_json(self.dialogue, prompt, answers) + "\n")
            console.file.flush()
            return
        with self.screen.turn(self.dialogue.speakers) as listening:
            answers = self.dialogue.ask(prompt, listening, self._interrupted)
        self.screen.done(answers)

    def _interrupted(self) -> None:
        """Ctrl-C: the second since a prompt ends the program."""
        self.interrupts += 1
        if self.interrupts > 1:
            raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
