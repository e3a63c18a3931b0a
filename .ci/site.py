# SPDX-License-Identifier: Apache-2.0
"""A hook of MkDocs (mkdocs.yml): the site has the folders of the repository.

So a link from docs/ to benchmarks/README.md is the same link here and on GitHub, and `mkdocs build
--strict` follows it.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

PAGES_AND_WHAT_THEY_LINK = (
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "docs/**/*",
    "benchmarks/README.md",
    "benchmarks/details/*.md",
    "benchmarks/**/results/**/*",
    "benchmarks/gpu/recorded/*",
    "csrc/*.md",
    "dashboards/*.json",
    "patches/**/*",
)


def on_files(files: Files, config: Any) -> Files:
    """Replace the files of ``docs_dir`` by those of the repository, under their own paths."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    found = {path for glob in PAGES_AND_WHAT_THEY_LINK for path in ROOT.glob(glob)}
    ours = [
        File(
            path.relative_to(ROOT).as_posix(),
            str(ROOT),
            config.site_dir,
            config.use_directory_urls,
        )
        for path in sorted(found)
        if path.is_file()
    ]
    return Files([*theme, *ours])
