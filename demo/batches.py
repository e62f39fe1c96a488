"""Training groups: a query, a relevant document, irrelevant ones, and the labels of the probes.

The card's prompt is tokenised in the pieces that the engine shares: prefix (to "<Document>:") once per group, then
every document with the suffix.
"""

import math
import random
import re
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTIONS = [
    "Given a web search query, retrieve relevant passages that answer the query",
    "Retrieve the document that answers the question",
    "Given a question, find the passage with the answer",
    "Find the description that matches the query",
    "Judge whether the text is about the topic of the query",
    "给定一个查询，找出能够回答它的段落",
]
TEMPLATES = {
    "en": (
        "what is {}|what is {}?|What is {}?|how to {}|How to {}?|how do I {} on Linux?|where can I find {}"
        "|which tool for {}|I want to {}|tell me about {}|{}?|who is {}?|Why {}?|explain {}|best {}|how can I {}"
        "|which package {}|When was {}?|what does {} mean|is there a {}|Where is {}?|What are {}?|Can you {}?"
    ).split("|"),
    "zh": (
        "{}是什么？|什么是{}？|如何{}？|如何在 Linux 上{}？|怎样{}|怎么{}？|为什么{}？|哪里可以找到{}？"
        "|{}的作用是什么？|请介绍一下{}|{}在哪里？|{}是谁？|哪个工具可以{}？|{}有哪些？|我想{}|有没有{}|能不能{}？"
        "|{}的是哪个？|什么时候{}？|{}怎么用"
    ).split("|"),
}
LENGTHS = {24: 0.25, 48: 0.27, 72: 0.26, 112: 0.12, 240: 0.05, 480: 0.03, 960: 0.02}
LONG = 200
"""Max tokens of the documents of a batch -> probability; above `LONG` documents are embedded in other text."""


Group = tuple[list[int], list[np.ndarray], list[np.ndarray], list[float]]
"""Prefix ids, documents, match labels of the documents, coverage of the documents."""


@dataclass
class Batch:
    """G groups of N documents, the relevant one first. P and D are the padded lengths."""

    prefix: torch.Tensor  # [G, P] token ids
    prefix_length: torch.Tensor  # [G]
    document: torch.Tensor  # [G*N, D] token ids, suffix included
    document_length: torch.Tensor  # [G*N]
    match: torch.Tensor  # [G*N, D] 1 where the token occurs in the query, 0 where not, -1 where ignored
    coverage: torch.Tensor  # [G*N] share of the query's words in the document, weighted by how rare they are


class Sampler:
    """Draw groups from the corpus.

    A token's `key` is its lower-case prefix, so that "Compress" matches " compression".
    """

    def __init__(self, pairs: list[dict[str, str]], tokenizer: Tokenizer, seed: int) -> None:
        self.rng = random.Random(seed)
        self.numpy = np.random.default_rng(seed)
        self.pairs, self.tokenizer = pairs, tokenizer
        self.head = tokenizer.encode(PREFIX).ids
        self.suffix = tokenizer.encode(SUFFIX).ids
        self.instructions = [tokenizer.encode(f"<Instruct>: {text}\n<Query>:").ids for text in INSTRUCTIONS]
        encoded = tokenizer.encode_batch_fast([" " + pair["document"] for pair in pairs])
        self.documents = [np.array(e.ids[:600], dtype=np.int64) for e in encoded]
        self.ordinary = tokenizer.token_to_id("<|endoftext|>")
        self.key = self._keys()
        holders: dict[int, list[int]] = {}
        frequency = {lang: np.zeros(self.key.max() + 1) for lang in ("en", "zh")}
        for index, document in enumerate(self.documents):
            keys = np.unique(self.key[document[:100]])
            frequency[pairs[index]["lang"]][keys] += 1
            for key in keys:
                holders.setdefault(int(key), []).append(index)
        self.holders = {k: v for k, v in holders.items() if 2 <= len(v) <= 1500 and k}
        self.idf = {}
        for lang, counts in frequency.items():
            total = sum(pair["lang"] == lang for pair in pairs)
            self.idf[lang] = np.log((total + 1) / (counts + 1))
            self.idf[lang][0] = 0.0
        self.by_lang = {lang: [i for i, p in enumerate(pairs) if p["lang"] == lang] for lang in ("en", "zh")}
        self.with_query = {lang: [i for i in rows if pairs[i]["query"]] for lang, rows in self.by_lang.items()}

    def _keys(self) -> np.ndarray:
        """Return the key of every token; 0 for tokens without a letter or a digit."""
        names: dict[str, int] = {}
        keys = np.zeros(self.tokenizer.get_vocab_size(), dtype=np.int64)
        for token in range(self.ordinary):
            text = self.tokenizer.decode([token]).strip().lower()
            if re.search(r"\w|\ufffd", text):
                name = text[:6] if text.isascii() else text
                keys[token] = names.setdefault(f"#{token}" if "\ufffd" in name else name, len(names) + 1)
        return keys

    def keys(self, text: str) -> np.ndarray:
        """Return the keys of a text's tokens."""
        return self.key[self.tokenizer.encode(" " + text).ids]

    def span(self, text: str, lang: str, low: int, high: int) -> str:
        """Draw a span of `low` to `high` words (in Chinese two characters count as one word) from `text`."""
        size = self.rng.randint(low, high)
        if lang == "en":
            words = text.split()
            start = self.rng.randint(0, max(0, len(words) - size))
            return " ".join(words[start : start + size]).strip(" .,;:()")
        sentence = self.rng.choice([s for s in re.split(r"[，。；：！？、,;\n]", text) if len(s) > 3] or [text])
        start = self.rng.randint(0, max(0, len(sentence) - 2 * size))
        return sentence[start : start + 2 * size].strip()

    def query(self, index: int, shown: np.ndarray) -> tuple[str, str]:
        """Return a query for a document truncated to `shown`, and the meaningful part of the query."""
        pair, rng = self.pairs[index], self.rng
        lang, text = pair["lang"], self.tokenizer.decode(shown.tolist()).strip("\ufffd ")
        draw = rng.random()
        if pair["query"] and draw < 0.45:
            core = pair["query"]
        elif pair["query"] and draw < 0.55:
            words = pair["query"].split() if lang == "en" else re.findall(r"[a-zA-Z0-9]+|.{2}", pair["query"])
            rng.shuffle(words)
            core = " ".join(words[: max(2, len(words) // 2)])
        elif draw < 0.6:
            spans = [self.span(text, lang, 1, 1) for _ in range(4)]
            core = max(spans, key=lambda s: max(self.idf[lang][self.keys(s)], default=0.0))
        elif draw < 0.7:
            core = self.span(text, lang, 1, 2) + (" of " if lang == "en" else "的") + self.span(text, lang, 1, 2)
        else:
            core = self.span(text, lang, 2, 4) if draw < 0.82 else self.span(text, lang, 3, 9)
        if rng.random() < 0.15:
            core = core.lower() if rng.random() < 0.7 else core.capitalize()
        return (rng.choice(TEMPLATES[lang]).format(core) if rng.random() < 0.35 else core), core

    def truncate(self, index: int, length: int) -> np.ndarray:
        """Truncate a document to `length` tokens: usually its start, sometimes a later span."""
        document = self.documents[index]
        if len(document) > length and self.rng.random() < 0.3:
            start = self.rng.randrange(len(document) - length + 1)
            return document[start : start + length]
        return document[: length if self.rng.random() < 0.8 else self.rng.randint(min(8, length), length)]

    def surround(self, document: np.ndarray, lang: str, length: int) -> np.ndarray:
        """Embed a document in a longer one made of others, because few documents of the corpus are long."""
        parts, missing = [document], self.rng.randint(length // 2, length) - len(document)
        while missing > 0:
            other = self.documents[self.rng.choice(self.by_lang[lang])][:missing]
            parts.insert(self.rng.choice([0, len(parts)]), other)
            missing -= len(other)
        return np.concatenate(parts)[:length]

    def share(self, weights: dict[int, float], document: np.ndarray) -> float:
        """Return the share of the query's weighted keys that the document has."""
        present = set(self.key[document].tolist())
        return sum(w for k, w in weights.items() if k in present) / max(1e-6, sum(weights.values()))

    def group(self, length: int, size: int, hard: float) -> Group:
        """Draw one query with `size` documents of at most `length` tokens.

        `hard` is the share of irrelevant documents that have a word of the query.
        """
        rng = self.rng
        lang = "zh" if rng.random() < 0.35 else "en"
        true = rng.choice(self.with_query[lang] if rng.random() < 0.75 else self.by_lang[lang])
        short = rng.randint(16, 120) if length > LONG else length
        documents = [self.truncate(true, short)]
        query, core = self.query(true, documents[0])
        ids = np.array(self.tokenizer.encode(f" {query}\n<Document>:").ids, dtype=np.int64)
        weights = {int(k): float(self.idf[lang][k]) for k in set(self.keys(core).tolist()) if k}
        best = self.share(weights, documents[0])
        shared = [k for k in weights if k in self.holders]
        while len(documents) < size:
            near = shared and rng.random() < hard
            index = rng.choice(
                self.holders[rng.choice(shared)] if near else self.by_lang[lang if rng.random() < 0.9 else "en"]
            )
            document = self.truncate(index, short)
            if index == true or (self.share(weights, document) > 0.75 * best and rng.random() < 0.95):
                hard *= 0.9
                continue
            documents.append(document)
        if length > LONG:
            documents = [self.surround(document, lang, length) for document in documents]
        coverage = [self.share(weights, document) for document in documents]
        key = self.key
        if rng.random() < 0.2:  # permuted token ids, so that matching does not depend on the word
            order = self.numpy.permutation(self.ordinary)
            tail = len(self.tokenizer.encode("\n<Document>:").ids)
            ids = np.concatenate([order[ids[:-tail]], ids[-tail:]]) if len(ids) > tail else ids
            documents = [order[document] for document in documents]
            inverse = np.argsort(order)
            key = np.concatenate([key[inverse], key[self.ordinary :]])
        wanted = np.array([k for k in weights if weights[k] > 0], dtype=np.int64)
        match = [np.where(key[d] == 0, -1, np.isin(key[d], wanted)).astype(np.int64) for d in documents]
        instruction = self.instructions[0] if rng.random() < 0.7 else rng.choice(self.instructions)
        return self.head + instruction + ids[:96].tolist(), documents, match, coverage

    def batch(self, tokens: int, size: int, hard: float, lengths: dict[int, float] = LENGTHS) -> Batch:
        """Draw groups of one document length, at most `tokens` in total."""
        length = self.rng.choices(list(lengths), list(lengths.values()))[0]
        count = max(1, math.floor(tokens / (size * (length + len(self.suffix)) + 100)))
        return self.collate([self.group(length, size, hard) for _ in range(count)])

    def collate(self, groups: list[Group]) -> Batch:
        """Pad groups to one batch, with the suffix after every document."""
        documents = [np.concatenate([d, self.suffix]) for g in groups for d in g[1]]
        matches = [np.concatenate([m, np.full(len(self.suffix), -1)]) for g in groups for m in g[2]]
        return Batch(
            *_pad([np.array(g[0]) for g in groups], self.ordinary),
            *_pad(documents, self.ordinary),
            _pad(matches, -1)[0],
            torch.tensor([c for g in groups for c in g[3]], dtype=torch.float32),
        )


def _pad(rows: list[np.ndarray], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows as one right-padded tensor, and their lengths."""
    lengths = torch.tensor([len(row) for row in rows])
    tensor = torch.full((len(rows), int(lengths.max())), value, dtype=torch.int64)
    for row, values in zip(tensor, rows, strict=True):
        row[: len(values)] = torch.from_numpy(values)
    return tensor, lengths
