"""Extract the sections of an HTML page or of a Unix manual page, as (heading, paragraphs)."""

import html.parser
import re


def join_lines(lines: list[str]) -> str:
    """Undo line wrapping: join words with a space, and Chinese characters without one."""
    text = " ".join(line.strip() for line in lines)
    return re.sub(
        r"(?<=[\u3000-\u9fff\uff00-\uffef]) (?=[\u3000-\u9fff\uff00-\uffef])", "", re.sub(r"\s+", " ", text)
    ).strip()


class Sections(html.parser.HTMLParser):
    """Collect (heading, paragraphs) of an HTML page."""

    BLOCKS = frozenset({"p", "li", "dd", "td", "dt"})
    HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5"})
    SKIPPED = frozenset({"script", "style", "pre", "nav"})

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[tuple[str, list[str]]] = [("", [])]
        self.text: list[str] = []
        self.skip = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """End the paragraph where another block begins."""
        self.skip += tag in self.SKIPPED
        if tag in self.BLOCKS or tag in self.HEADINGS:
            self.flush()

    def handle_endtag(self, tag: str) -> None:
        """Begin a section after its heading."""
        self.skip -= tag in self.SKIPPED
        if tag in self.HEADINGS:
            heading = re.sub(r"^(第 ?\d+ ?章|附录 ?\w\b|[A-Z]?[\d.]+)[.、 ]*", "", join_lines(self.text))
            self.sections.append((heading, []))
            self.text = []
        elif tag in self.BLOCKS:
            self.flush()

    def handle_data(self, data: str) -> None:
        """Collect visible text."""
        if self.skip <= 0:
            self.text.append(data)

    def flush(self) -> None:
        """End the current paragraph."""
        paragraph = join_lines(["".join(self.text)])
        self.text = []
        if len(paragraph) >= 8:
            self.sections[-1][1].append(paragraph)


def man_sections(text: str) -> list[tuple[str, list[str]]]:
    """Return the sections of a manual page; its NAME line is the heading of the description."""
    text = re.sub(r"\\f.|\\[&,/|]|\\s[-+]?\d", "", text).replace("\\-", "-").replace("\\(aq", "'").replace("\\e", "\\")
    title, sections, paragraph = "", [("", list[str]())], list[str]()
    for line in [*text.splitlines(), ".SH end"]:
        macro = re.match(r"[.'] *(\w*) *(.*)", line)
        if macro and macro[1] in ("B", "I", "BR", "IR", "RB", "RI", "BI", "IB", "Nm", "Nd", "Fl", "Ar"):
            paragraph.append(macro[2].replace('"', ""))
        elif macro or not line.strip():
            if len(joined := join_lines(paragraph)) >= 6:
                sections[-1][1].append(joined)
            paragraph = []
            if macro and macro[1] in ("SH", "Sh", "SS"):
                names = (
                    sections[-1][1] if sections[-1][0].upper() in ("NAME", "名称", "名字", "NAME 名称", "名") else []
                )
                title = re.split(r" -+ ?", names[0], maxsplit=1)[-1] if names else title
                sections.append((macro[2].strip('" '), []))
        else:
            paragraph.append(line)
    body = [s for s in sections[1:] if s[0].upper() not in ("NAME", "名称", "名字", "NAME 名称", "名")]
    described = next((i for i, s in enumerate(body) if re.search("DESCRIPTION|描述|说明", s[0])), None)
    return [(title if i == described else "", s[1]) for i, s in enumerate(body)]
