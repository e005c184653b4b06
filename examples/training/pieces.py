# SPDX-License-Identifier: MIT
"""Word pieces with end-of-word marks: learning them, encoding and decoding.

Text is lower-case words over a-z and the apostrophe, one space apart. A piece that ends a word ends with U+2581; a piece inside a word has no
mark. Every letter exists in both forms, so that any word can be written. Ids: 0 <unk> (never used), 1 <s>, 2 </s>.
"""

from __future__ import annotations

import collections
import json

MARK = "\u2581"
LETTERS = "abcdefghijklmnopqrstuvwxyz'"
SPECIAL = ["<unk>", "<s>", "</s>"]
BOS, EOS = 1, 2


def _symbols(word: str) -> list[str]:
    return list(word[:-1]) + [word[-1] + MARK]


def learn(counts: dict[str, int], size: int) -> list[str]:
    """Byte-pair merges over words by count until there are `size` pieces; returns the pieces in id order."""
    words = [(_symbols(word), count) for word, count in counts.items()]
    pieces = SPECIAL + list(LETTERS) + [letter + MARK for letter in LETTERS]
    pairs: collections.Counter = collections.Counter()
    places = collections.defaultdict(set)
    for index, (symbols, count) in enumerate(words):
        for pair in zip(symbols, symbols[1:]):
            pairs[pair] += count
            places[pair].add(index)
    while len(pieces) < size and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merged = best[0] + best[1]
        if merged not in pieces:
            pieces.append(merged)
        for index in places.pop(best):
            symbols, count = words[index]
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] -= count
                if pair != best:
                    places[pair].discard(index)
            joined, i = [], 0
            while i < len(symbols):
                if i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == best:
                    joined.append(merged)
                    i += 2
                else:
                    joined.append(symbols[i])
                    i += 1
            words[index] = (joined, count)
            for pair in zip(joined, joined[1:]):
                pairs[pair] += count
                places[pair].add(index)
        pairs.pop(best, None)
    return pieces


class Pieces:
    """Encoder and decoder over a list of pieces; a merge's rank is the id of the piece that it makes."""

    def __init__(self, pieces: list[str]):
        self.pieces = pieces
        self.ids = {piece: index for index, piece in enumerate(pieces)}
        self.ends_word = [piece.endswith(MARK) for piece in pieces]
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def load(cls, path: str) -> "Pieces":
        with open(path, encoding="utf-8") as file:
            return cls(json.load(file))

    def save(self, path: str) -> None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.pieces, file, ensure_ascii=False)

    def __len__(self) -> int:
        return len(self.pieces)

    def word(self, word: str) -> list[int]:
        """The ids of one word; KeyError if it has a character that no piece has."""
        known = self._cache.get(word)
        if known is None:
            symbols = _symbols(word)
            while len(symbols) > 1:
                ranks = [self.ids.get(a + b, len(self.pieces)) for a, b in zip(symbols, symbols[1:])]
                at = min(range(len(ranks)), key=ranks.__getitem__)
                if ranks[at] == len(self.pieces):
                    break
                symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            known = self._cache[word] = [self.ids[symbol] for symbol in symbols]
        return known

    def encode(self, text: str) -> list[int]:
        return [piece for word in text.split() for piece in self.word(word)]

    def decode(self, ids) -> str:
        text = "".join(self.pieces[i] for i in ids if i > EOS and i < len(self.pieces))
        return " ".join(text.replace(MARK, " ").split())
