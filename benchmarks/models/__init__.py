"""Models made on this machine: nothing here asks a model hub for anything."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "models"
TOOLS_TEMPLATE = Path(__file__).with_name("smollm2_tools.jinja")


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `path` only when the block ends well.

    Two processes may build the same model at once: the one that ends last throws its copy away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield scratch
        scratch.chmod(0o755)
        try:
            os.rename(scratch, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
