"""Paragraphs of free texts from Debian packages, as JSON lines: what the model continues, and what prompts ask about.

    python scripts/embedded/free_texts.py --out out/free_texts [--packages dict-devil,perl-doc]

Packages are downloaded with `apt-get download` and unpacked with `dpkg -x` into a temporary folder; nothing is installed.
`texts.jsonl` holds `{"source", "split", "text", "prefix"}`, where the prefix is the first 30 to 120 tokens of a paragraph;
`sources.json` holds version, licence, paragraphs and tokens of each package. What was downloaded or read before is not again.

| package | what | licence |
|---|---|---|
| python3.11-doc | Python's documentation | PSF-2.0 |
| perl-doc | Perl's manual | GPL-1.0-or-later or Artistic |
| postgresql-doc-15 | PostgreSQL's manual | PostgreSQL |
| libreoffice-help-en-us | LibreOffice's help | MPL-2.0 |
| gnome-user-docs | GNOME's help | CC-BY-SA-3.0 |
| debian-faq, debian-policy, debian-reference-en | Debian's documents | GPL-2.0-or-later |
| developers-reference | for Debian's developers | GPL-2.0-or-later |
| wordnet-base | WordNet's glosses | WordNet-3.0 |
| dict-foldoc | a dictionary of computing | GFDL-1.1-or-later |
| dict-jargon | the Jargon File | public domain |
| dict-devil | The Devil's Dictionary, Ambrose Bierce | public domain |
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from prompts import HeldOut, split_of

from unmask.data.tokenizer import Tokenizer, load_tokenizer
from unmask.models.weights.hub import resolve, tokenizer_folder

MIN_TOKENS, MAX_TOKENS = 40, 400
"""Of a paragraph."""
MIN_PREFIX, MAX_PREFIX = 30, 120
MAX_PER_PACKAGE = 5_000
GLOSSES = 5
"""Neighbouring entries of WordNet in one paragraph: a single one is too short."""
_HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6", "subtitle", "title", "dt"}
_SKIPPED = _HEADINGS | {"head", "info", "nav", "pre", "screen", "script", "style", "table"}
_BLOCKS = {"article", "aside", "blockquote", "body", "dd", "div", "dl", "footer", "header", "item", "li", "list", "main"} | {
    *("note", "ol", "p", "page", "section", "steps", "td", "terms", "th", "tr", "ul")
}
_POD_CODE = re.compile(r"[A-Z](?:<<+\s+(.*?)\s+>>+|<([^<>]*)>)", re.DOTALL)
_POD_ESCAPES = {"lt": "<", "gt": ">", "verbar": "|", "sol": "/"}


class _Paragraphs(HTMLParser):
    """Collects the text of block elements of HTML and of GNOME's Mallard XML, but for code, tables and headings."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._buffer: list[str] = []
        self._skipped: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS or tag in _SKIPPED:
            self.end_paragraph()
        if tag in _SKIPPED:
            self._skipped.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._skipped:
            while self._skipped.pop() != tag:
                pass
        elif tag in _BLOCKS:
            self.end_paragraph()

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self._buffer.append(data)

    def end_paragraph(self) -> None:
        """Keep what has been read since the last block began or ended."""
        self.found.append("".join(self._buffer))
        self._buffer.clear()


def read_html(content: str) -> Iterator[str]:
    """Paragraphs of an HTML or Mallard page."""
    parser = _Paragraphs()
    parser.feed(content)
    parser.close()
    parser.end_paragraph()
    yield from (text.replace("\N{PILCROW SIGN}", "") for text in parser.found)


def read_pod(content: str) -> Iterator[str]:
    """Paragraphs of Perl's plain old documentation: no commands, no code, no formatting codes."""
    for paragraph in re.split(r"\n\s*\n", content):
        if paragraph[:1] in ("=", " ", "\t", ""):
            continue
        while (text := _POD_CODE.sub(_pod_text, paragraph)) != paragraph:
            paragraph = text
        yield paragraph


def read_wordnet(content: str) -> Iterator[str]:
    """Some entries of a WordNet data file, each a word with its gloss."""
    entries = []
    for line in content.splitlines():
        data, separator, gloss = line.partition(" | ")
        if separator and not line.startswith(" "):
            entries.append(f"{data.split()[4].replace('_', ' ')}: {gloss.strip()}.")
    yield from (" ".join(entries[start : start + GLOSSES]) for start in range(0, len(entries), GLOSSES))


def read_dict(content: str) -> Iterator[str]:
    """Paragraphs of a dictd dictionary, without the braces and angle brackets of its references."""
    for paragraph in re.split(r"\n\s*\n", content):
        yield re.sub(r"[{}]|<[^<>]*>\s*|^\s*n\.\s+|\(\d{4}-\d\d-\d\d\)", "", paragraph)


@dataclass(frozen=True)
class Package:
    """A Debian package: which of its files are read, and how.

    Attributes:
        name: of the package.
        licence: SPDX id, or a word.
        pattern: of files, below the package's root.
        read: gives the paragraphs of a file's content.
    """

    name: str
    licence: str
    pattern: str
    read: Callable[[str], Iterator[str]]


_DOC, _DICT = "usr/share/doc", "usr/share/dictd/*.dict.dz"
PACKAGES = (
    Package("python3.11-doc", "PSF-2.0", f"{_DOC}/python3.11/html/**/*.html", read_html),
    Package("perl-doc", "GPL-1.0-or-later OR Artistic-1.0-Perl", "usr/share/perl/*/pod/*.pod", read_pod),
    Package("postgresql-doc-15", "PostgreSQL", f"{_DOC}/postgresql-doc-15/html/*.html", read_html),
    Package("libreoffice-help-en-us", "MPL-2.0", "usr/share/libreoffice/help/en-US/text/**/*.html", read_html),
    Package("gnome-user-docs", "CC-BY-SA-3.0", "usr/share/help/C/**/*.page", read_html),
    Package("debian-faq", "GPL-2.0-or-later", f"{_DOC}/debian/FAQ/*.en.html", read_html),
    Package("debian-policy", "GPL-2.0-or-later", f"{_DOC}/debian-policy/policy.html/*.html", read_html),
    Package("debian-reference-en", "GPL-2.0-or-later", "usr/share/debian-reference/*.en.html", read_html),
    Package("developers-reference", "GPL-2.0-or-later", "usr/share/developers-reference/*.html", read_html),
    Package("wordnet-base", "WordNet-3.0", "usr/share/wordnet/data.*", read_wordnet),
    Package("dict-foldoc", "GFDL-1.1-or-later", _DICT, read_dict),
    Package("dict-jargon", "public domain", _DICT, read_dict),
    Package("dict-devil", "public domain", _DICT, read_dict),
)


def clean(text: str) -> str | None:
    """A paragraph on one line, or None for what is not English prose: code, fragments, lists of numbers."""
    text = " ".join(text.split())
    letters = sum(character.isalpha() or character == " " for character in text)
    is_sentence = text[:1].isalpha() and text.endswith((".", "!", "?", ":", '."', ".)"))
    is_plain = text.isascii() or sum(character.isascii() for character in text) > 0.98 * len(text)
    return text if is_sentence and is_plain and letters > 0.9 * len(text) and text.count(" ") >= 20 else None


def records(name: str, texts: Iterable[str], tokenizer: Tokenizer, held_out: HeldOut) -> Iterator[dict[str, str]]:
    """Records of the distinct clean paragraphs among `texts`, at most `MAX_PER_PACKAGE`, chosen by hash."""
    distinct = {cleaned for text in texts if (cleaned := clean(text)) is not None}
    kept = 0
    for digest, text in sorted((hashlib.sha256(text.encode()).hexdigest(), text) for text in distinct):
        ids = tokenizer.encode(text)
        if not MIN_TOKENS <= len(ids) <= MAX_TOKENS or text in held_out:
            continue
        longest = min(MAX_PREFIX, len(ids) - 1)
        num_tokens = MIN_PREFIX + int(digest[:8], 16) % (longest - MIN_PREFIX + 1)
        prefix = tokenizer.decode(ids[: num_tokens + 1]).rsplit(" ", 1)[0]  # whole words
        yield {"source": name, "split": split_of(text), "text": text, "prefix": prefix}
        kept += 1
        if kept == MAX_PER_PACKAGE:
            return


def download(package: str, folder: Path) -> Path:
    """The .deb file of a package, downloaded unless it is there.

    Raises:
        FileNotFoundError: apt does not have it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (there := sorted(folder.glob(f"{package}_*.deb"))):
        run = subprocess.run(["apt-get", "download", "-q", package], cwd=folder, capture_output=True, text=True)
        there = sorted(folder.glob(f"{package}_*.deb"))
        if not there:
            raise FileNotFoundError(f"package {package} was not downloaded ({run.stderr.strip()}); try apt-get update")
    return there[-1]


def read_package(package: Package, archive: Path) -> Iterator[str]:
    """All paragraphs of the package's files, raw."""
    with tempfile.TemporaryDirectory() as root:
        subprocess.run(["dpkg", "-x", str(archive), root], check=True)
        for path in sorted(Path(root).glob(package.pattern)):
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".dz" else path.read_bytes()
            yield from package.read(content.decode("utf-8", errors="replace"))


def collect(packages: Sequence[Package], out: Path, tokenizer: Tokenizer) -> list[dict[str, object]]:
    """Write `texts.jsonl` and `sources.json`; returns what the latter says."""
    held_out = HeldOut.read()
    sources: list[dict[str, object]] = []
    lines: list[str] = []
    for package in packages:
        archive = download(package.name, out / "packages")
        part = out / "parts" / f"{archive.stem}.jsonl"
        if not part.exists():
            part.parent.mkdir(parents=True, exist_ok=True)
            staged = part.with_suffix(".partial")
            made = records(package.name, read_package(package, archive), tokenizer, held_out)
            staged.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in made), encoding="utf-8")
            staged.rename(part)
        package_lines = part.read_text(encoding="utf-8").splitlines()
        tokens = sum(len(tokenizer.encode(json.loads(line)["text"])) for line in package_lines)
        version = archive.stem.split("_")[1].replace("%3a", ":")
        source = {"package": package.name, "version": version, "licence": package.licence}
        sources.append({**source, "paragraphs": len(package_lines), "tokens": tokens})
        print(f"{package.name} {version} ({package.licence}): {len(package_lines):,} paragraphs, {tokens:,} tokens", flush=True)
        lines += package_lines
    (out / "texts.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (out / "sources.json").write_text(json.dumps(sources, indent=1) + "\n")
    return sources


def _pod_text(match: re.Match[str]) -> str:
    """What a formatting code shows: a link's text rather than its target, nothing for an index entry."""
    content: str = match[1] if match[1] is not None else match[2]
    if match[0][0] in "XZ":
        return ""
    if match[0][0] == "E":
        return _POD_ESCAPES.get(content, "")
    return content.split("|")[0].lstrip("/") if match[0][0] == "L" else content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/free_texts"))
    parser.add_argument("--packages", help="names, separated by commas [default: all]")
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer counts")
    options = parser.parse_args()
    names = [package.name for package in PACKAGES] if options.packages is None else options.packages.split(",")
    folder = tokenizer_folder(resolve(options.model))
    if folder is None:
        raise SystemExit(f"model {options.model} has no tokenizer; use another")
    collect([package for package in PACKAGES if package.name in names], options.out, load_tokenizer(folder))


if __name__ == "__main__":
    main()
