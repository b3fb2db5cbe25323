"""The documents as a site: it is built without a warning and without a network, and loads nothing from elsewhere.

Wants mkdocs-material (`pip install -e ".[docs]"`).
"""

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("material", reason="mkdocs-material is not installed")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import site_pages  # noqa: E402

# A proxy that nobody answers: whatever is fetched while the site is built fails, and is then a warning or an error.
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
# What a browser fetches by itself, an attribute each; links are followed by readers alone.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src", "object": "data"}
KINDS_OF_LINK = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "modulepreload", "dns-prefetch"}


class Fetches(HTMLParser):
    """The addresses that a page fetches."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        is_fetched = tag != "link" or KINDS_OF_LINK & set(given.get("rel", "").split())
        if is_fetched and given.get(FETCHED.get(tag)):
            self.found.append(given[FETCHED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | NO_NETWORK)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_document_is_a_page(site):
    documents = {path.stem for path in (ROOT / "docs").glob("*.md")}
    pages = {path.stem for path in site.glob("*.html")}
    assert documents | {"index", "contributing", "changelog", "log", "kernels", "benchmarks"} <= pages
    home = (site / "index.html").read_text()
    assert all(f'href="{name}.html"' in home for name in documents)  # each is in the navigation
    assert (site / "example-report.html").read_bytes() == (ROOT / "docs" / "example-report.html").read_bytes()


def test_pages_fetch_nothing_from_elsewhere_and_what_they_fetch_is_there(site):
    for page in set(site.glob("*.html")) - {site / "404.html"}:  # which a server shows, with paths from its root
        for address in Fetches(page.read_text()).found:
            assert not address.startswith(("http:", "https:", "//")), f"{page.name} fetches {address}"
            if not address.startswith("data:"):
                assert (page.parent / address.partition("?")[0].partition("#")[0]).exists(), f"{page.name}: {address}"
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text() and "@import" not in style.read_text(), style.name


def test_links_between_documents_are_links_between_pages(site):
    """docs/architecture.md names ../grpo modules in words alone; README.md leads to docs/speed.md, which is a page."""
    home, runs = ((site / f"{name}.html").read_text() for name in ("index", "memory"))
    assert '<a href="speed.html">docs/speed.md</a>' in home and '<a href="log.html">' in runs
    for page in site.glob("*.html"):
        article = page.read_text().partition("<article")[2].partition("</article>")[0]
        assert 'href="../' not in article and '.md"' not in article and '.py"' not in article, page.name


@pytest.mark.parametrize(
    ("page", "written", "shown"),
    [
        ("index.md", "[`tasks/gsm8k.py`](tasks/gsm8k.py)", "`tasks/gsm8k.py`"),
        (
            "index.md",
            "[runs](docs/runs.md#going-on), [how](CONTRIBUTING.md)",
            "[runs](runs.md#going-on), [how](contributing.md)",
        ),
        ("index.md", "![a page](docs/images/report.png)", "![a page](images/report.png)"),
        (
            "memory.md",
            "[grpo/memory.py](../grpo/memory.py) and [how](../CONTRIBUTING.md)",
            "`grpo/memory.py` and [how](contributing.md)",
        ),
        ("runs.md", "[numbers](metrics.md), [the folder](../examples/)", "[numbers](metrics.md), the folder"),
        ("kernels.md", "[figures](../docs/figures.md)", "[figures](figures.md)"),
        (
            "runs.md",
            "[there](https://example.org/a.md) [here](#stopping)",
            "[there](https://example.org/a.md) [here](#stopping)",
        ),
        (
            "runs.md",
            "`[x](../grpo/run.py)`\n```\n[y](../CONTRIBUTING.md)\n```\n",
            "`[x](../grpo/run.py)`\n```\n[y](../CONTRIBUTING.md)\n```\n",
        ),
    ],
)
def test_links_of_the_repository_become_those_of_the_site(page, written, shown):
    outside = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "kernels.md": "kernels/README.md"}
    place, config = SimpleNamespace(file=SimpleNamespace(src_uri=page)), SimpleNamespace(extra={"outside": outside})
    assert site_pages.on_page_markdown(written, place, config, None) == shown


def test_a_page_that_has_no_place_yet_stands_at_the_end(tmp_path):
    for name in ("known.md", "new.md"):
        (tmp_path / name).touch()
    config = SimpleNamespace(nav=[{"Start": [{"It": "known.md"}]}], docs_dir=str(tmp_path))
    assert site_pages.on_config(config).nav == [{"Start": [{"It": "known.md"}]}, {"More": ["new.md"]}]
