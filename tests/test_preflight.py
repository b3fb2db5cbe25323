"""Rewards tried before a run: what they pay gold answers, the same in other clothes, what is none, and cheap tricks."""

import itertools
import json
import re
import threading
import types

import pytest
from rich.console import Console
from scored import COLUMNS, make_prompt, named
from small_task import SMALL_CONFIG, task_with
from toy_task import SMALL, TASK

from grpo.errors import UserError
from grpo.policy.load import load_tokenizer
from grpo.questions import build_questions, preflight_rewards
from grpo.rewards import (
    build_rewards,
    correctness,
    exact_match,
    extract_answer,
    integer,
    number,
    soft_xml,
    strict_xml,
    xml_count,
)
from grpo.rewards.preflight import Calls, preflight
from grpo.rewards.probes import BASE
from grpo.rewards.verdict import preflight_tables
from grpo.run import main


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("embedded")


def cells_of(report, probe):
    """The row of the table that begins so."""
    [table] = preflight_tables(report)
    columns = [list(column.cells) for column in table.columns]
    row = columns[0].index(probe)
    return [cells[row] for cells in columns[1:]]


GSM8K = {correctness: 1.0, integer: 1.0, strict_xml: 1.0, soft_xml: 1.0, xml_count: 1.0}


def gold_rows(num_rows=20):
    for index in range(num_rows):
        gold = f"<reasoning>\nTwo lines,\nof {index} and more\n</reasoning>\n<answer>\n{index}\n</answer>"
        yield make_prompt(index, f"{index}"), gold


def test_the_preflight_finds_full_marks_for_every_gold_answer():
    report = preflight(build_rewards(GSM8K, COLUMNS, chat=True), gold_rows())
    assert report.num_rows == 20
    assert report.attained == report.attainable == 4.0
    assert report.warnings == []
    checks = {check.name: check for check in report.checks}
    assert {kind: checks["correctness"].highest[kind] for kind in BASE} == {
        "gold": 2.0, "empty": 0.0, "truncated": 0.0, "shuffled": 0.0}  # fmt: skip
    assert checks["correctness"].lowest["gold"] == 2.0
    assert checks["xml_count"].highest["truncated"] < 0.5
    assert report.sums["gold"] == 4.0
    [table] = preflight_tables(report)
    assert [column.header.replace("\n", "") for column in table.columns] == ["", *(r.__name__ for r in GSM8K), "sum"]


def test_the_preflight_names_rows_whose_gold_falls_short_and_rewards_that_exclude_each_other():
    def small(completion, answer):
        return float(int(answer) < 18)

    def empty(completion):
        return float(not completion)

    def penalty(completion):
        return float(len(completion) > 10_000)

    report = preflight(build_rewards({small: 1.0, empty: 1.0, penalty: -1.0}, COLUMNS, chat=False), gold_rows())
    checks = {check.name: check for check in report.checks}
    assert checks["small"].short_rows == [18, 19]
    assert checks["empty"].short_rows == list(range(20))
    assert checks["penalty"].short_rows == []
    assert checks["penalty"].is_constant and not checks["small"].is_constant
    assert (report.attained, report.attainable) == (1.0, 2.0)
    told = " ".join(report.warnings)
    for piece in ("(rows 18, 19)", "`penalty` pays 0 for everything", "no gold answer gets more than 1"):
        assert piece in told


def test_the_preflight_refuses_gold_to_which_nothing_applies_and_no_rows_at_all():
    def sometimes(completion, answer):
        return None if answer == "3" else 1.0

    rewards = build_rewards({sometimes: 1.0}, COLUMNS, chat=False)
    with pytest.raises(UserError, match="No reward applies to the gold answer of row 3"):
        preflight(rewards, gold_rows())
    with pytest.raises(UserError, match="data set is empty"):
        preflight(rewards, [])


def test_the_preflight_allows_a_reward_that_applies_to_some_or_no_rows():
    def sometimes(completion, answer):
        return None if answer == "3" else 1.0 * bool(completion)

    def never(completion):
        return None

    rewards = build_rewards({sometimes: 1.0, never: 1.0, exact_match: 1.0}, COLUMNS, chat=False)
    report = preflight(rewards, gold_rows(600))
    assert report.num_rows == 600
    assert report.checks[0].short_rows == []
    assert [len(check.unscored_rows) for check in report.checks] == [1, 600, 0]
    assert report.checks[0].unscored_rows == [3]
    assert report.attainable == 1.0
    assert cells_of(report, "gold") == ["1", "-", "0", "0.998"]
    assert cells_of(report, "rows with full marks") == ["599", "0", "600", ""]
    assert report.failing == {3: ["sometimes"]}  # that no gold answer gets anything from `never` is no row's fault


def test_the_preflight_calls_rewards_as_a_step_does(tokenizer):
    calls = []

    def batch(prompts, completions, completion_ids, **kwargs):
        calls.append((prompts, completions, completion_ids))
        return [float(len(completion)) for completion in completions]

    rewards = build_rewards({batch: 1.0}, COLUMNS, chat=False)
    rows = list(gold_rows(20))
    report = preflight(rewards, rows, Calls(tokenizer, group_size=6, prompts=4))
    assert report.num_rows == report.checks[0].num_rows == 20
    assert [len(completions) for _, completions, _ in calls] == [6 * rows for rows in (1, 2, 4, 4, 4, 4, 1)]
    # Whole groups of one prompt, in the model's own tokens: the engine would give this text for them.
    prompts, completions, ids = (list(itertools.chain(*each)) for each in zip(*calls, strict=True))
    assert prompts == [prompt.text for prompt, _ in rows for _ in range(6)]
    for index, (text, tokens) in enumerate(zip(completions, ids, strict=True)):
        stops = index % 6 not in (2,)
        assert (tokens[-1] == tokenizer.eos_token_id) == stops
        assert tokenizer.decode(tokens[:-1] if stops else tokens, skip_special_tokens=True) == text
    assert completions[::6] == [gold for _, gold in rows]
    # What the four leave free in a group is filled with the other probes in turn.
    assert {f"{gold}\n" for _, gold in rows} & set(completions[4::6] + completions[5::6])
    for (_, gold), half in zip(rows, completions[2::6], strict=True):
        assert gold.startswith(half) and 0 < len(half) < len(gold)


def test_a_group_smaller_than_the_probes_is_called_twice():
    sizes = []

    def batch(completions):
        sizes.append(len(completions))
        return [float(len(completion)) for completion in completions]

    report = preflight(build_rewards({batch: 1.0}, COLUMNS, chat=False), gold_rows(1), Calls(group_size=3))
    assert sizes == [6]
    assert report.checks[0].lowest["truncated"] < report.checks[0].lowest["shuffled"] == report.checks[0].lowest["gold"]


def test_a_reward_that_takes_long_is_tried_on_fewer_rows_and_says_so(monkeypatch):
    clock = itertools.count()  # a second passes whenever somebody looks
    monkeypatch.setattr("grpo.rewards.preflight.time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    told = []
    rewards = build_rewards({named("first"): 1.0, named("second"): 1.0}, COLUMNS, chat=False)
    report = preflight(rewards, gold_rows(20), Calls(seconds=1.5, note=told.append))
    assert [check.num_rows for check in report.checks] == [1 + 2, 1 + 2]
    assert report.num_rows == 20
    assert any("`first` was tried on 3 of 20 rows" in warning for warning in report.warnings)
    assert "first, second" in told[0]
    assert cells_of(report, "rows with full marks") == ["3", "3", ""]


def test_columns_that_are_shadowed_or_shared_are_told():
    def length(completion):
        return float(len(completion))

    prompt = make_prompt(3)
    prompt.fields.update(prompt="mine", log_metric=1, lock=threading.Lock())
    told = " ".join(preflight(build_rewards({length: 1.0}, prompt.fields, chat=False), [(prompt, "5")]).warnings)
    assert "The column `prompt` of the data set is never passed to a reward" in told
    assert "The column `log_metric`" in told
    assert "The column `lock` holds what cannot be copied (row 3" in told
    assert "`answer`" not in told


def test_a_gold_answer_that_cannot_be_compared_ends_the_preflight_with_its_row():
    rewards = build_rewards({correctness: 1.0}, COLUMNS, chat=False)
    rows = [(make_prompt(4, "5"), "<answer>5</answer>"), (make_prompt(6, ["5"]), "<answer>['5']</answer>")]
    with pytest.raises(UserError, match=r"`correctness` raised ValueError \(the gold answer is .* on row 6"):
        preflight(rewards, rows)


# ---- thorough, as for --check


TEMPLATE = "<reasoning>\n{}\n</reasoning>\n<answer>\n{}\n</answer>\n"


def thorough(rewards, count=12, answers=None, columns=COLUMNS, **more):
    """The report on rows with these answers, of gold completions in the format of GSM8K."""
    answers = answers or [str(10 + number) for number in range(count)]
    rows = [(make_prompt(index, answer), TEMPLATE.format("So it is.", answer)) for index, answer in enumerate(answers)]
    settings = {"answer_of": extract_answer, "filled": lambda text: TEMPLATE.format(text, text), "thorough": True}
    return preflight(build_rewards(rewards, columns, chat=False), rows, Calls(**(settings | more)))


def test_the_gold_answer_in_other_clothes():
    report = thorough({number: 1.0, correctness: 1.0, strict_xml: 1.0}, solved="correctness")
    paid = {check.name: check.mean for check in report.checks}
    for kind, expected in {
        "gold": (1, 2, 0.5),
        "with a new line": (1, 2, 0),
        "with spaces": (1, 2, 0),
        "with a period": (1, 2, 0),
        "twice": (1, 2, 0),
        r"in \boxed{}": (1, 0, 0),
        "in full-width digits": (1, 0, 0.5),
        "in Arabic digits": (0, 0, 0.5),
        "another row's gold": (0, 0, 0.5),
        "empty": (0, 0, 0),
        "the prompt": (0, 0, 0),
    }.items():
        expected = (number(full_width(10), "10") if kind == "in full-width digits" else expected[0], *expected[1:])
        assert tuple(paid[name][kind] for name in ("number", "correctness", "strict_xml")) == expected, kind
    told = " ".join(report.remarks)
    assert r"`correctness` does not take the gold answer in \boxed{}, in full-width digits, in Arabic digits." in told


def full_width(value):
    return TEMPLATE.format("", value).translate(str.maketrans("0123456789", "０１２３４５６７８９"))


def test_only_the_first_rows_are_tried_on_everything_where_a_reward_sees_no_group():
    seen = []

    def counts(completion):
        seen.append(completion)
        return 1.0

    report = thorough({counts: 1.0}, count=200)
    assert report.num_rows == report.checks[0].num_rows == 200
    assert len({text for text in seen if text.startswith("<reasoning>\nSo it is.")}) >= 200
    assert len(seen) < 8 * 40 + 56 * 4 + 136 + 10


def test_a_reward_that_calls_anything_right_is_told():
    def lazy(completion, answer):
        return float("answer" in completion)

    told = " ".join(thorough({lazy: 1.0}, solved="lazy").warnings)
    assert "`lazy` tells right from wrong, and calls this right: another row's gold." in told
    assert "calls this right" not in " ".join(thorough({correctness: 1.0}, solved="correctness").warnings)


def test_answers_that_are_all_the_same_are_no_other_row_s():
    report = thorough({correctness: 1.0}, answers=["7"] * 12, solved="correctness")
    assert "another row's gold" not in report.checks[0].mean


def test_the_cheapest_text_that_earns_the_most():
    report = thorough({correctness: 1.0, strict_xml: 1.0, soft_xml: 1.0})
    assert report.trick and report.trick.earns == pytest.approx(1.0 + 2.0 / 8)  # one of eight rows has the usual answer
    assert report.trick.text == TEMPLATE.format("10", "10")

    def tags(completion):
        return float("<answer>" in completion)

    empty = thorough({tags: 1.0})
    assert empty.trick and empty.trick.text == "<reasoning></reasoning><answer></answer>"
    [told] = [warning for warning in empty.warnings if "hacker" in warning]
    assert told.endswith("earns 1 on average, whatever is asked; gold answers earn 1.")
    bare = thorough({named("anything"): 1.0, number: 1.0}, answers=["5", "5", "6"])
    assert bare.trick and bare.trick.text == "5"
    nothing = thorough({correctness: 1.0}, answers=[f"{n}.5" for n in range(20)], filled=None)
    assert nothing.trick is None or nothing.trick.earns <= 2.0 / 8


def test_rewards_that_never_pay_together_are_named():
    def short(completion):
        return float(len(completion) < 20)

    def tagged(completion):
        return float(completion.startswith("<reasoning>"))

    report = thorough({short: 1.0, tagged: 1.0, correctness: 1.0})
    assert report.apart == [("short", "tagged"), ("short", "correctness")]
    assert "some rewards never pay for the same completion (`short` and `tagged`; `short` and" in " ".join(
        report.warnings
    )


def test_chance_is_noticed():
    state = itertools.count()

    def counting(completion):
        return float(next(state))

    def steady(completion):
        return None if not completion else 1.0

    told = " ".join(thorough({counting: 1.0, steady: 1.0}).warnings)
    assert re.search(r"`counting` paid \d+ and then \d+ for the same completion", told)
    assert "`steady` paid" not in told


@pytest.mark.parametrize("kind", ["one", "batch", "async"])
def test_a_reward_that_changes_its_arguments_is_noticed(kind):
    if kind == "one":

        def reward(completion, answer, numbers):
            numbers.append(1)
            return 1.0
    elif kind == "batch":

        def reward(completions, numbers, answer, **kwargs):
            numbers[0].clear()
            return [1.0] * len(completions)
    else:

        async def reward(completion, answer, numbers):
            numbers["x"] = 1
            return 1.0

    prompt = make_prompt(0)
    prompt.fields["numbers"] = {} if kind == "async" else [1, 2]
    columns = [*COLUMNS, "numbers"]
    rewards = build_rewards({reward: 1.0, correctness: 1.0}, columns, chat=False)
    told = preflight(rewards, [(prompt, "<answer>5</answer>")], Calls(thorough=True)).notes
    assert told == ["`reward` changes what it is given (`numbers`). It gets copies, so that nothing else sees it."]
    assert prompt.fields["numbers"] in ({}, [1, 2])


def test_a_million_characters_are_tried_and_what_fails_on_them_is_told_and_stops_nothing():
    longest = []

    def careful(completions):
        longest.append(max(map(len, completions)))
        return [1.0] * len(completions)

    def fails(completion):
        assert len(completion) < 100_000, "too long for me"
        return 1.0

    told = thorough({careful: 1.0, fails: 1.0}).notes
    assert max(longest) == 1_000_000
    assert [note[:53] for note in told] == ["On a text of 100,000 characters `fails` fails, and wo"]


def test_a_reward_whose_time_grows_fast_is_tried_on_no_longer_text(monkeypatch):
    """As slow as the square of the length: on a million characters it would never come back."""
    now, longest = [0.0], []

    def square(completion):
        now[0] += len(completion) ** 2 / 5e7
        longest.append(len(completion))
        return 1.0

    monkeypatch.setattr("grpo.rewards.preflight.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    assert thorough({square: 1.0}).notes == ["`square` takes 2.0 s for a text of 10,000 characters."]
    assert max(longest) == 10_000


def test_the_table_fits_into_eighty_columns():
    long = named("a_reward_whose_name_is_longer_than_a_line_of_the_table_may_ever_be")
    rewards = {**GSM8K, long: 1.0, named("x" * 30): -1.0, exact_match: 1.0, number: 1.0}
    report = thorough(rewards)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    for table in preflight_tables(report):
        console.print(table)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines) and sum("another row's gold" in line for line in lines) == len(
        preflight_tables(report)
    )


def test_rows_that_are_left_out_are_listed_in_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"question": "1?", "answer": "1"}\n{"question": "2?", "answer": "2"}\n3\n')
    task = TASK.format(
        rewards="{says: 1.0}", extra="from grpo.data import read_rows\nrows = lambda s, d: read_rows(d, s)"
    )
    (tmp_path / "toy.py").write_text(task)
    flags = "--model embedded --data rows.jsonl --held-out 1 --skip-bad-rows".split()
    assert main(["toy.py", "--check", *flags]) == 0
    assert "note: 1 row left out: " in capsys.readouterr().out
    [path] = (tmp_path / "runs").glob("check-toy-*.jsonl")
    [listed] = [json.loads(line) for line in path.read_text().splitlines()]
    assert "line 3 is '3'" in listed["left_out"]


def test_rows_whose_gold_fails_are_listed_in_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.py").write_text(
        TASK.format(
            rewards="{says: 1.0, small: 1.0}", extra="def small(completion, answer):\n    return int(answer) < 20.0"
        )
    )
    assert main(["toy.py", "--check"]) == 0
    out = capsys.readouterr().out
    [path] = (tmp_path / "runs").glob("check-toy-*.jsonl")
    assert str(path) in out
    listed = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["split"], row["row"], row["less_than_full_marks"]) for row in listed] == [
        ("test", n, ["small"]) for n in range(1, 6)]  # fmt: skip
    assert listed[0]["gold"] == "The answer is 20." and listed[0]["columns"]["answer"] == "20"


# ---- without a right answer


def test_a_task_without_right_answers_is_scored_by_its_reward(tmp_path, capsys):
    """From --check to the final line; the reward is below -1, and the best checkpoint is still the best."""
    text = TASK.format(rewards="{short: 1.0}", extra="def short(completion):\n    return -len(completion) / 5 - 2")
    text = re.sub(r"gold=.*", "gold=None,", text)
    path = tmp_path / "toy.py"
    path.write_text(re.sub(r"solved=.*", "solved=None,", text))
    run = tmp_path / "run"
    assert main([str(path), "--check"]) == 0
    assert "The task is ready" in capsys.readouterr().out
    assert main([str(path), *SMALL, "--steps", "2", "--run-dir", str(run)]) == 0
    told = capsys.readouterr().out
    assert "held-out reward: -" in told and "pass@1" not in told
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if "eval/reward" in line]
    assert [line["step"] for line in scores] == [0, 2]
    assert all(line["eval/reward/low"] <= line["eval/reward"] <= line["eval/reward/high"] < -1 for line in scores)
    best = max(scores, key=lambda line: line["eval/reward"])
    state = json.loads((run / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["progress"]["best"] == best["eval/reward"] and state["progress"]["best_step"] == best["step"]
    assert main(["--eval", str(run)]) == 0
    assert "  reward -" in capsys.readouterr().out


def test_a_reward_that_fails_without_gold_is_told_before_the_run():
    def fragile(completion):
        return 1 / len(completion)

    task = task_with(gold=None, solved=None, rewards={fragile: 1.0}, held_out=0)
    questions = build_questions(task, SMALL_CONFIG, note=list)
    with pytest.raises(UserError, match=r"`fragile` raised ZeroDivisionError .* row 0"):
        preflight_rewards(task, SMALL_CONFIG, questions, every_row=False, note=list)


def test_rewards_that_never_apply_are_told_before_the_run():
    def silent(completion):
        return None

    def says(completion):
        return 1.0

    def tried(*rewards):
        task = task_with(gold=None, solved=None, rewards=dict.fromkeys(rewards, 1.0), held_out=0)
        questions = build_questions(task, SMALL_CONFIG, note=list)
        return preflight_rewards(task, SMALL_CONFIG, questions, every_row=False, note=list)

    with pytest.raises(UserError, match=r"No reward applies to anything that was tried \(silent returned None"):
        tried(silent)
    assert tried(silent, says).notes == ["`silent` gave no score (None) to anything tried."]


@pytest.mark.parametrize("every_row", [False, True])
def test_a_measure_that_calls_no_gold_answer_right_is_told_before_the_run(every_row):
    def tried(value, pays):
        def says(completion, answer):
            return pays(answer) if completion == answer else 0.0

        rows = [{"question": f"{number}?", "answer": str(number)} for number in range(4)]
        task = task_with(rows=lambda split, data: rows, rewards={says: 1.0}, solved=("says", value), held_out=1)
        questions = build_questions(task, SMALL_CONFIG, note=list)
        return preflight_rewards(task, SMALL_CONFIG, questions, every_row, note=list)

    with pytest.raises(UserError, match=r"`says` pays 5 or more for a right answer, but it paid at most 1 to"):
        tried(5.0, lambda answer: 1.0)
    assert not tried(1.0, lambda answer: 1.0).warnings
    assert "the gold answer of some row gets 0.5. --check says more" in " ".join(
        tried(1.0, lambda answer: 0.5 if answer == "2" else 1.0).warnings
    )
