# SPDX-License-Identifier: Apache-2.0
"""Let a checkout on the Python path be found as a plugin, where nothing can be installed.

    python -m benchmarks.gpu.as_installed FOLDER

writes what pyproject.toml names for others to call as a distribution's metadata; FOLDER goes on the
path.
"""

from __future__ import annotations

import configparser
import sys
import tomllib
from pathlib import Path

from vllm_stateful import __version__ as version

ROOT = Path(__file__).parents[2]


def write_metadata(folder: Path) -> Path:
    """The folder of the metadata, as `importlib.metadata` looks for it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name = project["name"]
    made = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    made.mkdir(parents=True, exist_ok=True)
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = configparser.ConfigParser(delimiters=("=",))
    groups.read_dict({**project["entry-points"], "console_scripts": project["scripts"]})
    with (made / "entry_points.txt").open("w") as file:
        groups.write(file)
    return made


if __name__ == "__main__":
    print(write_metadata(Path(sys.argv[1])))
