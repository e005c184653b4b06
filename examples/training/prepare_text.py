# SPDX-License-Identifier: MIT
"""Makes the sentences that are spoken: training, five test columns, and the pieces learned from the training text.

    python3 prepare_text.py --sources DIR --out DIR --count 340000

SOURCES holds plain text files (*.txt, one work each; paragraphs of running text), fortune files (*.fortune, separated by lines of %), word lists
with counts (*.freq, word<tab>weight) and dictionaries of allowed words (*.words). fetch_text.sh fills it from Debian and PyPI packages. Mixture:
45 % grammar, 30 % open text, 15 % words by frequency, 10 % random strings of grammar words. Sentences of the test files never occur in training.
"""

from __future__ import annotations

import argparse
import collections
import glob
import hashlib
import itertools
import os
import random
import re
import sys

import grammar
import pieces

SHARES = {"grammar": 0.45, "open": 0.30, "words": 0.15, "random": 0.10}
LONGEST_WORDS, LONGEST_LETTERS = 18, 95


def numbers_to_words(text: str) -> str:
    text = re.sub(r"\b(\d{1,2}):(\d\d)\b", lambda m: grammar.spell(int(m[1])) + " " + grammar.spell(int(m[2])), text)
    return re.sub(r"\d+", lambda m: " " + grammar.spell(int(m[0])) + " " if len(m[0]) < 6 else " @ ", text)


def clauses(text: str, rng: random.Random) -> list[str]:
    """Running text -> normalised clauses of 2 to LONGEST_WORDS words; a sentence is kept whole where it is short enough."""
    out = []
    text = text.replace("\u2019", "'").replace("_", "").replace("--", ", ").replace("\u2014", ", ")
    for sentence in re.split(r"(?<=[.!?])[\s\"')]+|\n\s*\n", text):
        parts = [" ".join(sentence.split())]
        if len(parts[0].split()) > 12 or rng.random() < 0.15:
            parts = re.split(r"[,;:()]+\s", parts[0])
        merged: list[str] = []
        for part in parts:  # neighbouring short clauses stay together
            if merged and len(merged[-1].split()) + len(part.split()) <= rng.choice([6, 10, 14]):
                merged[-1] += " " + part
            else:
                merged.append(part)
        out += merged
    return out


def normalise(text: str, allowed: set[str]) -> str | None:
    """Lower-case words over a-z and ', or None where the text has anything that would not be spoken as it is written."""
    text = numbers_to_words(text.lower())
    text = re.sub(r"(?<![a-z])'|'(?![a-z])", " ", text.replace("o'clock", "o\x00clock")).replace("\x00", "'")
    text = re.sub(r"[-/,.;:!?\"()\[\]]+", " ", text)
    words = text.split()
    if not 2 <= len(words) <= LONGEST_WORDS or sum(map(len, words)) > LONGEST_LETTERS:
        return None
    for word in words:
        if not re.fullmatch(r"[a-z]+('[a-z]+)?", word) or (word not in allowed and re.sub(r"'s$", "", word) not in allowed):
            return None
    return " ".join(words)


def held_out(text: str) -> bool:
    return hashlib.sha1(text.encode()).digest()[0] < 6  # 2.3 %


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--count", type=int, default=340000, help="training sentences")
    parser.add_argument("--tests", type=int, default=250, help="sentences of each test column")
    parser.add_argument("--pieces", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    rng = random.Random(args.seed)

    allowed, weights = set(grammar.WORDS), {}
    for path in sorted(glob.glob(os.path.join(args.sources, "*.words"))):
        with open(path, encoding="utf-8", errors="ignore") as file:
            allowed |= {word for word in file.read().lower().split() if re.fullmatch(r"[a-z]+('[a-z]+)?", word)}
    for path in sorted(glob.glob(os.path.join(args.sources, "*.freq"))):
        with open(path, encoding="utf-8") as file:
            weights.update((word, float(weight)) for word, weight in (line.split("\t") for line in file))
    spoken_short = set("a i am an as at be by do go he hi if in is it me my no of oh ok on or so to up us we ye ah ha lo ox".split())
    allowed = {word for word in allowed if (len(word) > 2 or word in spoken_short) and (re.search("[aeiouy]", word))}

    open_text = []
    for path in sorted(glob.glob(os.path.join(args.sources, "*.txt")) + glob.glob(os.path.join(args.sources, "*.fortune"))):
        with open(path, encoding="utf-8", errors="ignore") as file:
            text = file.read()
        if path.endswith(".fortune"):
            text = "\n\n".join(re.sub(r"\n\s*--.*", "", item, flags=re.S) for item in re.split(r"\n%\n", text))
        found = [clean for clause in clauses(text, rng) if (clean := normalise(clause, allowed))]
        print(f"{os.path.basename(path)}: {len(found)} clauses", file=sys.stderr)
        open_text += found
    open_text = sorted(set(open_text))
    rng.shuffle(open_text)

    words = [word for word in weights if word in allowed]
    word_weights = list(itertools.accumulate(weights[word] ** 0.6 for word in words))
    by_frequency = lambda: " ".join(rng.choices(words, cum_weights=word_weights, k=rng.randint(2, 9)))

    tests: dict[str, list[tuple[str, str]]] = {}
    unseen: set[str] = set()
    fresh_open = [text for text in open_text if held_out(text)]

    def fresh(make, count: int) -> list[str]:
        out: list[str] = []
        while len(out) < count:
            text = make()
            if held_out(text) and text not in unseen:
                unseen.add(text)
                out.append(text)
        return out

    grammar_text = lambda: grammar.sentence(rng)
    for column in ("train_voices", "held_out_voices"):
        share = args.tests * 6 // 10
        tests[column] = [("grammar", text) for text in fresh(grammar_text, share)]
        tests[column] += [("open", fresh_open.pop()) for _ in range(min(args.tests - share, len(fresh_open)))]
    tests["random_words"] = [("random", text) for text in fresh(lambda: grammar.random_words(rng, grammar.WORDS), args.tests)]
    tests["open_text"] = [("open", fresh_open.pop()) for _ in range(min(args.tests, len(fresh_open)))]
    for column, rows in tests.items():
        with open(os.path.join(args.out, f"test_{column}.tsv"), "w", encoding="ascii") as file:
            file.writelines(f"{kind}\t{text}\n" for kind, text in rows)
        unseen |= {text for _, text in rows}

    makers = {"grammar": grammar_text, "words": by_frequency, "random": lambda: grammar.random_words(rng, grammar.WORDS)}
    pool = [text for text in open_text if text not in unseen and not held_out(text)]
    train: list[tuple[str, str]] = []
    for kind, share in SHARES.items():
        for i in range(int(args.count * share)):
            text = pool[i % len(pool)] if kind == "open" else makers[kind]()
            if not held_out(text) and text not in unseen:
                train.append((kind, text))
    rng.shuffle(train)
    with open(os.path.join(args.out, "train.tsv"), "w", encoding="ascii") as file:
        file.writelines(f"{kind}\t{text}\n" for kind, text in train)

    counts = collections.Counter(word for _, text in train for word in text.split())
    learned = pieces.learn({word: count for word, count in counts.items() if count > 1}, args.pieces)
    coder = pieces.Pieces(learned)
    coder.save(os.path.join(args.out, "pieces.json"))
    tokens = sum(len(coder.encode(text)) for _, text in train[:5000])
    spoken = sum(len(text.split()) for _, text in train[:5000])
    print(f"{len(train)} training sentences, {len(counts)} words, {len(pool)} open clauses; {tokens / spoken:.2f} pieces a word", file=sys.stderr)


if __name__ == "__main__":
    main()
