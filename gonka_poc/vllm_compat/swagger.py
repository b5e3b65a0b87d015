"""The files of Swagger UI that vLLM's package has, for its own pages without internet."""

from __future__ import annotations

import importlib.util
from pathlib import Path

# no source, so vllm_contract does not have it; without these files only the page is missing, and says so (0.14 to 0.33
# have them)
FOLDER = "entrypoints/serve/instrumentator/static"


def swagger_file(name: str) -> Path | None:
    """The path of a file of Swagger UI; None where this vLLM has none. vLLM is not imported for it."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / FOLDER / name
    return file if file.is_file() else None
