"""The readers of Debian packages, on small folders of the same form."""

import gzip
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from data_prep.debian_texts import anarchism, html_paragraphs, linux, openjdk, perl, python, unrepeated, without_pod

WORDS = " ".join(f"word{number}" for number in range(60))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=6))
def test_a_long_paragraph_occurs_once_and_short_ones_stay(documents: list[list[int]]) -> None:
    texts = ["\n\n".join([f"{number} {WORDS}", "short title"][number % 2] for number in document) for document in documents]
    kept = list(unrepeated(texts))
    paragraphs = [paragraph for text in kept for paragraph in text.split("\n\n")]
    long = [paragraph for paragraph in paragraphs if paragraph != "short title"]
    assert len(long) == len({*long})
    assert {*long} == {f"{number} {WORDS}" for document in documents for number in document if number % 2 == 0}
    assert all(len(text.split()) >= 50 for text in kept)


def test_blocks_of_a_page_without_navigation() -> None:
    page = "<head><title>t</title></head><nav><p>menu</p></nav><main><h1>A &amp; B</h1><p>one\n<code>two</code><p>three"
    assert html_paragraphs(page + "<script>x = 1</script><ul><li>four</ul></main>") == ["A & B", "one two", "three", "four"]


def test_pod_becomes_plain_text() -> None:
    pod = (
        "=head1 NAME\n\nC<f> is B<I<very> nice>, see L<perlfunc|/x> and C<< a->b >>.X<index>\n\n=over 4\n\n=item E<lt>b\n\n"
    )
    assert (
        " ".join(without_pod(pod + "=for html\n<b>\n\n=cut\n").split()) == "NAME f is very nice, see perlfunc and a->b. <b"
    )


def test_each_package_gives_its_documents(tmp_path: Path) -> None:
    write(tmp_path / "doc/markdown/a.md.gz", f"## First\n\n**{WORDS}** _em_ [link](x.html) a_b\n\n## Second\n\n2 {WORDS}\n")
    assert [text[:9] for text in anarchism(tmp_path)] == ["## First\n", "## Second"]
    assert next(iter(anarchism(tmp_path))).endswith("word59 em link a_b")
    write(tmp_path / "html/_sources/library/x.rst.txt", f"Title\n=====\n\n{WORDS}\n")
    assert list(python(tmp_path)) == [f"Title\n=====\n\n{WORDS}"]
    write(tmp_path / "perl/x.pod", f"=head1 A\n\n{WORDS}\n\n=head1 B\n\n2 {WORDS}\n")
    assert [text[0] for text in perl(tmp_path)] == ["A", "B"]
    write(tmp_path / "Documentation/x.rst.gz", f".. SPDX-License-Identifier: GPL-2.0\n\n{WORDS}\n")
    write(tmp_path / "Documentation/translations/de/x.rst.gz", f"{WORDS} de\n")
    assert list(linux(tmp_path)) == [WORDS]
    write(tmp_path / "api/List.html", f"<main><p>few words</p><p>{WORDS}</p></main>")
    write(tmp_path / "api/class-use/List.html", f"<main><p>uses {WORDS}</p></main>")
    assert list(openjdk(tmp_path)) == [WORDS]
