"""--check: prompts as the model reads them, every gold answer of both splits through every reward. Loads no model."""

from __future__ import annotations

from grpo.errors import UserError
from grpo.policy.load import ends_of_completion
from grpo.questions import build_questions, preflight_rewards
from grpo.resolve import Resolved
from grpo.rewards.preflight import preflight_table
from grpo.terminal import console, say, working
from grpo.verbs.announce import announce, over_its_adapter
from grpo.verbs.as_read import show_prompts


def check(resolved: Resolved) -> int:
    """--check: prompts as the model reads them, and every gold answer of both splits through every reward."""
    resolved = over_its_adapter(resolved)
    announce(resolved)
    with working("rows and prompts"):
        questions = build_questions(resolved.task, resolved.config, all_tests=True, note=say)
        ends = ends_of_completion(resolved.config.model, questions.tokenizer)
    show_prompts(questions, ends)
    with working("preflight of the rewards"):
        report = preflight_rewards(resolved.task, resolved.config, questions, every_row=True, note=say)
    if report.checks:
        console.print(preflight_table(report))
    for warning in report.warnings:
        say(f"note: {warning}")
    if resolved.task.gold is None:
        say("Every reward ran; without `gold` nobody can say whether it pays for the right thing. The task is ready.")
        return 0
    if resolved.task.solved is None:
        say("Every reward ran; `solved` names none that tells right from wrong. The task is ready.")
        return 0
    name, value = resolved.task.solved
    solved = next(check for check in report.checks if check.name == name)
    if solved.unscored_rows:
        count = len(solved.unscored_rows)
        raise UserError(
            f"`{name}` must tell right from wrong, but it gave no score (None) to {count:,} of {report.num_rows:,} "
            f"gold answers, the first of them that of row {solved.unscored_rows[0]}: they could never count as right. "
            "Let it return a number for every row, or name another reward in `solved` in the task file."
        )
    if (lowest := solved.lowest["gold"]) < value:
        raise UserError(
            f"The gold answer of some row gets {lowest:g} from `{name}`, which must pay {value:g} for a right answer. "
            "Mend the rows named above, `gold` in the task file, or the reward."
        )
    say(f"Every gold answer gets full marks from `{name}` ({value}). The task is ready.")
    return 0
