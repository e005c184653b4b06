# SPDX-License-Identifier: MIT
"""A naive decoder of the Llama family, for oracles: plain loops, no cache tricks, no batching.

Shares nothing with the library and nothing with Transformers but the weights' names: it has its own
rotary frequencies, norms and attention. Every token is fed alone; the raw (unrotated) keys of a
layer are kept in a list and all of them are rotated again at every step, as StreamingLLM's released
code does. Slow and plain on purpose. Also holds the JSON writer that the model oracles use.

Covers: grouped heads, QKV bias, query/key norm, explicit head size, tied embeddings, linear, YaRN
and Llama-3 frequency scaling, sliding windows per layer, Gemma 3's norms and scalings.
"""

import json
import math

import torch


def rotary_frequencies(rope, head_dim):
    """(frequencies [head_dim / 2] in float64, factor of cos and sin) from one `rope_parameters`."""
    frequencies, kind = [], rope["rope_type"]
    for i in range(head_dim // 2):
        frequency = rope["rope_theta"] ** (-2.0 * i / head_dim)
        keep = 1.0  # share of the unscaled frequency
        if kind == "linear":
            keep = 0.0
        elif kind == "llama3":
            turns = rope["original_max_position_embeddings"] * frequency / (2.0 * math.pi)
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        elif kind == "yarn":
            # The (real-valued) index whose frequency makes so many turns over the original length.
            original = rope["original_max_position_embeddings"]
            low, high = (
                head_dim * math.log(original / (turns * 2 * math.pi))
                / (2 * math.log(rope["rope_theta"]))
                for turns in (rope["beta_fast"], rope["beta_slow"]))
            low, high = max(math.floor(low), 0), min(math.ceil(high), head_dim - 1)
            keep = 1.0 - min(max((i - low) / (high - low), 0.0), 1.0)
        elif kind != "default":
            raise ValueError(f"rope_type {kind} is not covered")
        frequencies.append(frequency * (keep + (1.0 - keep) / rope.get("factor", 1.0)))
    factor = 0.1 * math.log(rope["factor"]) + 1.0 if kind == "yarn" else 1.0
    return torch.tensor(frequencies, dtype=torch.float64), factor


class NaiveDecoder:
    """weights: {Transformers name: tensor}; all arithmetic in `dtype`, angles in float64."""

    def __init__(self, config, weights, dtype=torch.float32):
        self.config = config
        self.dtype = dtype
        self.weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        self.gemma = config.model_type == "gemma3_text"
        self.head_dim = (getattr(config, "head_dim", None)
                         or config.hidden_size // config.num_attention_heads)
        self.sm_scale = getattr(config, "query_pre_attn_scalar", self.head_dim) ** -0.5
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
        self.windows = [window if kind == "sliding_attention" else None for kind in kinds]
        rope = config.rope_parameters
        self.rotary = [rotary_frequencies(rope.get(kind, rope), self.head_dim) for kind in kinds]

    def norm(self, x, name):
        weight = self.weights[name + ".weight"]
        mean_square = (x * x).mean(dim=-1, keepdim=True)
        normed = x / torch.sqrt(mean_square + self.config.rms_norm_eps)
        return normed * (1.0 + weight if self.gemma else weight)

    def linear(self, x, name):
        y = x @ self.weights[name + ".weight"].T
        bias = self.weights.get(name + ".bias")
        return y if bias is None else y + bias

    def activation(self, x):
        if self.gemma:  # GELU in its tanh form
            return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
        return x * torch.sigmoid(x)

    def rotate(self, x, positions, index):
        """x: [tokens, heads, head_dim], pairs (i, i + head_dim / 2); positions: list of numbers."""
        frequencies, factor = self.rotary[index]
        angles = torch.tensor(positions, dtype=torch.float64)[:, None] * frequencies[None, :]
        cos = (factor * torch.cos(angles)).to(self.dtype)[:, None, :]
        sin = (factor * torch.sin(angles)).to(self.dtype)[:, None, :]
        a, b = x[..., : self.head_dim // 2], x[..., self.head_dim // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def attend(self, x, index, cache, key_positions, query_position):
        """One layer's attention for one token. x: [hidden]; its key and value join the cache."""
        config, dim, layer = self.config, self.head_dim, f"model.layers.{index}.self_attn."
        groups = config.num_attention_heads // config.num_key_value_heads
        q = self.linear(x, layer + "q_proj").view(-1, dim)
        k = self.linear(x, layer + "k_proj").view(-1, dim)
        v = self.linear(x, layer + "v_proj").view(-1, dim)
        if layer + "q_norm.weight" in self.weights:
            q, k = self.norm(q, layer + "q_norm"), self.norm(k, layer + "k_norm")
        cache.append((k, v))
        first = max(0, len(cache) - self.windows[index]) if self.windows[index] else 0
        keys = torch.stack([entry[0] for entry in cache[first:]])
        values = torch.stack([entry[1] for entry in cache[first:]])
        keys = self.rotate(keys, key_positions[first:], index)
        q = self.rotate(q[None], [query_position], index)[0]
        heads = []
        for head in range(config.num_attention_heads):
            scores = keys[:, head // groups] @ q[head] * self.sm_scale
            weights = torch.exp(scores - scores.max())
            heads.append((weights / weights.sum()) @ values[:, head // groups])
        return self.linear(torch.cat(heads), layer + "o_proj")

    def feed_forward(self, x, index):
        layer = f"model.layers.{index}.mlp."
        gate = self.activation(self.linear(x, layer + "gate_proj"))
        return self.linear(gate * self.linear(x, layer + "up_proj"), layer + "down_proj")

    def step(self, token, caches, key_positions, query_position):
        """Feeds one token. caches: per layer a list of (raw key, value), each [num_kv_heads,
        head_dim], to which the token's own are appended. key_positions has one entry per key,
        the token's own included. Returns logits [vocab]."""
        embeddings = self.weights["model.embed_tokens.weight"]
        x = embeddings[token]
        if self.gemma:
            x = x * math.sqrt(self.config.hidden_size)
        for index, cache in enumerate(caches):
            layer = f"model.layers.{index}."
            y = self.norm(x, layer + "input_layernorm")
            y = self.attend(y, index, cache, key_positions, query_position)
            if self.gemma:
                x = x + self.norm(y, layer + "post_attention_layernorm")
                y = self.norm(x, layer + "pre_feedforward_layernorm")
                y = self.feed_forward(y, index)
                x = x + self.norm(y, layer + "post_feedforward_layernorm")
            else:
                x = x + y
                y = self.norm(x, layer + "post_attention_layernorm")
                x = x + self.feed_forward(y, index)
        x = self.norm(x, "model.norm")
        tied = self.config.tie_word_embeddings
        return (embeddings if tied else self.weights["lm_head.weight"]) @ x

    def stream(self, tokens, start, recent, in_text=False):
        """StreamingLLM's evaluation loop, token by token: feed one token, attend everything cached
        and itself (start + recent + 1 keys in the steady state), then drop what is neither among
        the first `start` nor the last `recent`. Positions are ranks in the cache (in_text False)
        or places in the text. Yields logits [vocab] per token."""
        caches = [[] for _ in range(self.config.num_hidden_layers)]
        kept = []
        for place, token in enumerate(tokens):
            kept.append(place)
            positions = list(kept) if in_text else list(range(len(kept)))
            with torch.no_grad():
                yield self.step(token, caches, positions, positions[-1])
            if len(kept) > start + recent:
                first = len(kept) - recent
                caches = [entries[:start] + entries[first:] for entries in caches]
                kept = kept[:start] + kept[first:]

    def forward(self, tokens):
        """Logits [tokens][vocab] of a text, nothing dropped."""
        return torch.stack(list(self.stream(tokens, 0, len(tokens))))


def to_json(value):
    """Compact JSON; floats with 9 significant digits, which give a float32 back exactly."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, bool) or value is None or isinstance(value, int | str):
        return json.dumps(value, ensure_ascii=True)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a golden value is not finite")
        return f"{value:.9g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {to_json(v)}" for k, v in value.items()) + "}"
    return "[" + ", ".join(to_json(item) for item in value) + "]"


def write_json(path, record):
    """Writes a dict with one line per entry, so that a changed golden shows as a changed line."""
    lines = [f"  {json.dumps(key)}: {to_json(value)}" for key, value in record.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
