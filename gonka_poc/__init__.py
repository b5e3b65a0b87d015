"""Proof of compute for unmodified vLLM (V1 engine).

Importing this package imports neither torch nor vLLM: the names in `__all__` are loaded when they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gonka_poc.config import Settings
    from gonka_poc.manager import PoCManagerV1
    from gonka_poc.middleware import PoCMiddleware
    from gonka_poc.poc_model_runner import EmbeddingInjectionHook
    from gonka_poc.version import __version__
    from gonka_poc.worker import PoCWorkerExtension

__all__ = ["EmbeddingInjectionHook", "PoCManagerV1", "PoCMiddleware", "PoCWorkerExtension", "Settings", "__version__"]


def __getattr__(name: str) -> Any:
    """A public name from the module that defines it."""
    modules = {
        "EmbeddingInjectionHook": "poc_model_runner",
        "PoCManagerV1": "manager",
        "PoCMiddleware": "middleware",
        "PoCWorkerExtension": "worker",
        "Settings": "config",
        "__version__": "version",
    }
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{modules[name]}"), name)
