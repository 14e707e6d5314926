"""LoRA shapes of real models: (layers, {module: (out, in)})."""

from __future__ import annotations


def _decoder(hidden: int, inner: int, query: int, key: int) -> dict[str, tuple[int, int]]:
    return {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


MODELS = {
    "tiny": (2, _decoder(64, 160, 64, 32)),
    "qwen3-1.7b": (28, _decoder(2048, 6144, 2048, 1024)),
    "qwen3-8b": (36, _decoder(4096, 12288, 4096, 1024)),
    "qwen3-32b": (64, _decoder(5120, 25600, 8192, 1024)),
    "llama-3-70b": (80, _decoder(8192, 28672, 8192, 1024)),
    # One layer of Qwen3-30B-A3B. Its 128 experts are one parameter for each side, on which PEFT's
    # `target_parameters` puts factors [128 r, in] and [out, 128 r]: taken apart, a module each.
    "qwen3-30b-a3b-experts": (
        1,
        {
            f"mlp.experts.{expert}.{name}": shape
            for expert in range(128)
            for name, shape in (("gate_up_proj", (1536, 2048)), ("down_proj", (2048, 768)))
        },
    ),
}


def modules(model: str, layers: int | None = None) -> dict[str, tuple[int, int]]:
    """Return module path to (out, in) for the first ``layers`` layers of a model."""
    count, shapes = MODELS[model]
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(layers or count)
        for name, shape in shapes.items()
    }
