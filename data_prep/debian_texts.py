"""Readers of the documentation in Debian packages: the folder of an unpacked package -> its documents.

Tags of HTML and POD are removed; Markdown and reStructuredText stay, as they are text that people read. Paragraphs that an
earlier document of the package has are left out, and so are documents of less than 50 words.
"""

import gzip
import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

REPEATED_WORDS = 8
"""A paragraph of at least so many words occurs once in a package."""
DOCUMENT_WORDS = 50
"""Smallest document."""
BLOCKS = frozenset(
    (
        *("p", "div", "section", "article", "main", "header", "footer", "nav", "table", "caption", "tr", "td", "th"),
        *("ul", "ol", "dl", "li", "dt", "dd", "pre", "blockquote", "hr", "br", "h1", "h2", "h3", "h4", "h5", "h6"),
    )
)
NOT_TEXT = frozenset(["script", "style", "nav", "header", "footer", "head", "button"])
NOT_PROSE = re.compile(r"/(class-use|index-files|legal)/|/(all|package-|module-|overview-tree|constant-values)[^/]*\.html$")
"""Pages of the OpenJDK documentation that list names."""


def anarchism(folder: Path) -> Iterator[str]:
    """An Anarchist FAQ: one document per question."""
    pages = (_read(path) for path in sorted(folder.rglob("*.md*")))
    return unrepeated(_without_emphasis(part) for page in pages for part in re.split(r"(?m)^(?=#)", page))


def python(folder: Path) -> Iterator[str]:
    """The Python documentation: one document per page, reStructuredText."""
    return unrepeated(_read(path) for path in sorted(folder.rglob("_sources/**/*.rst.txt")))


def perl(folder: Path) -> Iterator[str]:
    """The Perl documentation: one document per top-level heading of each page."""
    pages = (_read(path) for path in sorted(folder.rglob("*.pod")))
    return unrepeated(without_pod(part) for page in pages for part in re.split(r"(?m)^(?==head1 )", page))


def linux(folder: Path) -> Iterator[str]:
    """The Linux documentation in English: one document per page, reStructuredText."""
    paths = (path for path in sorted(folder.rglob("Documentation/**/*.rst.gz")) if "translations" not in path.parts)
    return unrepeated(re.sub(r"(?m)^\.\. SPDX.*\n", "", _read(path)) for path in paths)


def openjdk(folder: Path) -> Iterator[str]:
    """The OpenJDK documentation: one document per page, its paragraphs of at least 8 words."""
    paths = (path for path in sorted(folder.rglob("*.html")) if not NOT_PROSE.search(path.as_posix()))
    return unrepeated(
        "\n\n".join(part for part in html_paragraphs(_read(path)) if len(part.split()) >= REPEATED_WORDS) for path in paths
    )


def unrepeated(documents: Iterable[str]) -> Iterator[str]:
    """The documents without paragraphs that an earlier one has, and without those that are then too short."""
    seen: set[str] = set()
    for document in documents:
        kept = []
        for paragraph in re.split(r"\n\s*\n", document):
            words = paragraph.split()
            key = " ".join(words)
            if len(words) >= REPEATED_WORDS:
                if key in seen:
                    continue
                seen.add(key)
            if words:
                kept.append(paragraph.rstrip())
        if sum(len(paragraph.split()) for paragraph in kept) >= DOCUMENT_WORDS:
            yield "\n\n".join(kept).strip("\n")


def html_paragraphs(page: str) -> list[str]:
    """The text of each block of a page, without navigation."""
    parser = _Paragraphs()
    parser.feed(page)
    parser.close()
    return [text for part in "".join(parser.parts).split("\0") if (text := " ".join(part.split()))]


class _Paragraphs(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.skipping += tag in NOT_TEXT
        self._separate(tag)

    def handle_endtag(self, tag: str) -> None:
        self.skipping = max(0, self.skipping - (tag in NOT_TEXT))
        self._separate(tag)

    def _separate(self, tag: str) -> None:
        if tag in BLOCKS:
            self.parts.append("\0")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data)


def without_pod(text: str) -> str:
    """POD (perlpod) as plain text. `=begin` and `=for` go with their paragraph; the rest of a block stays."""
    text = re.sub(r"(?ms)^=(begin|for)\b.*?(^=end\b[^\n]*\n|\n\n)", "", text)
    text = re.sub(r"(?m)^=(over|back|cut|encoding|pod)\b.*\n", "", text)
    text = re.sub(r"(?m)^=(?:head\d|item) *", "", text)
    text = re.sub(r"[XZ]<[^<>]*>", "", text)
    text = re.sub(r"[A-Z]<<+ (.*?) >>+", r"\1", text)
    for _ in range(3):  # codes may be nested
        text = re.sub(r"L<([^<>|]*)\|[^<>]*>", r"\1", text)
        text = re.sub(r"[BCFILS]<([^<>]*)>", r"\1", text)
    for name, character in (("lt", "<"), ("gt", ">"), ("verbar", "|"), ("sol", "/")):
        text = text.replace(f"E<{name}>", character)
    return text


def _without_emphasis(text: str) -> str:
    text = re.sub(r"\[([^\][]*)\]\([^()]*\)", r"\1", text)
    return re.sub(r"\*\*|(?<!\w)_|_(?!\w)", "", text)


def _read(path: Path) -> str:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8", "replace")
