"""report.html says what a run's files say, whoever wrote them, in a bounded size, and again from the folder alone."""

import base64
import hashlib
import itertools
import json
import math
import os
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from made_up_run import HOSTILE, lines_of, make_run

from grpo.errors import UserError
from grpo.report.__main__ import main
from grpo.report.charts import Line, chart, scatter, stacked, ticks
from grpo.report.judging import health, held_out_scores, paired, suspicions, verdict
from grpo.report.page import render, write_report
from grpo.report.reading import Reading, Thinned
from grpo.report.sink import ReportSink

ROOT = Path(__file__).parents[1]
VOID = {"meta", "input", "br", "img", "link", "base"}


class Page(HTMLParser):
    """What a browser would make of it: elements, their attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data


def read(folder):
    reading = Reading(folder)
    reading.advance()
    return reading


def texts_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<(script|style)>.*?</\1>|<[^>]*>", " ", html, flags=re.S))


# ---- the page


def test_a_page_of_a_plain_run_says_what_there_is(tmp_path):
    html = render([Reading(make_run(tmp_path / "a-run"))])
    text = texts_of(html)
    for words in (
        *("a-run", "It learnt.", "by a paired permutation test over 18 prompts", "Health", "completion/truncated"),
        *("outside", "--max-completion-tokens", "Reward", "a plain answer", "gold answer", "rewards disagree"),
        *("python -m grpo.run toy.py", "step 12", "of 80 GiB", "made up", "torch"),
    ):
        assert words in text, words
    page = Page(html)
    assert not page.open
    assert len([tag for tag, _ in page.elements if tag == "svg"]) >= 12


def test_nothing_that_others_wrote_is_a_part_of_the_page(tmp_path):
    """Elements and attributes of a page about hostile texts are those of a page about plain ones."""
    plain_texts = [f"plain {number}" for number in range(len(HOSTILE))]
    kinds = {}
    for kind, texts, name in (("plain", plain_texts, "toy"), ("hostile", HOSTILE, "toy")):
        folder = make_run(
            tmp_path / kind, texts=texts, name=name, reward="<b onclick=alert(1)>" if kind == "hostile" else "r"
        )
        config = json.loads((folder / "config.json").read_text())
        config["config"]["model"] = config["config"]["data"] = texts[0] + texts[7]
        config["name"] = texts[3]
        config["origins"] |= {"model": texts[2], "<script>": texts[1]}
        (folder / "config.json").write_text(json.dumps(config))
        start = lines_of(folder / "starts.jsonl")[0]
        start |= {"command": texts[0], "device": texts[3], "engine": texts[2], "time": texts[4]}
        start["versions"] = {texts[1]: texts[3]}
        (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
        html = render([Reading(folder)])
        page = Page(html)
        kinds[kind] = {(tag, name) for tag, attributes in page.elements for name in attributes} | {
            (tag, "") for tag, _ in page.elements
        }
        assert len(page.scripts) == 1
        assert not any(name.startswith("on") or name in ("src", "style", "action") for _, name in kinds[kind])
        links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
        assert links and all(re.fullmatch(r"#[a-z0-9-]+", link) for link in links)
        assert not re.search(
            "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", html
        )
    assert kinds["hostile"] == kinds["plain"]
    assert "\\u202eright to left" in html and "שלום" in html
    assert "49" not in re.findall(r"\{\{ 7 \* 7 \}\}|49 \{%", html) and "{{ 7 * 7 }}" in html


def test_the_policy_names_the_style_and_the_script_that_are_there(tmp_path):
    html = render([Reading(make_run(tmp_path / "run"))])
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    for tag in ("style", "script"):
        (own,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.S)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"(src|href)=\"(?!#)", html)


def test_the_size_is_bounded(tmp_path):
    texts = [*(f"{number} " + "long words " * 400 for number in range(3)), "x" * 2**20, "<b>" * 2**18]
    folder = make_run(tmp_path / "long", steps=5, texts=texts, groups=2, size=3, tokens=False)
    html = render([Reading(folder)])
    assert len(html.encode()) < 4_000_000
    assert "more characters" in html
    many = make_run(tmp_path / "many", steps=300, texts=["short", "text"], groups=2)
    assert len(render([Reading(many)]).encode()) < 2_000_000


def test_reading_on_is_reading_at_once(tmp_path):
    whole = make_run(tmp_path / "whole" / "run", steps=40)
    grown = tmp_path / "grown" / "run"
    grown.mkdir(parents=True)
    (grown / "config.json").write_bytes((whole / "config.json").read_bytes())
    ends = {path.name: path.read_bytes() for path in whole.glob("*.jsonl")}
    (grown / "metrics.jsonl").touch()
    reading = Reading(grown)
    # Cut between steps, as the files are between two events of a run, and once in the middle of a line.
    for step in (0, 1, 7, 23, 40):
        for name, content in ends.items():
            lines = [line for line in content.splitlines(keepends=True) if json.loads(line).get("step", 0) <= step]
            (grown / name).write_bytes(b"".join(lines) + b'{"step": 9, "hal' * (step < 40))
        render([reading])
    assert re.sub("Written .*? by", "", render([reading])) == re.sub("Written .*? by", "", render([Reading(whole)]))


ODD = [None, True, "text", -1, 1e308, 10**400, math.nan, [], {}, [[]], {"a": {}}, "\ud800", "<script>", 2**70]


@pytest.mark.parametrize("seed", range(16))
def test_lines_with_anything_in_them_are_shown_as_far_as_they_go(tmp_path, seed):
    folder, dice = make_run(tmp_path / "run", steps=6), random.Random(seed)
    for path in folder.glob("*.jsonl"):
        lines = lines_of(path)
        for line in dice.sample(lines, max(1, len(lines) // 3)):
            for key in dice.sample(list(line), dice.randint(1, len(line))):
                line[key] = dice.choice(ODD)
            for key in dice.sample(list(line), len(line) * (dice.random() < 0.3)):
                del line[key]
        whole = [json.dumps(line) for line in lines]
        whole[dice.randrange(len(whole))] = dice.choice(["", "[1]", "{", "null", "[" * 50_000])
        path.write_text("\n".join(whole) + "\n")
    config = json.loads((folder / "config.json").read_text())
    config["config"] |= {name: dice.choice(ODD) for name in ("steps", "seed", "model", "data", "log")}
    config["origins"]["seed"] = dice.choice(ODD)
    if seed % 2:
        config[dice.choice(list(config))] = dice.choice(ODD)
    (folder / "config.json").write_text(json.dumps(config))
    reading = Reading(folder)
    html = render([reading])
    assert reading.unreadable >= 6
    assert f"{reading.unreadable} lines of this run's files could not be read" in html
    assert len(Page(html).scripts) == 1


def test_a_run_of_an_earlier_version_or_that_just_began_has_a_page_too(tmp_path):
    folder = make_run(tmp_path / "run", steps=4)
    for name in ("prompts", "tokens", "held_out", "starts"):
        (folder / f"{name}.jsonl").unlink()
    text = texts_of(render([Reading(folder)]))
    assert "has recorded no held-out answers" in text and "pass@1" in text
    (folder / "config.json").unlink()
    (folder / "completions.jsonl").unlink()
    (folder / "metrics.jsonl").write_text("")
    assert "No held-out score yet." in texts_of(render([Reading(folder)]))


def test_a_task_that_says_of_no_answer_that_it_is_right_has_its_page(tmp_path):
    folder = make_run(tmp_path / "run")
    start = lines_of(folder / "starts.jsonl")[0] | {"solved": None}
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    metrics = [
        {name.replace("pass@1", "reward"): value for name, value in line.items() if "pass@4" not in name}
        for line in lines_of(folder / "metrics.jsonl")
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    html = render([Reading(folder)])
    text = texts_of(html)
    assert "Held-out reward rose from" in text and "points" not in text
    assert "mean reward" in text and "Wrong, and paid most" not in text
    assert not re.search('class="answer (right|wrong)', html)


def test_an_answer_that_is_taught_is_neither_right_nor_wrong(tmp_path):
    """Of a run by SFT on a task with rewards: held-out answers are judged, the given ones are not."""
    folder = make_run(tmp_path / "run", steps=2)
    taught = [line | {"parts": {}, "reward": None} for line in lines_of(folder / "completions.jsonl")]
    (folder / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in taught))
    reading = read(folder)
    assert set(reading.counts) == {None} and not reading.suspects
    page = render([reading])
    steps, held_out = page.index('class="step"'), page.index("Held-out prompts</h2>")
    assert 'class="answer "' in page[steps:held_out]
    assert not re.search('class="answer (right|wrong)|class="badge all-', page[steps:held_out])
    assert re.search('class="answer (right|wrong)', page[held_out:])


def test_an_answer_that_a_reward_failed_on_is_neither_right_nor_wrong(tmp_path):
    folder = make_run(tmp_path / "run", steps=2)
    lines = lines_of(folder / "completions.jsonl")
    for line in lines:
        if line["member"] == 0:
            line |= {"reward": None, "failed": {"correctness": "ZeroDivisionError (<b>division</b>)"}}
            line["parts"]["correctness"] = None
    (folder / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reading = read(folder)
    assert reading.counts[None] == len(lines) / 4
    assert "correctness failed: ZeroDivisionError (&lt;b&gt;division&lt;/b&gt;)" in render([reading])


# ---- several runs


def test_two_runs_are_compared_over_the_prompts_that_they_share(tmp_path):
    one = make_run(tmp_path / "one", better=False)
    two = make_run(tmp_path / "two")
    config = json.loads((two / "config.json").read_text())
    config["config"]["learning_rate"] = 0.5
    (two / "config.json").write_text(json.dumps(config))
    html = render([Reading(one), Reading(two)])
    text = texts_of(html)
    assert "What they differ in" in text and "learning_rate" in text and "18 prompts" in text
    scores = [held_out_scores(read(folder), 12, "eval/pass@1") for folder in (one, two)]
    expected = 100 * (np.mean(list(scores[1].values())) - np.mean(list(scores[0].values())))
    assert f"{expected:+.1f}" in text
    assert not Page(html).open


def test_the_command_writes_the_file_and_says_what_is_wrong(tmp_path, capsys):
    run = make_run(tmp_path / "run", steps=3)
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    out = tmp_path / "both.html"
    assert main([str(run), str(make_run(tmp_path / "other", steps=3)), "--out", str(out)]) == 0
    assert "Compared" in out.read_text()
    capsys.readouterr()
    for argv, words in (
        ([str(tmp_path / "none")], "is no run's folder"),
        ([str(run), str(tmp_path / "other")], "give --out FILE"),
        ([str(run), "--out", str(tmp_path)], "is a folder"),
        (
            [str(run), "--out", str(tmp_path / "no" / "such" / "x.html")],
            f"There is no folder {tmp_path / 'no' / 'such'} to write x.html",
        ),
        ([str(tmp_path / "\x1b[31m")], "\\x1b[31m is no run's folder"),
    ):
        assert main(argv) == 2
        assert words in capsys.readouterr().err


def test_a_page_is_written_whole_and_through_no_link(tmp_path):
    run, mine = make_run(tmp_path / "run", steps=3), tmp_path / "mine"
    mine.write_text("mine")
    for name in ("report.html", f".report.html.{os.getpid()}.partial"):
        (run / name).symlink_to(mine)
    assert main([str(run)]) == 0
    assert mine.read_text() == "mine"
    assert not (run / "report.html").is_symlink()
    assert not list(run.glob(".report*"))


def test_links_in_a_run_that_was_downloaded_are_not_followed(tmp_path):
    run, mine = make_run(tmp_path / "run", steps=3), tmp_path / "mine.json"
    mine.write_text(json.dumps({"id": "x", "command": "my secret", "config": {"seed": "my secret"}, "step": 1}) + "\n")
    for name in ("starts.jsonl", "prompts.jsonl", "config.json"):
        (run / name).unlink()
        (run / name).symlink_to(mine)
    assert "my secret" not in render([Reading(run)])
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(mine)
    with pytest.raises(UserError, match="is no run's folder"):
        Reading(run)


# ---- as a run goes


def test_a_page_that_cannot_be_made_stops_nothing_and_is_told(tmp_path):
    told = []
    sink = ReportSink(tmp_path, told.append)
    sink.step(0, {})  # there is no metrics.jsonl
    assert len(told) == 1 and told[0].startswith("note: report.html is not written.")
    sink.step(1, {})  # not due
    assert len(told) == 1


def test_a_full_disk_is_told_as_such(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", steps=3)

    def full(readings, out):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grpo.report.sink.write_report", full)
    with pytest.raises(OSError, match="No space left"):
        ReportSink(run, print).close()


# ---- what is kept of a run of any length


@pytest.mark.parametrize("steps", [1, 5, 24, 25, 100, 4097])
def test_thinned_steps_are_evenly_spread_and_end_with_the_last(steps):
    thinned = Thinned(24)
    for step in range(steps):
        thinned.add(step, "a")
        thinned.add(step, "b")
        assert len(thinned.steps) <= 25
    kept = list(thinned.steps)
    assert kept[0] == 0 and kept[-1] == steps - 1
    assert len(kept) >= min(steps, 12)
    gaps = np.diff(kept[:-1])
    assert len(set(gaps.tolist())) <= 1
    assert all(items == ["a", "b"] for items in thinned.steps.values())


def test_numbers_of_a_step_are_of_all_its_completions(tmp_path):
    folder = make_run(tmp_path / "run", steps=30, groups=6)
    reading = read(folder)
    lines = [line for line in lines_of(folder / "completions.jsonl") if line["step"] == 17]
    rewards = [line["reward"] for line in lines]
    assert reading.bands["reward/mean"][17] == tuple(np.quantile(rewards, (0.1, 0.9)))
    right = [line["tokens"] for line in lines if line["parts"]["correctness"] >= 2]
    wrong = [line["tokens"] for line in lines if line["parts"]["correctness"] < 2]
    assert reading.right_lengths[17] == (pytest.approx(np.mean(right)), pytest.approx(np.mean(wrong)))
    assert reading.counts.total() == 30 * 6 * 4
    assert len(reading.suspects) == 2  # each text once
    assert all(answer.is_right is False for answer in reading.suspects)
    assert 200 <= len(reading.points) <= 800


# ---- judging


def brute_force_p(gains):
    """Every choice of signs, in Python."""
    total = abs(sum(gains))
    sums = [
        abs(sum(s * g for s, g in zip(signs, gains, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(gains))
    ]
    return sum(each >= total - 1e-9 for each in sums) / len(sums)


@pytest.mark.parametrize(
    "gains", [[0.25, 0.5, -0.25, 1.0, 0.0], [1.0] * 8, [0.0] * 5, [0.5, -0.5], [0.25] * 3 + [-1.0]]
)
def test_the_paired_test_of_few_prompts_is_exact(gains):
    before = {str(at): 0.25 for at in range(len(gains))}
    after = {str(at): 0.25 + gain for at, gain in enumerate(gains)} | {"another": 1.0}
    test = paired(before, after)
    assert test.p == pytest.approx(brute_force_p(gains))
    assert (test.prompts, test.better, test.worse) == (len(gains), sum(g > 0 for g in gains), sum(g < 0 for g in gains))
    assert test.difference == pytest.approx(np.mean(gains))
    half = 1.959964 * np.std(gains, ddof=1) / math.sqrt(len(gains))
    assert (test.low, test.high) == (pytest.approx(np.mean(gains) - half), pytest.approx(np.mean(gains) + half))


def test_the_paired_test_of_many_prompts_is_near_the_exact_one():
    """Of gains of one size the number of better ones is binomial."""
    better, worse = 30, 16
    gains = [0.5] * better + [-0.5] * worse
    n = better + worse
    exact = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= better - worse) / 2**n
    test = paired(dict.fromkeys(map(str, range(n)), 0.0), {str(at): gain for at, gain in enumerate(gains)})
    assert test.p == pytest.approx(exact, abs=0.005)
    assert paired({"a": 1.0}, {"a": 0.0}) is None
    assert paired({"a": 1.0}, {"b": 0.0}) is None


@pytest.mark.parametrize(("better", "judgement"), [(True, "better"), (False, "equal")])
def test_the_verdict_is_that_of_the_paired_test(tmp_path, better, judgement):
    folder = make_run(tmp_path / "run", better=better)
    found = verdict(read(folder))
    assert found.judgement == judgement
    assert (found.first.step, found.last.step) == (0, 12)
    lines = lines_of(folder / "held_out.jsonl")
    shares = [[line["parts"]["correctness"] >= 2 for line in lines if line["step"] == step] for step in (0, 12)]
    assert found.paired.difference == pytest.approx(np.mean(shares[1]) - np.mean(shares[0]))


def test_a_verdict_begins_where_the_last_prompts_were_first_asked(tmp_path):
    """A run that went on with other held-out prompts was scored anew at that step."""
    folder = make_run(tmp_path / "run", steps=20)
    lines = lines_of(folder / "held_out.jsonl")
    others = [line | {"id": f"another {line['id']}"} for line in lines if line["step"] >= 10]
    kept = [line for line in lines if line["step"] <= 10]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*kept, *others]))
    found = verdict(read(folder))
    assert (found.first.step, found.last.step, found.paired.prompts) == (10, 20, 18)


def test_answers_of_many_evaluations_are_thinned_and_the_ends_are_kept(tmp_path):
    folder = make_run(tmp_path / "run", steps=120, evaluate_every=1, groups=1, tokens=False)
    reading = read(folder)
    assert len(reading.held_out) <= 25 and {0, 120} <= set(reading.held_out)
    assert verdict(reading).paired.prompts == 18
    anew = [line | {"parts": {"correctness": 0.0}} for line in lines_of(folder / "held_out.jsonl")[-36:]]
    with (folder / "held_out.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in anew))
    assert set(held_out_scores(read(folder), 120, "eval/pass@1").values()) == {0.0}


def test_health_says_where_a_number_first_left_its_range(tmp_path):
    folder = make_run(tmp_path / "run", steps=20)
    metrics = lines_of(folder / "metrics.jsonl")
    for line in metrics:
        if "policy/entropy" in line:
            line |= {"policy/entropy": 0.5 if line["step"] < 7 else 0.001, "completion/truncated": 0.0}
            line |= {"groups/zero_variance": 0.9 if line["step"] == 3 else 0.1, "reward/std": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    found = {finding.metric: finding for finding in health(read(folder))}
    entropy, equal = found["policy/entropy"], found["groups/zero_variance"]
    assert (entropy.state, entropy.first_outside, entropy.outside_steps, entropy.steps) == ("outside", 7, 13, 20)
    assert entropy.value == pytest.approx(0.001)
    assert (equal.state, equal.first_outside, equal.outside_steps) == ("was", 3, 1)
    assert (found["completion/truncated"].state, found["completion/truncated"].first_outside) == ("well", None)
    assert "reward/std" not in found


def test_an_opening_that_takes_over_and_pay_that_follows_length_are_told(tmp_path):
    folder = make_run(tmp_path / "run", steps=20)
    lines = lines_of(folder / "completions.jsonl")
    for at, line in enumerate(lines):
        line["text"] = f"{at} different words here" if line["step"] < 10 else "As an AI model I say " + str(at)
        line["tokens"], line["reward"] = at % 50, float(at % 50)
        line["parts"]["correctness"] = 0.0
    (folder / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = suspicions(read(folder))
    assert found.opening_before == pytest.approx(1 / 16) and found.opening_after == 1.0
    assert found.openings[-1][1] == "As an AI model"
    assert found.correlation == pytest.approx(1.0)
    assert [answer.reward for answer in found.wrong_and_paid] == [49.0] * 6 + [48.0] * 6


# ---- charts


@pytest.mark.parametrize(
    "points",
    [
        {0: 1.0},
        {0: 0.0, 1: 0.0},
        {5: -1e29, 7: 1e29},
        {n: math.sin(n) for n in range(5000)},
        {0: math.nan, 1: 2.0},
        {-3: 1e-300},
    ],
)
def test_a_chart_is_well_formed_and_stays_in_its_frame(points):
    band = {step: (value - 1, value + 1) for step, value in points.items()}
    made = [
        chart("<a>&", [Line('"x"', points, 0, band), Line("none", {})]),
        chart("zero", [Line("x", points)], zero=True, form="%"),
        stacked("s", [Line("a", {s: abs(v) for s, v in points.items()}), Line("b", points)]),
        scatter("p", [(float(s), v, s % 2 == 0) for s, v in points.items()], "<tokens>"),
    ]
    for each in made:
        if each is None:
            continue
        svg = ElementTree.fromstring(str(each.svg))
        width, height = map(float, svg.attrib["viewBox"].split()[2:])
        for element in svg.iter():
            pairs = [pair.split(",") for pair in element.get("points", "").split()]
            pairs += [[element.get("cx"), element.get("cy")]] if element.get("cx") else []
            for x, y in pairs:
                assert -0.1 <= float(x) <= width + 0.1
                assert -0.1 <= float(y) <= height + 0.1
        assert len(str(each.svg)) < 40_000 or each is made[-1]


def test_nothing_is_drawn_of_nothing():
    assert chart("a", [Line("x", {}), Line("y", {1: math.nan, 2: math.inf})]) is None
    assert stacked("a", [Line("x", {1: 1.0}), Line("y", {2: 1.0})]) is None
    assert scatter("a", [], "x") is None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.3, 0.31), (-5, 5), (0, 1e12), (1e-13, 3e-13), (99, 101)])
def test_ticks_are_few_round_numbers_within(low, high):
    found = ticks(low, high, 4)
    assert 1 <= len(found) <= 5
    steps = np.diff(found)
    assert len(steps) == 0 or np.allclose(steps, steps[0])
    assert all(low - 1e-9 * abs(high) <= tick <= high + 1e-9 * abs(high) for tick in found)


def test_a_folder_that_is_none_is_told(tmp_path):
    with pytest.raises(UserError, match="is no run's folder"):
        Reading(tmp_path)
    write_report([Reading(make_run(tmp_path / "run", steps=1))], tmp_path / "x.html")


def test_the_example_is_small_and_of_a_run_that_learnt():
    html = (ROOT / "docs" / "example-report.html").read_text()
    assert len(html.encode()) < 2_000_000
    assert "It learnt." in html and len(Page(html).scripts) == 1
