"""Makes the reports that the documents show: of a default run, and of four that go wrong, with pictures of each.

Knows nothing of what is wrong with a run: it runs them, and writes down what their reports say.

python scripts/make_reports.py            run all, on a CPU in some minutes, then pictures and tables
python scripts/make_reports.py NAME ...   some of them: default, or a lesson's name
python scripts/make_reports.py --write    the tables in docs/report.md alone, from benchmarks/results/lessons-cpu.json
python scripts/make_reports.py --check    fail if that would change anything

Pictures want playwright and a Chromium. The tasks that go wrong are in scripts/going_wrong/.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

from grpo.metrics import find
from grpo.report.judging import health, verdict
from grpo.report.reading import Reading

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "lessons-cpu.json"
PAGE = ROOT / "docs" / "report.md"
IMAGES = ROOT / "docs" / "images"
EXAMPLE = ROOT / "docs" / "example-report.html"

ON_A_CPU = ["--model", "embedded", "--device", "cpu"]
SHORT = ["--steps", "30", "--eval-every", "10", "--eval-prompts", "64"]

# name -> the task and the flags that make it go wrong
LESSONS = {
    "collapse": ["gsm8k", "--learning-rate", "0.03"],
    "format-hacking": ["scripts/going_wrong/format_only.py", "--learning-rate", "5e-3"],
    "length-hacking": ["scripts/going_wrong/long_is_good.py", "--learning-rate", "4e-3"],
    "entropy-death": ["scripts/going_wrong/agree_with_yourself.py", "--learning-rate", "1e-3", "--epochs", "4"],
}


def main() -> int:
    given = sys.argv[1:]
    if given in (["--write"], ["--check"]):
        return write(check=given == ["--check"])
    unknown = set(given) - {"default", *LESSONS}
    if unknown:
        sys.exit(f"There is no {', '.join(sorted(unknown))}: default, {', '.join(LESSONS)}")
    with tempfile.TemporaryDirectory() as scratch:
        if not given or "default" in given:
            make_example(Path(scratch) / "gsm8k-default")
        for name in [name for name in LESSONS if not given or name in given]:
            keep(name, make_lesson(name, Path(scratch) / name))
    return write(check=False)


def run(folder: Path, words: list[str]) -> None:
    """A run of grpo.run in a process of its own."""
    command = [sys.executable, "-m", "grpo.run", *words, *ON_A_CPU, "--run-dir", str(folder)]
    print(" ".join(command[1:]))
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


# ---- the example


def make_example(folder: Path) -> None:
    """The report of the default run, and pictures of it at three widths, in the dark and of its completions."""
    run(folder, ["gsm8k", "--seed", "0"])
    shutil.copy(folder / "report.html", EXAMPLE)
    shots = [
        Shot("report.png", 1200, 1000),
        Shot("report-tablet.png", 768, 1000),
        Shot("report-phone.png", 400, 860),
        Shot("report-dark.png", 1200, 1000, scheme="dark", at="#curves0"),
        Shot("report-completions.png", 1200, 1000, at="#groups0"),
    ]
    take(EXAMPLE, shots)


# ---- the lessons


@dataclass
class Lesson:
    """What the report of a run that went wrong said."""

    command: str
    first: list[float]  # held-out pass@1 before, with its interval
    last: list[float]
    rewards: dict[str, list[float]]  # name -> mean of the first step, and of the last
    findings: list[dict[str, Any]]  # numbers that left their range, the worst first
    date: str
    machine: str


def make_lesson(name: str, folder: Path) -> Lesson:
    """Run it, take its pictures, read what its report says."""
    words = [*LESSONS[name], *SHORT]
    run(folder, words)
    take(
        folder / "report.html", [Shot(f"{name}.png", 1200, 1000), Shot(f"{name}-curves.png", 1200, 760, at="#curves0")]
    )
    reading = Reading(folder)
    reading.advance()
    found = verdict(reading)
    assert found.first and found.last
    rewards = {
        metric: [points[min(points)], points[max(points)]]
        for metric, points in reading.metrics.items()
        if metric == "reward/mean" or (metric.startswith("reward/") and (row := find(metric)) and "<" in row.name)
    }
    findings = [asdict(each) for each in health(reading) if each.state != "well"]
    return Lesson(
        command=f"python -m grpo.run {' '.join(words)}",
        first=[found.first.value, found.first.low, found.first.high],
        last=[found.last.value, found.last.low, found.last.high],
        rewards=rewards,
        findings=[
            {key: each[key] for key in ("metric", "value", "unit", "state", "first_outside")} for each in findings
        ],
        date=date.today().isoformat(),
        machine=f"{os.cpu_count()} cores of an {platform.machine()} CPU",
    )


def keep(name: str, lesson: Lesson) -> None:
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    ordered = kept | {name: asdict(lesson)}
    RESULT.write_text(json.dumps({each: ordered[each] for each in LESSONS if each in ordered}, indent=2) + "\n")


# ---- pictures


@dataclass
class Shot:
    """A picture of a page: as much of it as a window of this size shows, from `at` on."""

    name: str
    width: int
    height: int
    at: str = ""
    scheme: Literal["light", "dark"] = "light"


def take(page: Path, shots: list[Shot]) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        for shot in shots:
            shown = browser.new_page(
                viewport={"width": shot.width, "height": shot.height},
                color_scheme=shot.scheme,
                reduced_motion="reduce",
            )
            shown.goto(f"file://{page.resolve()}{shot.at}")
            shown.wait_for_timeout(500)
            shown.screenshot(path=IMAGES / shot.name)
        browser.close()
    shrink([IMAGES / shot.name for shot in shots])


def shrink(pictures: list[Path]) -> None:
    """Few colours are on such a page: with a palette a picture takes a third of the bytes."""
    from PIL import Image

    for path in pictures:
        with Image.open(path) as picture:
            smaller = picture.convert("RGB").quantize(colors=128)
        smaller.save(path, optimize=True)


# ---- the tables in docs/report.md


def write(check: bool) -> int:
    """What the reports said, between the markers of each lesson."""
    old = text = PAGE.read_text()
    for name, lesson in json.loads(RESULT.read_text()).items():
        begin, end = f"<!-- {name} begin: python scripts/make_reports.py -->", f"<!-- {name} end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{told(lesson)}\n\n{end}{rest.split(end)[1]}"
    if check and text != old:
        sys.exit(f"{PAGE} is older than the results; run python scripts/make_reports.py --write")
    PAGE.write_text(text)
    return 0


def told(lesson: dict[str, Any]) -> str:
    """The command, what it came to, and which numbers of the health table were outside."""
    lines = ["```bash", lesson["command"], "```", "", "| | at first | at last |", "|---|---:|---:|"]
    lines += [f"| **held-out pass@1** | **{score(lesson['first'])}** | **{score(lesson['last'])}** |"]
    lines += [f"| `{name}` | {first:.2f} | {last:.2f} |" for name, (first, last) in lesson["rewards"].items()]
    lines += ["", "What the health table had outside:", "", "| | at last | since step | |", "|---|---:|---:|---|"]
    lines += [finding(each) for each in lesson["findings"]]
    return "\n".join([*lines, "", f"({lesson['machine']}, {lesson['date']}; seed 0.)"])


def score(value: list[float]) -> str:
    share, low, high = (100 * each for each in value)
    return f"{share:.1f}% [{low:.1f}, {high:.1f}]"


def finding(each: dict[str, Any]) -> str:
    value = f"{each['value']:.0%}" if each["unit"] == "share" else f"{each['value']:.3g}"
    step = each["first_outside"] + (0 if each["metric"].startswith("eval/") else 1)
    return f"| `{each['metric']}` | {value} | {step} | {'outside' if each['state'] == 'outside' else 'was outside'} |"


if __name__ == "__main__":
    sys.exit(main())
