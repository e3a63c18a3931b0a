# SPDX-License-Identifier: Apache-2.0
"""Tiny models that see, with random weights: what they answer depends on every pixel.

    python tests/e2e/tiny_vision.py FAMILY OUT

A token is a byte. Greedy answers are printable ASCII and end by length only, so that a client that
sends an answer back as text sends back the same tokens. Use them in float32.
"""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPECIAL = (
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<boi>",
    "<eoi>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "<|AUDIO|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|video_pad|>",
)
PAD, START, END, IMAGE, FIRST, LAST, AUDIO = 0, 1, 2, 3, 4, 5, 9
VOCAB = 288
_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # the smallest that vLLM's CPU attention takes
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": PAD,
}
_EYES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{ part.text }}{%- else -%}PLACEHOLDER{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""


def screenshot(seed: int, side: int = 168) -> Any:
    """A picture like no other."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)


def sound(seed: int) -> Any:
    """Two seconds like no others, at 16 kHz."""
    import numpy as np

    pitches = np.random.default_rng(seed).uniform(100, 4000, 40).repeat(800)
    return np.sin(np.cumsum(pitches) * (2 * np.pi / 16000)).astype(np.float32)


def data_uri(picture: Any) -> str:
    """The picture as a client sends it."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def build(family: str, folder: Path) -> None:
    """Write a model of one of `FAMILIES`: weights, tokenizer and processor."""
    import torch

    torch.manual_seed(0)
    model, processor = FAMILIES[family](_tokenizer())
    _fill(model)
    model.save_pretrained(folder)
    _rename(folder / "model.safetensors")
    processor.chat_template = _TEMPLATE.replace("PLACEHOLDER", PLACEHOLDERS[family])
    processor.tokenizer.chat_template = processor.chat_template
    processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    generation = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def _tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens={
            "image_token": "<image>",
            "boi_token": "<boi>",
            "eoi_token": "<eoi>",
        },
        model_max_length=8192,
    )


def _fill(model: Any) -> None:
    """Layers of unit gain; what attention brings in outweighs a token's own embedding."""
    import torch

    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                weight.fill_(float(name.endswith("weight")))  # norms, and no bias
                continue
            gain = 3.0 if "o_proj" in name else 1.5 if "attn" in name else 1.0
            fan_in = 1 if "embed_tokens" in name else weight[0].numel()
            weight.normal_(0.0, gain / fan_in**0.5, generator=random)
        head = model.get_output_embeddings().weight
        is_said = torch.zeros(VOCAB, dtype=torch.bool)
        is_said[[len(SPECIAL) + place for place in _printable()]] = True
        head[~is_said] = 0.0


def _rename(weights: Path) -> None:
    """Some weights get the names that published models have, and vLLM knows."""
    from safetensors.torch import load_file, save_file

    def published(name: str) -> str:
        name = re.sub(r"(vision_tower)\.(?=embeddings|encoder|p)", r"\1.vision_model.", name)
        return name.replace(".model.model.", ".model.")

    named = {published(name): weight for name, weight in load_file(weights).items()}
    save_file(named, weights, {"format": "pt"})


def _printable() -> list[int]:
    """Places of printable ASCII in the alphabet, where each of these letters is itself."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [letters.index(chr(code)) for code in range(33, 127)]


def _gemma3(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3Processor,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer.add_tokens(["\n" * count for count in range(1, 5)])  # vLLM looks for them by name
    text = Gemma3TextConfig(
        **_TEXT,
        num_hidden_layers=3,
        sliding_window=64,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        query_pre_attn_scalar=32,
    )
    config = Gemma3Config(
        text_config=text,
        vision_config=SiglipVisionConfig(
            **_EYES, num_hidden_layers=2, image_size=84, patch_size=14, vision_use_head=False
        ),
        mm_tokens_per_image=36,
        image_token_id=IMAGE,
        boi_token_index=FIRST,
        eoi_token_index=LAST,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
        dtype="float32",
    )
    sight = Gemma3ImageProcessorPil(size={"height": 84, "width": 84}, do_pan_and_scan=False)
    processor = Gemma3Processor(image_processor=sight, tokenizer=tokenizer, image_seq_length=36)
    return Gemma3ForConditionalGeneration(config), processor


def _idefics3(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3Processor,
        LlamaConfig,
    )
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    config = Idefics3Config(
        text_config=LlamaConfig(**_TEXT, num_hidden_layers=2),
        vision_config={**_EYES, "num_hidden_layers": 2, "image_size": 168, "patch_size": 14},
        image_token_id=IMAGE,
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        dtype="float32",
    )
    sight = Idefics3ImageProcessorPil(
        size={"longest_edge": 168}, max_image_size={"longest_edge": 168}, do_image_splitting=False
    )
    processor = Idefics3Processor(image_processor=sight, tokenizer=tokenizer, image_seq_len=36)
    return Idefics3ForConditionalGeneration(config), processor


def _qwen2_audio(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioEncoderConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        Qwen2Config,
        WhisperFeatureExtractor,
    )

    config = Qwen2AudioConfig(
        text_config=Qwen2Config(**_TEXT, num_hidden_layers=2),
        audio_config=Qwen2AudioEncoderConfig(
            d_model=64, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=128
        ),
        audio_token_index=AUDIO,
        dtype="float32",
    )
    ears = WhisperFeatureExtractor(feature_size=128)
    processor = Qwen2AudioProcessor(feature_extractor=ears, tokenizer=tokenizer)
    return Qwen2AudioForConditionalGeneration(config), processor


def _qwen2_5_vl(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
    )
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    ropes = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    config = Qwen2_5_VLConfig(
        text_config={**_TEXT, "num_hidden_layers": 2, "rope_parameters": ropes},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=12,
        vision_start_token_id=10,
        vision_end_token_id=11,
        tie_word_embeddings=False,
        dtype="float32",
    )
    size = {"shortest_edge": 28 * 28, "longest_edge": 280 * 280}
    sight = Qwen2VLImageProcessor(size=size)
    processor = Qwen2_5_VLProcessor(
        image_processor=sight, tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor(size=size)
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "idefics3": _idefics3,
    "qwen2_audio": _qwen2_audio,
    "qwen2_5_vl": _qwen2_5_vl,
    "gemma3": _gemma3,
}
PLACEHOLDERS = {
    "idefics3": "<image>",
    "qwen2_audio": "<|AUDIO|>",
    "gemma3": "<boi>",
    "qwen2_5_vl": "<|vision_start|><image><|vision_end|>",
}
"""What the chat template writes for a picture; vLLM puts one token for each patch there."""


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]))
