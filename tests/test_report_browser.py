"""In a browser nothing of a hostile run's texts is run, loaded or followed, and the page is usable.

Wants playwright and a Chromium (`pip install playwright`, and `apt install chromium` or `playwright install chromium`).
"""

import os
import shutil

import pytest
from made_up_run import HOSTILE, make_run

from grpo.report.page import write_report
from grpo.report.reading import Reading

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = CHROMIUM or started.chromium.executable_path
        if not os.path.exists(found):
            pytest.skip("there is no Chromium")
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A report of a run whose texts are hostile, one of them a megabyte long."""
    folder = tmp_path_factory.mktemp("hostile")
    texts = [*HOSTILE, "x" * 2**20, "<script>alert(2)</script>" * 40_000]
    run = make_run(folder / "run", steps=8, texts=texts, name="toy", reward="<b onclick=alert(1)>", evaluate_every=8)
    write_report([Reading(run), Reading(make_run(folder / "other", steps=4))], folder / "both.html")
    write_report([Reading(run)], folder / "one.html")
    return folder


class Watched:
    """A page, and all that it did that it should not."""

    def __init__(self, browser, path, **settings):
        self.page = browser.new_page(**settings)
        self.wrong = []
        self.page.on("dialog", lambda dialog: (self.wrong.append(dialog.message), dialog.dismiss()))
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: request.url == self.url or self.wrong.append(request.url))
        self.url = f"file://{path}"
        self.page.goto(self.url)

    def check(self):
        """Nothing went wrong so far."""
        assert self.wrong == []
        assert self.page.evaluate("window.hacked === undefined && parent === window")
        assert self.page.url.split("#")[0] == self.url

    def count(self, selector):
        return self.page.locator(selector).count()


@pytest.mark.parametrize("name", ["one.html", "both.html"])
def test_nothing_runs_whatever_is_clicked_and_hovered(browser, file, name):
    watched = Watched(browser, file / name)
    page = watched.page
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    for selector in (".answer .text", ".asked", "i", "svg", "td", "h1", ".badges"):
        for element in page.locator(f"{selector}:visible").all()[:12]:
            element.hover(force=True)
            element.dispatch_event("click")
            element.dispatch_event("focus")
            element.dispatch_event("mouseover")
    assert watched.count("script") == 1
    assert watched.count("iframe, form, img, object, embed, base, link") == 0
    assert watched.count("a:not([href^='#'])") == 0
    watched.check()


def test_a_script_that_came_onto_the_page_after_all_would_not_run(browser, file):
    watched = Watched(browser, file / "one.html")
    for made in (
        "Object.assign(document.createElement('script'), {textContent: 'window.hacked = 9'})",
        "Object.assign(document.createElement('img'), {src: 'https://example.org/x', onload: () => window.hacked = 8})",
        "Object.assign(document.createElement('div'), {innerHTML: '<b onclick=\"window.hacked = 7\" id=b>b</b>'})",
    ):
        with watched.page.expect_console_message(lambda message: "Content Security Policy" in message.text):
            watched.page.evaluate(f"document.body.append({made}), document.getElementById('b')?.click()")
    assert watched.page.evaluate("window.hacked") is None


def test_groups_are_found_by_step_kind_and_words(browser, file):
    watched = Watched(browser, file / "one.html")
    page = watched.page
    assert watched.count(".step:visible") == 1
    assert page.locator(".bar output").inner_text() == "step 8"
    page.locator(".bar .previous").click()
    assert page.locator(".bar output").inner_text() == "step 7"
    page.locator(".bar .kind").select_option("all-wrong")
    assert watched.count(".group[data-kinds*='all-wrong']:visible") == watched.count(".step .group:visible") == 1
    page.locator(".bar .kind").select_option("disagree")
    assert page.locator(".nothing").is_visible()
    page.locator(".bar .kind").select_option("")
    page.locator(".bar input[type=search]").fill("SRCDOC='<script>PARENT")
    assert watched.count(".step:visible") >= 2
    assert page.locator(".bar output").inner_text().endswith("groups")
    page.locator(".bar .colour").select_option("gap")
    assert page.locator(".browser").get_attribute("data-colour") == "gap"
    watched.check()


def test_the_keyboard_is_enough_and_links_lead_to_groups(browser, file):
    watched = Watched(browser, file / "one.html")
    page = watched.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    page.keyboard.press("ArrowLeft")
    assert page.locator(".bar output").inner_text() == "step 7"
    page.keyboard.press("j")
    first = page.evaluate("document.activeElement.id")
    page.keyboard.press("j")
    assert first and page.evaluate("document.activeElement.id") not in ("", first)
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.id") == first
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.type") == "search"
    page.keyboard.type("jk/")  # letters, where one writes
    assert page.locator(".bar input[type=search]").input_value() == "jk/"
    other = Watched(browser, f"{file / 'one.html'}")
    other.page.goto(other.url + "#r0-s2-g1")
    other.page.locator("#r0-s2-g1").wait_for(state="visible", timeout=5000)
    assert other.page.locator(".bar output").inner_text() == "step 3"


@pytest.mark.parametrize("name", ["one.html", "both.html"])
@pytest.mark.parametrize("width", [360, 768, 1600])
def test_nothing_is_wider_than_the_window(browser, file, width, name):
    page = Watched(browser, file / name, viewport={"width": width, "height": 800}).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    is_wide = "(each) => !each.closest('.scroll, svg') && each.scrollWidth > innerWidth"
    assert page.evaluate(f"[...document.querySelectorAll('main *')].filter({is_wide}).length") == 0


def test_dark_mode_print_and_a_page_without_its_script(browser, file):
    backgrounds = []
    for scheme in ("light", "dark"):
        page = Watched(browser, file / "one.html", color_scheme=scheme).page
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.locator("#theme").click()
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert backgrounds[0] == backgrounds[3] != backgrounds[1] == backgrounds[2]
    page.emulate_media(media="print", color_scheme="dark")  # paper is white
    colours = page.evaluate(
        "[document.body, document.querySelector('.cards div')].map((e) => getComputedStyle(e).color)"
    )
    assert set(colours) == {"rgb(28, 32, 38)"}
    assert not page.locator(".browser").is_visible() and page.locator(".health").is_visible()
    still = browser.new_context(java_script_enabled=False).new_page()
    still.goto(f"file://{file / 'one.html'}")
    assert still.locator(".step:visible").count() == 8
    assert not still.locator(".bar").is_visible()
