#!/usr/bin/env python3
"""Fetch and build the demo model's training text: demo/data.py [--cache demo/.cache]

The text comes from the Debian archive for which apt is configured: the English and Simplified Chinese package
descriptions (short description = query, long description = document), and a few manuals, most of them in Chinese
(heading = query, the paragraphs below it = document), because only about a thousand descriptions are translated.
The system stays unchanged, because apt uses a separate state folder. Written for Debian 12; another release gives
slightly different text.

Writes CACHE/corpus.jsonl, one `Pair` per line, and demo/heldout.json, the small evaluation set in the repository.
"""

import argparse
import gzip
import hashlib
import json
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from manuals import Sections, join_lines, man_sections

MANUALS = {
    "manpages-zh": r"man/zh_CN/man",
    "debian-reference-zh-cn": r"\.zh-cn\.html$",
    "debian-faq-zh-cn": r"\.zh-cn\.html$",
    "maint-guide-zh-cn": r"\.zh-cn\.html$",
    "debian-edu-doc-zh-cn": r"bookworm-manual\.html$",
    "installation-guide-amd64": r"/(zh_CN|en)/[^/]+\.html$",
    "libreoffice-help-zh-cn": r"/zh-CN/text/.*\.html$",
    "debian-handbook": r"/html/(zh-CN|en-US)/[^/]+\.html$",
}
"""Debian packages with running text -> pattern of the files to read."""

APT_CONFIG = """#clear Acquire::Languages;
Acquire::Languages {{ "en"; "zh_CN"; }};
#clear APT::Update::Post-Invoke-Success;
APT::Sandbox::User "root";
Dir::State "{folder}/";
Dir::State::Lists "{folder}/lists/";
Dir::State::status "/var/lib/dpkg/status";
Dir::Cache "{folder}/";
"""

HELD_OUT_PERCENT = 4
CJK = re.compile(r"[\u3400-\u9fff]")


@dataclass(frozen=True)
class Pair:
    """A document and its query; `query` is empty if queries can only be drawn from the document."""

    name: str
    lang: str
    query: str
    document: str
    held_out: bool


def is_chinese(text: str) -> bool:
    """Return whether at least a tenth of the characters are Chinese."""
    return len(CJK.findall(text)) * 10 >= max(1, len(text))


def held_out(name: str) -> bool:
    """Return whether a package or a manual's section is held out from training, by a hash of its name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def fetch(folder: Path) -> list[Path]:
    """Download descriptions and manuals with apt into `folder`; return the translation files."""
    (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (folder / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    config = folder / "apt.conf"
    config.write_text(APT_CONFIG.format(folder=folder.resolve()))
    subprocess.run(["apt-get", "-c", config.resolve(), "update"], check=True)
    for package in MANUALS:
        if not (folder / package).is_dir():
            subprocess.run(["apt-get", "-c", config.resolve(), "download", package], check=True, cwd=folder)
            deb = next(folder.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", deb, folder / package], check=True)
    return sorted((folder / "lists").glob("*_main_i18n_Translation-*"))


def descriptions(file: Path) -> Iterator[Pair]:
    """Yield every package description of a translation index (RFC 822 stanzas, possibly compressed)."""
    text = subprocess.run(
        ["/usr/lib/apt/apt-helper", "cat-file", file], check=True, capture_output=True
    ).stdout.decode()
    for stanza in text.split("\n\n"):
        match = re.match(r"\s*Package: (\S+)\n.*?Description-(en|zh_CN): ([^\n]*)\n(.*)", stanza, re.S)
        if not match:
            continue
        name, language, query, body = match.groups()
        lang = "zh" if language == "zh_CN" else "en"
        if (lang == "zh") != is_chinese(body):
            continue
        paragraphs = re.split(r"\n \.\n?", "\n" + body)
        document = "\n".join(p for p in (join_lines(p.splitlines()) for p in paragraphs) if p)
        yield Pair(name, lang, query.strip(), document, held_out(name))


def manual(package: str, folder: Path) -> Iterator[Pair]:
    """Yield the sections of a manual, in documents of at most about 500 Chinese or 1,000 other characters."""
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and re.search(MANUALS[package], str(p))):
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = raw.decode(errors="ignore")
        if file.suffix == ".gz":
            sections = man_sections(text)
        else:
            parser = Sections()
            parser.feed(text)
            sections = parser.sections[1:]
        for number, (heading, paragraphs) in enumerate(sections):
            chunks = [""]
            for paragraph in paragraphs:
                limit = 500 if is_chinese(chunks[-1]) else 1000
                if chunks[-1] and len(chunks[-1]) + len(paragraph) > limit:
                    chunks.append("")
                chunks[-1] = (chunks[-1] + "\n" + paragraph).strip()
            for part, document in enumerate(chunks):
                name = f"{package}/{file.stem}/{number}/{part}"
                yield Pair(
                    name, "zh" if is_chinese(document) else "en", "" if part else heading, document, held_out(name)
                )


def build(folder: Path, translations: list[Path]) -> list[Pair]:
    """Return all pairs without duplicates, uninformative headings and fragments."""
    pairs = [pair for file in translations for pair in descriptions(file)]
    for package in MANUALS:
        pairs += manual(package, folder / package)
    queries = Counter(pair.query for pair in pairs)
    seen: set[str] = set()
    result: list[Pair] = []
    for pair in pairs:
        if pair.document in seen or len(pair.document) < (20 if pair.lang == "zh" else 60):
            continue
        seen.add(pair.document)
        query = pair.query if queries[pair.query] <= 3 and len(pair.query) >= (4 if pair.lang == "zh" else 8) else ""
        if pair.lang == "zh" and not CJK.search(query):
            query = ""
        result.append(Pair(pair.name, pair.lang, query, pair.document[:4000], pair.held_out))
    return result


def heldout_tasks(pairs: list[Pair], count: int, candidates: int) -> dict[str, list[object]]:
    """Make ranking tasks of held-out pairs: a query, `candidates` random documents, and the index of the true one."""
    rng = random.Random(17)
    rng.shuffle(pairs)
    pairs = pairs[:count]
    tasks: list[object] = []
    for true, pair in enumerate(pairs):
        others = [i for i, other in enumerate(pairs) if other.query != pair.query]
        order = rng.sample([true, *rng.sample(others, candidates - 1)], candidates)
        tasks.append({"query": pair.query, "documents": order, "answer": order.index(true)})
    return {"documents": [pair.document for pair in pairs], "tasks": tasks}


def lines_of(value: dict[str, dict[str, list[object]]]) -> str:
    """Render JSON with one line per list item, for readable diffs."""
    return (
        "{"
        + ",\n".join(
            f"{json.dumps(lang)}: {{"
            + ",\n".join(
                f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(item, ensure_ascii=False) for item in items) + "\n]"
                for name, items in part.items()
            )
            + "}"
            for lang, part in value.items()
        )
        + "}"
    )


def main() -> None:
    """Fetch the text, build the pairs and write them."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=here / ".cache")
    cache: Path = parser.parse_args().cache
    pairs = build(cache / "apt", fetch(cache / "apt"))
    with (cache / "corpus.jsonl").open("w") as out:
        out.writelines(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs)
    heldout = {}
    for lang, count in (("en", 400), ("zh", 200)):
        chosen = [p for p in pairs if p.held_out and p.lang == lang and p.query and (lang == "zh" or "/" not in p.name)]
        heldout[lang] = heldout_tasks(chosen, count, 20)
    (here / "heldout.json").write_text(lines_of(heldout) + "\n")
    print({(lang, bool(q)): n for (lang, q), n in Counter((p.lang, p.query != "") for p in pairs).items()})


if __name__ == "__main__":
    main()
