"""What mkdocs is told beside mkdocs.yml: pages that lie outside of docs/, and links that lead out of it.

Knows nothing of what the pages say. In the repository a link is a path from file to file; on the site README.md is the
first page, some other documents are pages too, and what is no page (a module, a folder) is named without a link.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = PurePosixPath("docs")

# Blocks of code and code in a line, in which nothing is a link; and links, whose words may be code.
_PARTS = re.compile(
    r"^```.*?^```|(?P<picture>!?)\[(?P<words>(?:[^\[\]]|\[[^\]]*\])*)\]"
    r"\((?!https?:|mailto:|#)(?P<target>[^)#\s]+)(?P<section>#[^)\s]*)?\)|`[^`\n]+`",
    re.MULTILINE | re.DOTALL,
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A page that mkdocs.yml does not name stands at the end, under More."""
    named = set(re.findall(r"[\w/-]+\.md", str(config.nav)))
    others = sorted(path.name for path in Path(config.docs_dir).glob("*.md") if path.name not in named)
    if config.nav and others:
        config.nav.append({"More": others})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The documents outside of docs/ become pages."""
    for page, source in config.extra["outside"].items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links lead to pages of the site."""
    outside = config.extra["outside"]
    source = outside.get(page.file.src_uri, str(DOCS / page.file.src_uri))
    pages = {document: name for name, document in outside.items()}
    return _PARTS.sub(lambda part: _link(part, source, pages) if part["target"] else part[0], markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """No line breaks inside of a flag or a name."""
    return re.sub(r"<code>([^<\n]{1,28})</code>", r'<code class="short">\1</code>', html)


def _link(link: re.Match[str], source: str, pages: dict[str, str]) -> str:
    """A link of a document of the repository as one of its page, or its words alone."""
    picture, words, section = link["picture"], link["words"], link["section"] or ""
    path = PurePosixPath(os.path.normpath(PurePosixPath(source).parent / link["target"]))
    if str(path) in pages:
        return f"{picture}[{words}]({pages[str(path)]}{section})"
    if DOCS in path.parents:
        return f"{picture}[{words}]({path.relative_to(DOCS)}{section})"
    return f"`{words}`" if re.fullmatch(r"[\w./]+\.\w+", words) else words
