# SPDX-License-Identifier: Apache-2.0
"""python -m vllm_stateful.adapters.doctor FILE WORDS...

Examines what ``vllm serve WORDS`` would do with the plugin. Writes each finding to FILE as soon as
it is known, as one line with a JSON object.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from vllm_stateful.adapters.doctor.configuration import RefusedError
from vllm_stateful.adapters.doctor.examination import examine


def main() -> None:
    """Write all findings, and end without vLLM's own clean-up."""
    found, words = Path(sys.argv[1]), sys.argv[2:]
    sys.argv[:] = ["vllm-stateful", "doctor", *words]
    with found.open("a") as file:
        try:
            for finding in examine(words):
                file.write(json.dumps(asdict(finding)) + "\n")
                file.flush()
        except RefusedError as error:
            file.write(json.dumps({"refused": str(error)}) + "\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
