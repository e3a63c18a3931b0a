# SPDX-License-Identifier: Apache-2.0
"""Where `make model` puts the models that the tests run."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
MODELS = ROOT / ".cache" / "models"
SMOLLM2 = MODELS / "smollm2-135m"
TINY = MODELS / "tiny-llama"
