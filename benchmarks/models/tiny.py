"""A tiny Llama with random weights and SmolLM2's tokenizer, for tests and for host-cost runs.

    python -m benchmarks.models.tiny [--layers 1] [--max-len 262144] [OUT]

Its text means nothing, but greedy decoding depends on the context, so a wrong, lost or shifted KV
block shows in the next tokens. No special token is ever the likeliest: it never stops by itself.
Use it in float32.
"""

import argparse
import json
import shutil
from pathlib import Path

from benchmarks.models import CACHE, published, smollm2

DEFAULT = CACHE / "tiny-llama"
HEAD_DIM = 32  # the smallest that vLLM's CPU attention takes
_RECIPE = "recipe.json"


def ensure_tiny(
    path: Path | str = DEFAULT,
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    max_len: int = 16384,
    seed: int = 0,
) -> Path:
    """Return the model folder, building it where it is missing or was built to another recipe."""
    path = Path(path)
    recipe = {
        "version": 1,
        "hidden": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "max_len": max_len,
        "seed": seed,
    }
    marker = path / _RECIPE
    if path.is_dir():
        if marker.is_file() and json.loads(marker.read_text()) == recipe:
            return path
        if any(path.iterdir()) and not marker.is_file():
            raise ValueError(f"{path} exists and is not a tiny model")
        shutil.rmtree(path)
    with published(path) as out:
        _write_weights(out, hidden, layers, heads, kv_heads, max_len, seed)
        smollm2.copy_tokenizer(out)
        shutil.copy(smollm2.ensure() / "generation_config.json", out)
        (out / _RECIPE).write_text(json.dumps(recipe, indent=1) + "\n")
    return path


def _write_weights(
    out: Path, hidden: int, layers: int, heads: int, kv_heads: int, max_len: int, seed: int
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=max_len,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)  # the norms
                continue
            # Unit-gain layers, with what attention brings in outweighing the token's own embedding.
            gain = 3.0 if "o_proj" in name else 1.5 if "self_attn" in name else 1.0
            fan_in = 1 if "embed_tokens" in name else weight.shape[1]
            weight.normal_(0.0, gain / fan_in**0.5, generator=random)
        model.lm_head.weight[:17] = 0.0  # the special tokens
    model.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", nargs="?", type=Path, default=DEFAULT, help="%(default)s")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--max-len", type=int, default=16384)
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args())
    print(ensure_tiny(args.pop("out"), **args))


if __name__ == "__main__":
    main()
