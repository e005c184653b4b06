#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Makes tiny seeded models of every supported family and records what Transformers computes.

    python3 tests/oracle/make_model_goldens.py [--output tests/data/models]

Run by hand (needs torch, transformers, safetensors); the tests only read what it wrote. Per family:

    NAME/model.safetensors      weights, float32 (gemma3: bfloat16; mistral: two shards and index)
    NAME/config.json            in one of two layouts: "published" (rope_theta, rope_scaling,
                                torch_dtype; keys that equal a default may be missing), as the
                                released checkpoints have it, or "transformers5" (rope_parameters,
                                dtype), as Transformers 5 writes it
    NAME/config.alternate.json  the same model in the other layout; this script checks that
                                Transformers computes the same from both
    NAME/goldens.json           below

goldens.json, all computed in float32, eager attention, by a forward of the whole text at once:

    tokens            token ids of the text
    positions         positions whose logits are recorded: 0 and the last three
    logits            [positions][vocab]
    greedy            the 24 tokens that follow the text, always the largest logit
    greedy_margin     smallest difference of the two largest logits on the way
    float64_error     largest difference of the whole text's logits to naive_decoder.py in float64
    mutations         {what was changed: largest change of a recorded logit}: how far off a reader
                      is that misses this feature of the family
    stream            (llama3, qwen3, smollm2-like) StreamingLLM token by token, naive_decoder.py:
                      {start, recent, position, tokens, logits of the last three steps,
                      float64_error}; llama3 also has stream_in_text

A test should allow 20 times float64_error (about 1e-4 here): any float32 order of summation errs
about as much. Every mutation is at least five times above that, which this script checks.
"""

import argparse
import copy
import json
import pathlib
import shutil
import tempfile

import torch
import transformers
from naive_decoder import NaiveDecoder, write_json

TEXT_TOKENS, GREEDY_TOKENS, STREAM_TOKENS = 40, 24, 60
MIN_MARGIN = 1e-2  # of the greedy path: seeds are tried until it is reached
MIN_MUTATION = 100.0  # times float64_error: a feature that changes less is not tested
MAX_ERROR = 1e-4  # between Transformers in float32 and the naive decoder in float64
STREAM = {"start": 2, "recent": 6}

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
# Correction range of these numbers: frequencies 1 to 4 of 8, so that all three regimes occur.
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256,
             "beta_fast": 8.0, "beta_slow": 0.5}


def set_rope(**changes):
    """A mutation: changes entries of rope_parameters (the global layers' where there are two)."""
    def change(config):
        rope = config.rope_parameters
        rope.get("full_attention", rope).update(changes)
    return change


def set_local_rope(**changes):
    def change(config):
        config.rope_parameters["sliding_attention"].update(changes)
    return change


def set_config(**changes):
    def change(config):
        for name, value in changes.items():
            setattr(config, name, value)
    return change


def set_weights(ending, function):
    """A mutation of the weights instead of the config: replaces those whose name ends so."""
    def change(state):
        for name in state:
            if name.endswith(ending):
                state[name] = function(state[name])
    change.on_weights = True
    return change


# Each family: Transformers' config arguments; "layout" of config.json; "published": what the
# released configs of the family add (a key with value DROP is left out there).
DROP = object()
FAMILIES = {
    "llama2": {
        "classes": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "config": dict(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096,
                       rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False),
        "layout": "published",
        # The first Llama 2 configs name neither rope_theta nor the head size.
        "published": dict(head_dim=DROP, rope_theta=DROP, rope_scaling=None, attention_bias=DROP,
                          mlp_bias=DROP),
        "mutations": {"rope_theta 500000": set_rope(rope_theta=500000.0),
                      "rms_norm_eps 1e-2": set_config(rms_norm_eps=1e-2)},
    },
    "llama3": {
        "classes": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "config": dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                       num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                       max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0,
                       rope_scaling=LLAMA3_ROPE, tie_word_embeddings=True),
        "layout": "published",
        "published": {},
        "mutations": {"no rope scaling": set_rope(rope_type="default"),
                      "low_freq_factor 2": set_rope(low_freq_factor=2.0),
                      "factor 4": set_rope(factor=4.0)},
        "stream": True,
    },
    "smollm2-like": {
        "classes": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "config": dict(vocab_size=112, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=8192,
                       rms_norm_eps=1e-5, rope_theta=100000.0, tie_word_embeddings=True),
        "layout": "transformers5",
        "published": dict(head_dim=DROP, rope_scaling=None, is_llama_config=True,
                          rope_interleaved=False),
        "mutations": {"rope_theta 10000": set_rope(rope_theta=10000.0)},
        "stream": True,
    },
    "mistral": {
        "classes": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "config": dict(vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                       num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                       rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=8,
                       tie_word_embeddings=False),
        "layout": "transformers5",
        "published": dict(head_dim=DROP, attention_dropout=DROP),
        "mutations": {"sliding_window 7": set_config(sliding_window=7),
                      "sliding_window 9": set_config(sliding_window=9),
                      "no window": set_config(sliding_window=None)},
        "shards": 2,
    },
    "qwen2": {
        "classes": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "config": dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                       rms_norm_eps=1e-6, rope_theta=1000000.0, tie_word_embeddings=True,
                       use_sliding_window=False, sliding_window=4, max_window_layers=1),
        "layout": "published",
        # Released configs name a window that use_sliding_window then switches off.
        "published": dict(sliding_window=4, layer_types=DROP, pad_token_id=DROP),
        "mutations": {"no q bias": set_weights("q_proj.bias", torch.zeros_like),
                      "no k bias": set_weights("k_proj.bias", torch.zeros_like),
                      "no v bias": set_weights("v_proj.bias", torch.zeros_like),
                      "window 4 in every layer": set_config(
                          sliding_window=4, layer_types=["sliding_attention"] * 2)},
    },
    "qwen3": {
        "classes": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "config": dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                       max_position_embeddings=512, rms_norm_eps=1e-6, rope_theta=1000000.0,
                       tie_word_embeddings=False),
        "layout": "transformers5",
        "published": dict(rope_scaling=None, layer_types=DROP, pad_token_id=DROP),
        "mutations": {"q norm weights 1": set_weights("q_norm.weight", torch.ones_like),
                      "k norm weights 1": set_weights("k_norm.weight", torch.ones_like)},
        "stream": True,
    },
    "gemma3": {
        "classes": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
        # Local layers but for every sixth; query_pre_attn_scalar differs from the head size.
        "config": dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=7,
                       num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                       max_position_embeddings=512, rms_norm_eps=1e-6, rope_theta=100000.0,
                       rope_local_base_freq=10000.0,
                       rope_scaling={"rope_type": "linear", "factor": 4.0}, sliding_window=8,
                       query_pre_attn_scalar=24, bos_token_id=1, eos_token_id=2),
        "layout": "published",
        "published": dict(tie_word_embeddings=DROP, layer_types=DROP, _sliding_window_pattern=DROP,
                          use_bidirectional_attention=DROP, sliding_window_pattern=6,
                          cache_implementation="hybrid"),
        "mutations": {"sliding_window 7": set_config(sliding_window=7),
                      "sliding_window 9": set_config(sliding_window=9),
                      "every layer global": set_config(layer_types=["full_attention"] * 7),
                      "every layer local": set_config(layer_types=["sliding_attention"] * 7),
                      "global layer in place 5": set_config(
                          layer_types=["sliding_attention"] * 4 + ["full_attention"]
                          + ["sliding_attention"] * 2),
                      "no rope scaling": set_rope(rope_type="default"),
                      "local rope_theta 100000": set_local_rope(rope_theta=100000.0),
                      "query_pre_attn_scalar 16": set_config(query_pre_attn_scalar=16),
                      "exact gelu": set_config(hidden_activation="gelu"),
                      "norm weight without 1": set_weights("layernorm.weight", lambda w: w - 1.0)},
        "bfloat16": True,
    },
    "llama-yarn": {
        "classes": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "config": dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                       max_position_embeddings=1024, rms_norm_eps=1e-5, rope_theta=10000.0,
                       rope_scaling=YARN_ROPE, tie_word_embeddings=False),
        "layout": "transformers5",
        # Qwen 2.5's way of naming it.
        "published": dict(rope_scaling={"type": "yarn", **{
            key: value for key, value in YARN_ROPE.items() if key != "rope_type"}}),
        "mutations": {"no rope scaling": set_rope(rope_type="default"),
                      "attention_factor 1": set_rope(attention_factor=1.0),
                      "default beta_fast and beta_slow": set_rope(beta_fast=32.0, beta_slow=1.0),
                      "linear instead of yarn": set_rope(rope_type="linear")},
    },
}


def build(family, config):
    config._attn_implementation = "eager"
    return family["classes"][1](config).eval()


def initialise(model, seed, gemma):
    """Weights that make every feature visible: matrices of standard deviation 0.25, norm weights
    0.7 to 1.3 (Gemma adds the 1 itself), biases of standard deviation 0.4. Gemma's embeddings are
    smaller: it multiplies them by sqrt(hidden_size), and a tied model would repeat its input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "norm" in name:
                offset = 0.0 if gemma else 1.0
                weight.uniform_(-0.3, 0.3, generator=generator).add_(offset)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.4, generator=generator)
            else:
                small = gemma and "embed_tokens" in name
                weight.normal_(0.0, 0.1 if small else 0.25, generator=generator)


def forward(model, tokens):
    """Logits [tokens][vocab] of one pass over the whole text, no cache."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


def greedy(model, tokens, count):
    """(the `count` tokens that follow, smallest gap between the two largest logits)."""
    tokens, margin = list(tokens), float("inf")
    for _ in range(count):
        best = forward(model, tokens)[-1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    return tokens[-count:], margin


def published_layout(family, config):
    """The config as released checkpoints of the family have it (Transformers 4 keys)."""
    config = dict(config)
    del config["rope_parameters"], config["dtype"]
    arguments = family["config"]
    config["torch_dtype"] = "bfloat16" if family.get("bfloat16") else "float32"
    config["transformers_version"] = "4.40.0"
    config["rope_theta"] = arguments["rope_theta"]
    if "rope_scaling" in arguments:
        config["rope_scaling"] = arguments["rope_scaling"]
    if "rope_local_base_freq" in arguments:
        config["rope_local_base_freq"] = arguments["rope_local_base_freq"]
    for key, value in family["published"].items():
        if value is DROP:
            config.pop(key, None)
        else:
            config[key] = value
    return dict(sorted(config.items()))


def mutations(name, family, model, tokens, positions, logits, error):
    """{mutation: largest change of a recorded logit}; each must stand out from the rounding."""
    changes = {}
    for what, change in family["mutations"].items():
        config = copy.deepcopy(model.config)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        change(state if hasattr(change, "on_weights") else config)
        mutant = build(family, config)
        mutant.load_state_dict(state)
        changes[what] = float((forward(mutant, tokens)[positions] - logits).abs().max())
        if changes[what] < MIN_MUTATION * error:
            raise SystemExit(f"{name}: '{what}' changes the logits by {changes[what]:.3g} only")
    return changes


def stream(model, tokens, in_text=False):
    """The record of one token-wise StreamingLLM run over `tokens`."""
    last = {}
    for dtype in (torch.float32, torch.float64):
        decoder = NaiveDecoder(model.config, model.state_dict(), dtype)
        steps = list(decoder.stream(tokens, STREAM["start"], STREAM["recent"], in_text))
        last[dtype] = torch.stack(steps[-3:])
    return {**STREAM, "position": "in-text" if in_text else "in-cache", "tokens": tokens,
            "logits": last[torch.float32],
            "float64_error": float((last[torch.float32] - last[torch.float64]).abs().max())}


def load(model_folder, config_path):
    """The model as Transformers loads it from files, with the given config."""
    with tempfile.TemporaryDirectory() as folder:
        copied = pathlib.Path(folder) / "model"
        shutil.copytree(model_folder, copied)
        shutil.copy(config_path, copied / "config.json")
        return transformers.AutoModelForCausalLM.from_pretrained(
            copied, dtype=torch.float32, attn_implementation="eager").eval()


def make(name, family, output):
    config_class, _ = family["classes"]
    folder = output / name
    shutil.rmtree(folder, ignore_errors=True)
    for seed in range(1, 1000):
        model = build(family, config_class(**copy.deepcopy(family["config"])))
        initialise(model, seed, gemma=name == "gemma3")
        if family.get("bfloat16"):  # stored so; computed in float32 from the rounded weights
            for weight in model.parameters():
                weight.data = weight.data.to(torch.bfloat16).to(torch.float32)
        generator = torch.Generator().manual_seed(1000 + seed)
        tokens = torch.randint(3, model.config.vocab_size, (STREAM_TOKENS,),
                               generator=generator).tolist()
        text = tokens[:TEXT_TOKENS]
        continuation, margin = greedy(model, text, GREEDY_TOKENS)
        if margin > MIN_MARGIN and len(set(continuation)) >= GREEDY_TOKENS // 2:
            break
    else:
        raise SystemExit(f"{name}: no seed gives a greedy margin above {MIN_MARGIN}")

    # A copy: the conversion would round the model's rotary frequencies as well.
    stored = copy.deepcopy(model).to(torch.bfloat16) if family.get("bfloat16") else model
    size = sum(p.numel() * p.element_size() for p in stored.parameters())
    shard_size = size * 6 // 10 if family.get("shards") else 1 << 30
    stored.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "generation_config.json").unlink(missing_ok=True)
    shards = list(folder.glob("*.safetensors"))
    if len(shards) != family.get("shards", 1):
        raise SystemExit(f"{name}: {len(shards)} shards")
    for path in shards:
        path.chmod(0o644)

    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layouts = {"transformers5": written, "published": published_layout(family, written)}
    main = family["layout"]
    other = next(layout for layout in layouts if layout != main)
    for file, layout in (("config.json", main), ("config.alternate.json", other)):
        (folder / file).write_text(json.dumps(layouts[layout], indent=2) + "\n", encoding="utf-8")

    positions = [0, TEXT_TOKENS - 3, TEXT_TOKENS - 2, TEXT_TOKENS - 1]
    every = forward(model, text)
    logits = every[positions]
    for file in ("config.json", "config.alternate.json"):
        error = float((forward(load(folder, folder / file), text)[positions] - logits).abs().max())
        if error > 0.0:
            raise SystemExit(f"{name}: loaded through {file} the logits differ by {error:.3g}")
    exact = NaiveDecoder(model.config, model.state_dict(), torch.float64).forward(text)
    error = float((every - exact).abs().max())
    if error > MAX_ERROR:
        raise SystemExit(f"{name}: Transformers differs from the naive decoder by {error:.3g}")
    changes = mutations(name, family, model, text, positions, logits, error)
    record = {"family": name, "seed": seed, "config_layout": main,
              "generator": f"torch {torch.__version__.split('+')[0]}, "
                           f"transformers {transformers.__version__}",
              "tokens": text, "positions": positions, "logits": logits, "greedy": continuation,
              "greedy_margin": margin, "float64_error": error,
              "mutations": changes}
    if family.get("stream"):
        record["stream"] = stream(model, tokens)
    if name == "llama3":
        record["stream_in_text"] = stream(model, tokens, in_text=True)
    write_json(folder / "goldens.json", record)
    print(f"{name}: seed {seed}, {size} bytes of weights, logits {float(logits.min()):.2f} to "
          f"{float(logits.max()):.2f}, margin {margin:.3f}, float64_error "
          f"{record['float64_error']:.2e}, smallest mutation {min(changes.values()):.3f}"
          + (f", stream {record['stream']['float64_error']:.2e}" if "stream" in record else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    default = pathlib.Path(__file__).resolve().parents[1] / "data" / "models"
    parser.add_argument("--output", type=pathlib.Path, default=default)
    parser.add_argument("--only", choices=sorted(FAMILIES), help="one family instead of all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name, family in FAMILIES.items():
        if options.only in (None, name):
            make(name, family, options.output)


if __name__ == "__main__":
    main()
