"""--check: prompts as the model reads them, every gold answer of both splits through every reward. Loads no model."""

from __future__ import annotations

import json
import time

from grpo.errors import UserError, in_words
from grpo.policy.load import ends_of_completion
from grpo.questions import Questions, build_questions, preflight_rewards
from grpo.resolve import Resolved
from grpo.rewards.verdict import Preflight, preflight_tables
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
    if not questions.rewards:
        say("Every row that is not named above can be taught; there are no rewards. The task is ready.")
        return 0
    with working("preflight of the rewards"):
        report = preflight_rewards(resolved.task, resolved.config, questions, every_row=True, note=say)
    if report.checks:
        _show(report)
    for warning in report.warnings:
        say(f"note: {warning}")
    for remark in report.remarks:
        say(remark)
    if report.failing or questions.left_out:
        say(_listed(report, resolved, questions))
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


def _show(report: Preflight) -> None:
    say(report.heading)
    for table in preflight_tables(report):
        console.print(table)
    say(report.summary)


def _listed(report: Preflight, resolved: Resolved, questions: Questions) -> str:
    """Write the rows that are left out, and those whose gold answer gets less than full marks, into a file of its own;
    says where."""
    path = resolved.here / "runs" / f"check-{resolved.task.name}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            for told in questions.left_out:
                file.write(json.dumps({"left_out": told}) + "\n")
            for place, rewards in report.failing.items():
                is_train = place < len(questions.train)
                prompt = questions.train[place] if is_train else questions.test[place - len(questions.train)]
                row = {
                    "split": "train" if is_train else "test",
                    "row": prompt.index,
                    "less_than_full_marks": rewards,
                    "gold": resolved.task.gold_text(prompt.fields),
                    "columns": prompt.fields,
                }
                file.write(json.dumps(row, ensure_ascii=False, default=repr) + "\n")
    except (OSError, ValueError) as error:  # a full disk; rows that hold themselves, or half a surrogate pair
        return f"note: the rows that are left out or fail cannot be listed in {path}: {in_words(error)}."
    counts = [
        (len(questions.left_out), "left out"),
        (len(report.failing), "whose gold answer gets less than full marks"),
    ]
    told = " and ".join(f"{count:,} row{'s' * (count > 1)} {words}" for count, words in counts if count)
    return f"note: {told}: {path}"
