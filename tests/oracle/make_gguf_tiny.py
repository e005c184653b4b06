#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Writes tiny models of make_model_goldens.py once more, as GGUF files.

    python3 tests/oracle/make_gguf_tiny.py [--models tests/data/models]

Run by hand (needs torch, transformers, safetensors, gguf), after make_model_goldens.py. Writes
llama3.gguf, qwen2.gguf, qwen3.gguf and gemma3.gguf beside the folders; all tensors F32. The
goldens of NAME/goldens.json hold for NAME.gguf as well: this script reads each file back, undoes
the conversion, and compares the naive decoder's logits with them.

Keys and tensors are those of llama.cpp's converter. What it does to a model, and so does this:

    llama    rows of the query and key projections permuted per head from (i, i + D/2) pairs to
             neighbours (2i, 2i + 1); Llama-3 frequency scaling as a tensor rope_freqs.weight of
             D/2 divisors of the frequencies, no metadata; rope.dimension_count and vocab_size
    qwen     not permuted
    gemma    1 added to every norm weight; the frequency base of the local layers (10000) and which
             layers are global (every sixth) are not in the file: readers know them.
             query_pre_attn_scalar is not in the file either, readers take the head size. The tiny
             model has another one, so the query norm carries the ratio here: equal scores.

The vocabulary is a minimal byte-level BPE ("gpt2") of 128 tokens: three control tokens, the
printable ASCII characters, newline, 29 merges. Other bytes have no token.
"""

import argparse
import json
import math
import pathlib

import gguf
import numpy
import torch
import transformers
from naive_decoder import NaiveDecoder
from safetensors.torch import load_file

MAX_ERROR = 1e-4  # against the recorded logits, float32

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Byte-level alphabet: space is written as U+0120, newline as U+010A, the rest as itself.
ALPHABET = ["\u0120", "\u010a"] + [chr(code) for code in range(0x21, 0x7F)]
MERGES = ["\u0120 t", "h e", "i n", "r e", "\u0120t he", "o n", "e r", "\u0120 a", "e n", "o u",
          "i t", "n d", "\u0120 s", "o r", "\u0120 w", "a t", "e s", "\u0120 o", "i s", "\u0120 b",
          "in g", "e d", "\u0120a nd", "\u0120 h", "\u0120t o", "l l", "\u0120o f", "a r", "l e"]
CHAT_TEMPLATE = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
                 "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
                 "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")

# name: (GGUF architecture, tokenizer.ggml.pre)
MODELS = {"llama3": ("llama", "llama-bpe"), "qwen2": ("qwen2", "qwen2"),
          "qwen3": ("qwen3", "qwen2"), "gemma3": ("gemma3", "gpt-2")}

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name, names):
    stem, ending = name.rsplit(".", maxsplit=1)
    if stem.startswith("model.layers."):
        _, _, layer, stem = stem.split(".", maxsplit=3)
        return f"blk.{layer}.{names[stem]}.{ending}"
    return f"{names[stem]}.{ending}"


def permute(rows, heads):
    """[heads * D, ...]: within each head, row i and row i + D/2 become neighbours."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def unpermute(rows, heads):
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def llama3_divisors(config):
    """rope_freqs.weight [head_dim / 2]: what each frequency is divided by."""
    rope, divisors = config.rope_parameters, []
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    for i in range(config.head_dim // 2):
        frequency = rope["rope_theta"] ** (-2.0 * i / config.head_dim)
        turns = rope["original_max_position_embeddings"] * frequency / (2.0 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1.0 / (keep + (1.0 - keep) / rope["factor"]))
    return numpy.array(divisors, dtype=numpy.float32)


def query_norm_factor(config):
    return math.sqrt(config.head_dim / config.query_pre_attn_scalar)


def write_metadata(writer, config, arch):
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"sluice tiny {config.model_type}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if arch == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)


def write_tokenizer(writer, pre, vocab_size):
    tokens = CONTROL + ALPHABET + [merge.replace(" ", "") for merge in MERGES]
    if len(set(tokens)) != vocab_size:
        raise SystemExit(f"{len(set(tokens))} distinct tokens for a vocabulary of {vocab_size}")
    kinds = [gguf.TokenType.CONTROL] * len(CONTROL)
    kinds += [gguf.TokenType.NORMAL] * (len(tokens) - len(CONTROL))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def write_model(path, config, weights, arch, pre):
    writer = gguf.GGUFWriter(path, arch)
    write_metadata(writer, config, arch)
    write_tokenizer(writer, pre, config.vocab_size)
    if arch == "llama":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(config))
    for name, tensor in weights.items():
        value = tensor.to(torch.float32).numpy()
        if arch == "llama" and name.endswith("q_proj.weight"):
            value = permute(value, config.num_attention_heads)
        if arch == "llama" and name.endswith("k_proj.weight"):
            value = permute(value, config.num_key_value_heads)
        if arch == "gemma3" and name.endswith("norm.weight"):
            value = value + numpy.float32(1.0)
        if arch == "gemma3" and name.endswith("q_norm.weight"):
            value = value * numpy.float32(query_norm_factor(config))
        names = GEMMA_NAMES if arch == "gemma3" else NAMES
        writer.add_tensor(gguf_name(name, names), numpy.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(path, config, weights, arch, goldens):
    """Reads the file back and compares the naive decoder's logits with the recorded ones."""
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    names = GEMMA_NAMES if arch == "gemma3" else NAMES
    state = {}
    for name in weights:
        value = torch.tensor(stored.pop(gguf_name(name, names)))
        if arch == "llama" and name.endswith("q_proj.weight"):
            value = unpermute(value, config.num_attention_heads)
        if arch == "llama" and name.endswith("k_proj.weight"):
            value = unpermute(value, config.num_key_value_heads)
        if arch == "gemma3" and name.endswith("norm.weight"):
            value = value - 1.0
        state[name] = value
    decoder = NaiveDecoder(config, state)
    divisors = stored.pop("rope_freqs.weight", None)
    if divisors is not None:  # in place of the config's scaling
        exponents = -2.0 * torch.arange(config.head_dim // 2, dtype=torch.float64) / config.head_dim
        unscaled = config.rope_parameters["rope_theta"] ** exponents
        decoder.rotary = [(unscaled / torch.tensor(divisors), 1.0)] * config.num_hidden_layers
    if arch == "gemma3":  # a reader scales by the head size
        decoder.sm_scale = config.head_dim ** -0.5
    if stored:
        raise SystemExit(f"{path}: unexpected tensors {sorted(stored)}")
    logits = decoder.forward(goldens["tokens"])[goldens["positions"]]
    error = float((logits - torch.tensor(goldens["logits"])).abs().max())
    if error > MAX_ERROR:
        raise SystemExit(f"{path}: logits differ from the goldens by {error:.3g}")
    print(f"{path.name}: {path.stat().st_size} bytes, logits within {error:.2e} of the goldens")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    default = pathlib.Path(__file__).resolve().parents[1] / "data" / "models"
    parser.add_argument("--models", type=pathlib.Path, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for name, (arch, pre) in MODELS.items():
        folder, path = options.models / name, options.models / f"{name}.gguf"
        config = transformers.AutoConfig.from_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        goldens = json.loads((folder / "goldens.json").read_text(encoding="utf-8"))
        write_model(path, config, weights, arch, pre)
        check(path, config, weights, arch, goldens)


if __name__ == "__main__":
    main()
