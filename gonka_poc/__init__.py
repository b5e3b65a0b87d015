"""Proof of compute for unmodified vLLM (V1 engine).

The public names, by what they are for:

- verify artifacts: `read_artifact_file`, `PoCClient.validate` (a server recomputes them), `validate_artifacts` (against
  vectors that you have), `StatTest` (the thresholds), `Verdict`, `ArtifactFile`, `decode_vector`, `encode_vector`
- a server: `Settings` (POC_* variables), and the parts that vLLM loads by name, `PoCMiddleware` and
  `PoCWorkerExtension`, with `PoCManagerV1` and `EmbeddingInjectionHook` behind them

Importing this package imports neither torch nor vLLM: the names in `__all__` are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gonka_poc.cli.artifact_file import ArtifactFile, read_artifact_file
    from gonka_poc.cli.client import PoCClient
    from gonka_poc.config import Settings
    from gonka_poc.data import StatTest, decode_vector, encode_vector
    from gonka_poc.manager import PoCManagerV1
    from gonka_poc.middleware import PoCMiddleware
    from gonka_poc.poc_model_runner import EmbeddingInjectionHook
    from gonka_poc.validation import Verdict, validate_artifacts
    from gonka_poc.version import __version__
    from gonka_poc.worker import PoCWorkerExtension

__all__ = [
    "ArtifactFile",
    "EmbeddingInjectionHook",
    "PoCClient",
    "PoCManagerV1",
    "PoCMiddleware",
    "PoCWorkerExtension",
    "Settings",
    "StatTest",
    "Verdict",
    "__version__",
    "decode_vector",
    "encode_vector",
    "read_artifact_file",
    "validate_artifacts",
]


def __getattr__(name: str) -> Any:
    """A public name from the module that defines it."""
    modules = {
        "ArtifactFile": "cli.artifact_file",
        "EmbeddingInjectionHook": "poc_model_runner",
        "PoCClient": "cli.client",
        "PoCManagerV1": "manager",
        "PoCMiddleware": "middleware",
        "PoCWorkerExtension": "worker",
        "Settings": "config",
        "StatTest": "data",
        "Verdict": "validation",
        "__version__": "version",
        "decode_vector": "data",
        "encode_vector": "data",
        "read_artifact_file": "cli.artifact_file",
        "validate_artifacts": "validation",
    }
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{modules[name]}"), name)


def __dir__() -> list[str]:
    """The public names, also before they are loaded."""
    return sorted({*globals(), *__all__})
