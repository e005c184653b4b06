#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Records what Transformers and naive_decoder.py compute with SmolLM2-135M-Instruct.

    python3 bench/austen.py --output PROSE
    python3 tests/oracle/make_smollm2_goldens.py MODEL.gguf PROSE/prideprejudice.txt \\
        [--part text|stream|precision] [--output tests/data/smollm2]

Run by hand (needs torch, transformers, gguf, tokenizers; the parts take one to three minutes each
on one core and merge into one goldens.json). The weights are the GGUF file's, dequantised to
float32, the rows of the query and key projections put back from neighbouring to half-split pairs.
All in float32, eager attention, unless said otherwise; log-probabilities are natural.

goldens.json:

    model_sha256          of the GGUF file
    text, tokens          512 tokens of English prose (Pride and Prejudice from its first sentence)
    positions, vocab_ids  8 positions, 256 seeded vocabulary entries
    logits                [positions][vocab_ids]
    top_ids, top_logits   [positions][5], the largest first
    logit_range           largest minus smallest of all 512 x 49152 logits
    log_probs             [511]: of token t + 1 given the tokens 0 ... t
    greedy_text           64 greedy tokens after the 512, end tokens not heeded
    greedy_text_margin    smallest difference of the two largest logits on the way
    chat_prompt, chat_tokens, greedy_chat, greedy_chat_margin
                          the same after a prompt formatted with the model's chat template
    stream_tokens         400: the tokens of the three streams below are the text's first
    stream                {start 4, recent 60}: StreamingLLM token by token; raw keys, rotated at
                          every step by their rank in the cache; attends start + recent cached keys
                          and the token itself, then shrinks. log_probs [399] as above
    window                the same with {start 0, recent 64}
    recompute             {window 64}: the last 64 tokens (fewer at the start), position t included,
                          forwarded anew at positions 0 ... 63; positions (every eighth) and
                          log_probs of token t + 1
    float64               {tokens, logits, log_probs, stream_log_probs, window_log_probs}: largest
                          differences of the recorded values to naive_decoder.py in float64, over
                          the first `tokens` of the text and all of the two streams

Tolerance of a float32 implementation: 20 times the float64 entries, i.e. about as far from these
values as these are from the exact ones, with room for another order of summation. An implementation
that also quantises activations is not float32 and needs its own bound (1e-3 of logit_range).
"""

import argparse
import hashlib
import json
import pathlib

import gguf
import torch
import transformers
from naive_decoder import NaiveDecoder, write_json
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TEXT_TOKENS, STREAM_TOKENS, GREEDY_TOKENS, TOP = 512, 400, 64, 5
PRECISION_TOKENS = 256
POSITIONS = [0, 1, 7, 63, 127, 255, 383, 511]
VOCAB_IDS, VOCAB_SEED = 256, 20240229
STREAMS = {"stream": {"start": 4, "recent": 60}, "window": {"start": 0, "recent": 64}}
RECOMPUTE_WINDOW, RECOMPUTE_STRIDE = 64, 8
FIRST_WORDS = "It is a truth universally acknowledged"
QUESTION = "Explain in a few sentences why the sky is blue."
KEY_ORDER = [
    "model_sha256", "generator", "text", "tokens", "positions", "vocab_ids", "logits", "top_ids",
    "top_logits", "logit_range", "log_probs", "greedy_text", "greedy_text_margin", "chat_prompt",
    "chat_tokens", "greedy_chat", "greedy_chat_margin", "stream_tokens", "stream", "window",
    "recompute", "float64"]

LAYER_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm"}
OTHER_NAMES = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}


def unpermute(rows, heads):
    """[heads * D, ...]: within each head, rows 2i and 2i + 1 become i and i + D/2."""
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def read_model(reader):
    """(Transformers config, {Transformers name: float32 tensor}) of a GGUF file, arch llama."""
    def field(name):
        return reader.fields[name].contents()
    config = transformers.LlamaConfig(
        vocab_size=field("llama.vocab_size"), hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=field("llama.rope.freq_base"), tie_word_embeddings=True)
    config._attn_implementation = "eager"
    weights = {}
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        stem = tensor.name.removesuffix(".weight")
        if stem.startswith("blk."):
            _, layer, stem = stem.split(".")
            if stem == "attn_q":
                value = unpermute(value, config.num_attention_heads)
            if stem == "attn_k":
                value = unpermute(value, config.num_key_value_heads)
            name = f"model.layers.{layer}.{LAYER_NAMES[stem]}.weight"
        else:
            name = OTHER_NAMES[stem]
        weights[name] = torch.tensor(value, dtype=torch.float32)
    return config, weights


def read_tokenizer(reader):
    """The file's byte-level BPE; SmolLM's pre-tokenizer splits digits, then as GPT-2 does."""
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return tokenizer


def chat_prompt(reader):
    """QUESTION through the file's own chat template."""
    import jinja2  # what Transformers renders templates with
    template = jinja2.Environment().from_string(reader.fields["tokenizer.chat_template"].contents())
    return template.render(messages=[{"role": "user", "content": QUESTION}],
                           add_generation_prompt=True)


def next_log_probs(logits, tokens):
    """[len(tokens) - 1]: log-probability of each token after the first. logits: [tokens, vocab]."""
    following = torch.tensor(tokens[1:])[:, None]
    return torch.log_softmax(logits[:-1], dim=-1).gather(1, following)[:, 0]


def greedy(model, tokens):
    """(64 greedy tokens, smallest gap of the two largest logits), with a full cache."""
    fed, cache, out, margin = torch.tensor([tokens]), None, [], float("inf")
    while len(out) < GREEDY_TOKENS:
        with torch.no_grad():
            result = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, best = result.past_key_values, result.logits[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        out.append(int(best.indices[0]))
        fed = torch.tensor([[out[-1]]])
    return out, margin


def transformers_model(config, weights):
    model = transformers.LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or missing not in ([], ["lm_head.weight"]):
        raise SystemExit(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model


def text_part(reader, config, weights, tokenizer, tokens):
    model = transformers_model(config, weights)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    generator = torch.Generator().manual_seed(VOCAB_SEED)
    vocab_ids = torch.randperm(config.vocab_size, generator=generator)[:VOCAB_IDS].sort().values
    top = logits[POSITIONS].topk(TOP)
    prompt = chat_prompt(reader)
    chat_tokens = tokenizer.encode(prompt).ids
    greedy_text, text_margin = greedy(model, tokens)
    greedy_chat, chat_margin = greedy(model, chat_tokens)
    print("after the text:", repr(tokenizer.decode(greedy_text)), f"margin {text_margin:.4f}")
    print("answer:", repr(tokenizer.decode(greedy_chat)), f"margin {chat_margin:.4f}")
    return {
        "text": tokenizer.decode(tokens, skip_special_tokens=False), "tokens": tokens,
        "positions": POSITIONS, "vocab_ids": vocab_ids,
        "logits": logits[POSITIONS][:, vocab_ids], "top_ids": top.indices, "top_logits": top.values,
        "logit_range": float(logits.max() - logits.min()),
        "log_probs": next_log_probs(logits, tokens), "greedy_text": greedy_text,
        "greedy_text_margin": text_margin, "chat_prompt": prompt, "chat_tokens": chat_tokens,
        "greedy_chat": greedy_chat, "greedy_chat_margin": chat_margin}


def stream_part(config, weights, tokens):
    decoder = NaiveDecoder(config, weights)
    record = {"stream_tokens": len(tokens)}
    for name, sizes in STREAMS.items():
        logits = torch.stack(list(decoder.stream(tokens, **sizes)))
        record[name] = {**sizes, "log_probs": next_log_probs(logits, tokens)}
    model = transformers_model(config, weights)
    positions = list(range(RECOMPUTE_STRIDE - 1, len(tokens) - 1, RECOMPUTE_STRIDE))
    log_probs = []
    for position in positions:
        window = tokens[max(0, position + 1 - RECOMPUTE_WINDOW) : position + 1]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window]), use_cache=False).logits[0, -1]
        log_probs.append(float(torch.log_softmax(logits, dim=-1)[tokens[position + 1]]))
    record["recompute"] = {"window": RECOMPUTE_WINDOW, "positions": positions,
                           "log_probs": log_probs}
    for name in ("stream", "window"):
        mean = float(-record[name]["log_probs"].mean())
        late = float(-record[name]["log_probs"][100:].mean())
        print(f"{name}: mean negative log-probability {mean:.4f}, from position 100 on {late:.4f}")
    print(f"recompute: {-sum(log_probs) / len(log_probs):.4f}, from position 100 on "
          f"{-sum(log_probs[12:]) / len(log_probs[12:]):.4f}")
    return record


def precision_part(config, weights, tokens, record):
    """Differences of the recorded values to the naive decoder in float64."""
    decoder = NaiveDecoder(config, weights, torch.float64)
    recorded = torch.tensor(record["logits"], dtype=torch.float64)
    logits_error = log_prob_error = 0.0
    for position, logits in enumerate(decoder.stream(tokens[:PRECISION_TOKENS], 0, len(tokens))):
        if position in POSITIONS:
            row = recorded[POSITIONS.index(position)]
            logits_error = max(logits_error, float((logits[record["vocab_ids"]] - row).abs().max()))
        exact = float(torch.log_softmax(logits, dim=-1)[tokens[position + 1]])
        log_prob_error = max(log_prob_error, abs(exact - record["log_probs"][position]))
    errors = {"tokens": PRECISION_TOKENS, "logits": logits_error, "log_probs": log_prob_error}
    # The window without sinks has an entry of its own: once it has lost the first token its
    # activations are far out of range and amplify rounding.
    for name, sizes in STREAMS.items():
        worst = 0.0
        for position, logits in enumerate(decoder.stream(tokens[:STREAM_TOKENS - 1], **sizes)):
            exact = float(torch.log_softmax(logits, dim=-1)[tokens[position + 1]])
            worst = max(worst, abs(exact - record[name]["log_probs"][position]))
        errors[f"{name}_log_probs"] = worst
    print(errors)
    return {"float64": errors}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    default = pathlib.Path(__file__).resolve().parents[1] / "data" / "smollm2"
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("prose", type=pathlib.Path)
    parser.add_argument("--part", choices=("text", "stream", "precision"),
                        help="only this part; 'precision' needs the other two recorded")
    parser.add_argument("--output", type=pathlib.Path, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()

    reader = gguf.GGUFReader(options.model)
    config, weights = read_model(reader)
    tokenizer = read_tokenizer(reader)
    prose = options.prose.read_text(encoding="utf-8")
    tokens = tokenizer.encode(prose[prose.index(FIRST_WORDS):][:8000]).ids[:TEXT_TOKENS]

    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "goldens.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    record["model_sha256"] = hashlib.sha256(options.model.read_bytes()).hexdigest()
    record["generator"] = (f"torch {torch.__version__.split('+')[0]}, "
                           f"transformers {transformers.__version__}")
    if options.part in (None, "text"):
        record |= text_part(reader, config, weights, tokenizer, tokens)
    if options.part in (None, "stream"):
        record |= stream_part(config, weights, tokens[:STREAM_TOKENS])
    if options.part in (None, "precision"):
        record = json.loads(json.dumps(record, default=lambda tensor: tensor.tolist()))
        record |= precision_part(config, weights, tokens, record)
    write_json(path, {key: record[key] for key in KEY_ORDER if key in record})
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
