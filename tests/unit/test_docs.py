"""Links in README, CONTRIBUTING, CHANGELOG and docs/ resolve: files exist, and headings have the anchors that are linked."""

import re
from collections import Counter
from pathlib import Path

from tests.conftest import ROOT

PAGES = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md")))
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")


def without_code(text: str) -> str:
    """Markdown without fenced blocks and inline code, which hold no links or headings."""
    return re.sub(r"`[^`\n]*`", "code", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page: repeated ones get -1, -2, ..."""
    seen = Counter[str]()
    found = set[str]()
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", text, re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def problem_of(page: Path, link: str) -> str | None:
    """The problem of a link; None if it resolves or points outside the repository."""
    if re.match(r"[a-z]+:", link):
        return None
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return f"{page.relative_to(ROOT)}: {link}: no such file"
    if anchor and anchor not in anchors(target):
        return f"{page.relative_to(ROOT)}: {link}: no such heading; there are {', '.join(sorted(anchors(target)))}"
    return None


def test_relative_links_and_anchors_resolve() -> None:
    links = [(page, link) for page in PAGES for link in LINK.findall(without_code(page.read_text()))]
    assert len(links) > 40
    assert [problem for page, link in links if (problem := problem_of(page, link))] == []


def test_every_page_of_docs_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in sorted((ROOT / "docs").glob("*.md")) if f"(docs/{page.name})" not in readme] == []


def test_every_picture_is_used() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert [path.name for path in sorted((ROOT / "docs/images").iterdir()) if f"images/{path.name})" not in text] == []
