#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Records what the reference tokenisers make of difficult text, for tests/io/.

Writes below tests/data/tokenizers/:
  *.json                 tiny tokenizer.json files, trained here on TEXT by Hugging Face tokenizers
  seeds/                 files of a kilobyte, for the fuzzer
  goldens.json           their encodings and decodings of STRINGS, and those of changed copies
  sentencepiece.json     pieces, scores and types of a BPE model that SentencePiece trained, and its
                         encodings
  smollm2_goldens.json   with --smollm2 MODEL.gguf: encodings by the vocabulary and merges of that
                         file under SmolLM2's own pre-tokeniser

Needs tokenizers, sentencepiece and, for --smollm2, gguf (recorded with tokenizers 0.23.3 and
sentencepiece 0.2.3). Run from anywhere: python3 tests/oracle/make_tokenizer_goldens.py
"""

import argparse
import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

DATA = Path(__file__).resolve().parents[1] / "data" / "tokenizers"

TEXT = """
The river ran past the old mill, and the miller's daughter watched the water turn the wheel. "It's
been raining since Monday," she said; "we've had 12 days of it, and they'll want 345 sacks by the
6th." He didn't answer. The wheel went round and round, and the river went on to the sea.
Whether they're right or wrong, I'm sure that nobody'd know: the numbers were 1999, 2024, 3.14159.
  for (int i = 0; i < 10; ++i) {
      total += values[i] * 2;   // sum of the values
      if (total > 100) { return total; }
  }
A café in Zürich sells crème brûlée; the señor's niño asked for a piñata. Größe, Straße, naïve.
Привет, как дела? Река течёт к морю, и вода поёт. Мельница стоит у реки.
今天天气很好,我们去河边散步。河水流向大海。東京は夜の七時。川の流れは絶えずして。
مرحبا بالعالم، النهر يجري إلى البحر. שלום עולם.
Emoji: 😀 😀 👍 👨‍👩‍👧‍👦 and flags 🇩🇪.
The water, the wheel, the river, the sea; the water again, and again the wheel.
def flow(river, sea=None):
    return [drop for drop in river if drop is not None]
"""

STRINGS = [
    "",
    " ",
    "  ",
    "          ",
    "\n",
    "\n\n",
    " \n \n  ",
    "\t",
    "\t\tindented\twith tabs",
    "\r\n",
    "lines\r\nwith\r\n\r\nCRLF\r\n",
    "a",
    " a",
    "a ",
    " a b  c   d    e ",
    "Hello world",
    "Hello, world!",
    "The river ran past the old mill.",
    "the water turn the wheel",
    "don't can't we've they'll I'm you're he'd it's",
    "DON'T CAN'T WE'VE THEY'LL I'M YOU'RE HE'D IT'S",
    "'s 't ' 'x 'S '\u017f x'\u017f",
    "0",
    "7 42 123 1234 12345 1234567890",
    "3.14159 1,000,000 1e-10 0x1F",
    "year2024month12",
    "\u0663\u0664 \u216b \u00bd \u00b2 \uff11\uff12",
    "caf\u00e9 cafe\u0301 na\u00efve nai\u0308ve",
    "Z\u00fcrich Stra\u00dfe GR\u00d6SSE \u0130stanbul",
    "\u212b \ufb01 \u2460 \uff28\uff25\uff2c\uff2c\uff2f \u1e9b\u0323",
    "a\u0300\u0316b e\u0301\u0301",
    "Привет, как дела?",
    "今天天气很好",
    "東京は夜の七時。川の流れ",
    "한국어 텍스트",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "ไทยไม่มีเว้นวรรค",
    "😀",
    "👨‍👩‍👧‍👦 family 👍🏽 🇩🇪",
    "a😀b👍c",
    "\U0001f9d1\u200d\U0001f680\U0001d54f\U0010fffd",
    "zero\u200bwidth\u200dand\ufeffmarks",
    "no\u00a0break thin\u2009space ideo\u3000graphic nel\u0085x mvs\u180ex line\u2028sep",
    "control \u0000\u0001\u0004\u001b\u007f chars",
    "for (int i = 0; i < 10; ++i) {\n      total += values[i] * 2;\n}",
    "def f(x):\n\treturn x**2  # square\n\n\n",
    "https://example.org/path?q=1&r=%20#frag",
    "snake_case CamelCase kebab-case UPPER_CASE",
    "!!!???...;;;:::---___",
    "$100 + \u20ac50 = \u00a340 <= 1~2^3|4",
    "wheel" * 40,
    "x" * 150,
    "thewaterthewheeltheriverthesea" * 6,
    "ab" * 60 + "c",
    "   leading and trailing   ",
    "word\u2581with\u2581marks \u2581\u2581",
    "<0x41><0x0A> literal bytes",
    "<|endoftext|>",
    "before<|endoftext|>after <|endoftext|> spaced <|endoftext|>",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<s>[INST] hello [/INST]</s> <unk>",
    "<bos><start_of_turn>user\nHi<end_of_turn>\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "<think>\nwell\n</think> <thin <|im_end",
    "<|endoftext|<|endoftext|><|endoftext|>",
    "the river\n\nthe sea\n\n\nthe water",
]

# For the changed copies: short ones with one difficulty each.
SHORT_STRINGS = [
    "",
    " ",
    "a",
    "  two  spaces  ",
    "The River RAN past; the mill.",
    "river river, RIVER! xriver riverx _river",
    "a-b--c---d - -e-",
    "12 345 x6y78",
    "<mark>a <mark> b  <mark>  c<mark>",
    "x <left> y<left>z  <right>  <left>",
    "<norm> <NORM> \uff1cnorm\uff1e",
    "\u212b\ufb01\u2460 \uff28\uff49 \u0130 e\u0301",
    "\u00a0\u3000 wide space \u2003",
    "日本語 q 😀 z",
    "tab\tand\nnewline\r\n",
    "\u2581mark \u2581",
]

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPACE = "\u2581"


def special(*contents):
    return [AddedToken(content, special=True, normalized=False) for content in contents]


def train_byte_level(size, pre_tokenizer, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.split("\n"), trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def replace_piece(document, old, new):
    vocabulary = document["model"]["vocab"]
    assert new not in vocabulary
    vocabulary[new] = vocabulary.pop(old)


def byte_level_tokenizers():
    gpt2 = train_byte_level(
        560, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    )
    gpt2.post_processor = processors.ByteLevel(trim_offsets=False)
    gpt2.add_special_tokens(special("<|endoftext|>"))
    yield "gpt2", gpt2

    llama3 = train_byte_level(
        640,
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    )
    llama3.add_special_tokens(
        special("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                "<|end_header_id|>", "<|eot_id|>")
    )
    begin = llama3.token_to_id("<|begin_of_text|>")
    llama3.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
                special_tokens=[("<|begin_of_text|>", begin)],
            ),
        ]
    )
    document = json.loads(llama3.to_str())
    document["model"]["ignore_merges"] = True
    # In place of the last learned piece one that no merge makes: only ignore_merges produces it.
    replace_piece(document, "".join(document["model"]["merges"].pop()), "/path")
    yield "llama3", Tokenizer.from_str(json.dumps(document))

    qwen2 = train_byte_level(
        640,
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        normalizers.NFC(),
    )
    qwen2.post_processor = processors.ByteLevel(trim_offsets=False)
    qwen2.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    qwen2.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    yield "qwen2", qwen2

    smollm2 = train_byte_level(
        520,
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        ),
    )
    smollm2.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    # SmolLM2's vocabulary lacks some control characters; here, as there, they are left out.
    document = json.loads(smollm2.to_str())
    for number, missing in enumerate(["\u0104", "\u0101"]):  # bytes 0x04 and 0x01
        replace_piece(document, missing, f"[unused{number}]")
    yield "smollm2", Tokenizer.from_str(json.dumps(document))


def sentencepiece_like(control, **parts):
    """A BPE with byte tokens, in the order of Llama's vocabulary: control, bytes, learned pieces."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=[], show_progress=False
    )
    learned.train_from_iterator(TEXT.split("\n"), trainer)
    model = json.loads(learned.to_str())["model"]
    pieces = control + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += sorted(model["vocab"], key=model["vocab"].get)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: token for token, piece in enumerate(pieces)},
            # The form of older files; the byte-level files above have pairs.
            "merges": [" ".join(pair) for pair in model["merges"]],
        },
    }
    for name, part in parts.items():
        document[name] = json.loads(part.__getstate__()) if part is not None else None
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.add_special_tokens(special(*control))
    return tokenizer, document["model"]["merges"]


def sentencepiece_like_tokenizers():
    llama_decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    begin = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    yield "llama2", *sentencepiece_like(
        ["<unk>", "<s>", "</s>"],
        normalizer=normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        ),
        post_processor=begin,
        decoder=llama_decoder,
    )
    yield "mistral", *sentencepiece_like(
        ["<unk>", "<s>", "</s>"],
        pre_tokenizer=pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False),
        post_processor=begin,
        decoder=llama_decoder,
    )
    yield "metaspace", *sentencepiece_like(
        ["<unk>", "<s>", "</s>"],
        pre_tokenizer=pre_tokenizers.Metaspace(SPACE, prepend_scheme="always", split=True),
        decoder=decoders.Sequence(
            [
                decoders.Metaspace(SPACE, prepend_scheme="always", split=True),
                decoders.ByteFallback(),
                decoders.Fuse(),
            ]
        ),
    )
    gemma, merges = sentencepiece_like(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
        normalizer=normalizers.Replace(" ", SPACE),
        pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous"),
        post_processor=processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
        ),
        decoder=decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        ),
    )
    gemma.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("\n\n\n", normalized=False)])
    yield "gemma", gemma, merges


def save(name, tokenizer, merges=None):
    document = json.loads(tokenizer.to_str())
    if merges is not None:
        document["model"]["merges"] = merges
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    path = DATA / f"{name}.json"
    path.write_text(text, encoding="utf-8")
    assert path.stat().st_size < 60_000, (name, path.stat().st_size)
    return document


def merge_patch(target, patch):
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def record(document, strings):
    tokenizer = Tokenizer.from_str(json.dumps(document))
    case = {"ids": [], "plain_ids": [], "decoded": []}
    for string in strings:
        tokenizer.encode_special_tokens = False
        ids = tokenizer.encode(string).ids
        case["ids"].append(ids)
        case["decoded"].append(tokenizer.decode(ids, skip_special_tokens=True))
        tokenizer.encode_special_tokens = True
        case["plain_ids"].append(tokenizer.encode(string, add_special_tokens=False).ids)
    return case


def added(token, content, **flags):
    defaults = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    }
    return {"id": token, "content": content, **defaults, **flags}


def patches(documents):
    """Changed copies of the files: one feature each."""
    def split(pattern, behavior, invert=False):
        return {"pre_tokenizer": {"type": "Split", "pattern": pattern, "behavior": behavior,
                                  "invert": invert}}

    for behavior in ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        for invert in (False, True):
            yield f"{behavior} {invert}", "llama2", split({"String": "-"}, behavior, invert)
            yield f"regex {behavior} {invert}", "llama2", split({"Regex": "[-\\p{N}]+|a?"}, behavior, invert)
    yield "byte level with a space in front", "gpt2", {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                          "use_regex": True}}
    yield "byte level alone", "gpt2", {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": False}}
    yield "digits together", "gpt2", {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": False},
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
             "use_regex": True}]}}
    yield "unknown, fused", "llama2", {"model": {"byte_fallback": False, "fuse_unk": True}}
    yield "unknown, each", "llama2", {"model": {"byte_fallback": False, "fuse_unk": False}}
    yield "left out", "llama2", {"model": {"byte_fallback": False, "unk_token": None}}
    for form in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase"):
        yield form, "llama2", {"normalizer": {"type": form, "normalizers": None}}
    for left in (False, True):
        for right in (False, True):
            yield f"strip {left} {right}", "llama2", {
                "normalizer": {"type": "Strip", "normalizers": None, "strip_left": left,
                               "strip_right": right}}
    yield "replace by regex", "llama2", {
        "normalizer": {"type": "Replace", "normalizers": None, "pattern": {"Regex": "\\s+|-"},
                       "content": SPACE}}
    yield "several normalisers", "llama2", {
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFKC"}, {"type": "Lowercase"},
            {"type": "Sequence", "normalizers": [
                {"type": "Replace", "pattern": {"String": "river"}, "content": "sea"}]},
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]}}
    for scheme in ("first", "always", "never"):
        for do_split in (False, True):
            yield f"metaspace {scheme} {do_split}", "mistral", {
                "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE,
                                  "prepend_scheme": scheme, "split": do_split}}
    first = 1 + max(documents["llama2"]["model"]["vocab"].values())
    base = documents["llama2"]["added_tokens"]
    yield "tokens with flags", "llama2", {
        "added_tokens": base + [
            added(first, "<mark>"),
            added(first + 1, "<left>", lstrip=True),
            added(first + 2, "<right>", rstrip=True, special=True),
            added(first + 3, "river", single_word=True),
            added(first + 4, "<mark> b", lstrip=True, rstrip=True),
        ]}
    yield "normalised tokens", "llama2", {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]},
        "added_tokens": base + [
            added(first, "<NORM>", normalized=True),
            added(first + 1, "RIVER", normalized=True, single_word=True),
            added(first + 2, "<Mark>", normalized=False),
            added(first + 3, "<mark>", normalized=True, lstrip=True),
        ]}


def make_trained():
    documents = {}
    for name, tokenizer in byte_level_tokenizers():
        documents[name] = save(name, tokenizer)
    for name, tokenizer, merges in sentencepiece_like_tokenizers():
        documents[name] = save(name, tokenizer, merges)
    cases = [{"name": name, "file": name, "patch": {}, "strings": "long", **record(document, STRINGS)}
             for name, document in documents.items()]
    for name, file, patch in patches(documents):
        changed = merge_patch(documents[file], patch)
        cases.append({"name": name, "file": file, "patch": patch, "strings": "short",
                      **record(changed, SHORT_STRINGS)})
    write("goldens.json", {"long": STRINGS, "short": SHORT_STRINGS, "cases": cases})


def make_seeds():
    """Files of a kilobyte for the fuzzer: every kind of part that the reader knows."""
    llama = json.loads((DATA / "llama2.json").read_text(encoding="utf-8"))
    qwen = json.loads((DATA / "qwen2.json").read_text(encoding="utf-8"))
    vocabulary = {piece: token for token, piece in enumerate(
        ["<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "<0xA9>", SPACE, "t", "h", "e", "he",
         SPACE + "t", SPACE + "the"])}
    llama["model"] |= {"vocab": vocabulary, "merges": ["h e", f"{SPACE} t", f"{SPACE}t he"]}
    write("seeds/llama.json", llama)
    llama["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "Split", "pattern": {"String": "-"}, "behavior": "MergedWithNext",
         "invert": False},
        {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": True}]}
    llama["normalizer"] = {"type": "Sequence", "normalizers": [
        {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Strip", "strip_left": True,
                                                  "strip_right": False},
        {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}]}
    llama["added_tokens"][2] |= {"lstrip": True, "rstrip": True, "single_word": True,
                                 "normalized": True}
    write("seeds/parts.json", llama)
    qwen["model"] |= {
        "vocab": {piece: token for token, piece in enumerate(
            ["t", "h", "e", "\u0120", "he", "\u0120t", "1"])},
        "merges": [["h", "e"], ["\u0120", "t"]], "ignore_merges": True}
    qwen["added_tokens"] = [qwen["added_tokens"][0] | {"id": 7}]
    write("seeds/qwen.json", qwen)


def make_sentencepiece():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=560,
        byte_fallback=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.98,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    count = processor.vocab_size()

    def kind(token):
        if processor.is_unknown(token):
            return 2
        if processor.is_control(token):
            return 3
        if processor.is_unused(token):
            return 5
        return 6 if processor.is_byte(token) else 1

    # Text that spells a control token is left out: SentencePiece has no parse_special.
    ids = [processor.encode(string) for string in STRINGS]
    write("sentencepiece.json", {
        "pieces": [processor.id_to_piece(token) for token in range(count)],
        "scores": [processor.get_score(token) for token in range(count)],
        "types": [kind(token) for token in range(count)],
        "bos": processor.bos_id(),
        "eos": processor.eos_id(),
        "unknown": processor.unk_id(),
        "strings": STRINGS,
        "ids": ids,
        "decoded": [processor.decode(tokens) for tokens in ids],
    })


def make_smollm2(path):
    import gguf

    fields = gguf.GGUFReader(path).fields
    pieces = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({piece: token for token, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        special(*[piece for piece, kind in zip(pieces, types) if kind == 3])
    )
    strings = STRINGS + [line for line in TEXT.split("\n") if line]
    case = record(json.loads(tokenizer.to_str()), strings)
    write("smollm2_goldens.json", {"strings": strings, **case})


def write(name, content):
    (DATA / name).parent.mkdir(parents=True, exist_ok=True)
    (DATA / name).write_text(
        json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smollm2", help="the model file whose vocabulary to use")
    options = parser.parse_args()
    DATA.mkdir(parents=True, exist_ok=True)
    make_trained()
    make_seeds()
    make_sentencepiece()
    if options.smollm2:
        make_smollm2(options.smollm2)


if __name__ == "__main__":
    main()
