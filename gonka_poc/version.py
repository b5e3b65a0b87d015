"""The version of this package."""

from importlib.metadata import PackageNotFoundError, version

UNINSTALLED = "0+source"  # run from a source tree that was never installed

try:
    __version__ = version("gonka-poc-vllm")
except PackageNotFoundError:
    __version__ = UNINSTALLED
