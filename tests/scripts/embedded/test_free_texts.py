"""Paragraphs of documentation in its various forms, as clean prose."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import free_texts
import pytest
from free_texts import Package, clean, collect, download, read_dict, read_html, read_pod, read_wordnet, records
from prompts import HeldOut

from helpers import make_tokenizer

PROSE = "The harbour was built by people who came from the north, and it has been repaired every year since the great storm."
HTML = f"""<html><head><title>Title that is not text</title></head><body><nav><p>Menu</p></nav>
<h1>Heading<a class="headerlink">¶</a></h1><p>{PROSE[:40]}<em>{PROSE[40:]}</em></p><pre>code = 1</pre>
<ul><li>One item<p>Its paragraph.</p></li></ul><table><tr><td>cell</td></tr></table><p>Last &amp; least.<br></body></html>"""
POD = """=head1 NAME

B<Bold I<and italic>> text with C<< $a->{b}
>> and L<a link|perlop/"x">, L<perlfunc>X<index>.

    my $code = 1;

=over 4
"""
WORDNET = "\n".join(f"0000{n} 04 n 01 word_{n} 0 001 @ 00037396 n 0000 | gloss number {n}  " for n in range(7))


def paragraphs(texts: Iterator[str]) -> list[str]:
    return [joined for text in texts if (joined := " ".join(text.split()))]


def test_html_without_code_headings_and_tables() -> None:
    assert paragraphs(read_html(HTML)) == [PROSE, "One item", "Its paragraph.", "Last & least."]


def test_mallard() -> None:
    page = "<page><info><desc>hidden</desc></info><title>T</title><p>Press <key>Esc</key>.</p><screen>ls</screen></page>"
    assert paragraphs(read_html(page)) == ["Press Esc."]


def test_pod() -> None:
    assert paragraphs(read_pod(POD)) == ["Bold and italic text with $a->{b} and a link, perlfunc."]


def test_wordnet_joins_neighbours() -> None:
    first, second = paragraphs(read_wordnet(WORDNET))
    assert first.startswith("word 0: gloss number 0. word 1: gloss number 1.")
    assert second == "word 5: gloss number 5. word 6: gloss number 6."


def test_dict_without_references() -> None:
    text = "modem\n\n   <communications> A device that {links} two\n   computers.\n\n   (1998-09-15)\n"
    assert paragraphs(read_dict(text)) == ["modem", "A device that links two computers."]


@pytest.mark.parametrize(
    "text",
    ["Too short.", PROSE[:-1], "x = f(1, 2); y = [3, 4, 5]; " * 20 + ".", "- " + PROSE, PROSE.replace("e", "é")],
)
def test_clean_refuses_what_is_no_prose(text: str) -> None:
    assert clean(text) is None


def test_clean_joins_lines() -> None:
    assert clean(PROSE.replace(" ", "\n  ")) == PROSE


def test_records_are_distinct_split_and_begin_with_whole_words(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    texts = [PROSE, f" {PROSE} ", PROSE.replace("north", "south"), "Too short."]
    made = list(records("package", texts, tokenizer, HeldOut([])))
    assert sorted(record["text"] for record in made) == sorted({PROSE, PROSE.replace("north", "south")})
    for record in made:
        assert record["source"] == "package"
        assert record["text"].startswith(record["prefix"] + " ")
        assert len(tokenizer.encode(record["prefix"])) <= free_texts.MAX_PREFIX
    assert [record["text"] for record in records("package", texts, tokenizer, HeldOut([PROSE]))] == []


def test_collect_goes_on_and_names_licences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    reads: list[str] = []

    def read(package: Package, archive: Path) -> Iterator[str]:
        reads.append(archive.name)
        yield PROSE.replace("north", package.name)

    monkeypatch.setattr(free_texts, "read_package", read)
    out = tmp_path / "out"
    for name in ("first", "second"):
        (out / "packages").mkdir(parents=True, exist_ok=True)
        (out / "packages" / f"{name}_1%3a2.0-1_all.deb").touch()
    packages = [Package(name, f"licence of {name}", "", read_html) for name in ("first", "second")]
    collect(packages[:1], out, tokenizer)
    sources = collect(packages, out, tokenizer)
    assert reads == ["first_1%3a2.0-1_all.deb", "second_1%3a2.0-1_all.deb"]
    assert [(source["package"], source["version"], source["licence"]) for source in sources] == [
        ("first", "1:2.0-1", "licence of first"),
        ("second", "1:2.0-1", "licence of second"),
    ]
    assert json.loads((out / "sources.json").read_text()) == sources
    lines = [json.loads(line) for line in (out / "texts.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == ["first", "second"]


def test_every_package_is_in_the_table_of_licences() -> None:
    for package in free_texts.PACKAGES:
        assert re.search(rf"\b{re.escape(package.name)}\b", free_texts.__doc__ or "")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "apt-get").write_text("#!/bin/sh\necho no such package >&2; exit 100\n")
    (tmp_path / "bin" / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    with pytest.raises(FileNotFoundError, match="some-doc"):
        download("some-doc", tmp_path / "packages")
