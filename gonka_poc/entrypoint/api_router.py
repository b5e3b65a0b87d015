"""vLLM's OpenAI server with proof of compute, under the name that published MLNode images start.

MLNODE_VLLM_MODULE=gonka_poc.entrypoint.api_router
python -m gonka_poc.entrypoint.api_router --model MODEL [any option of vLLM's server]
"""

from __future__ import annotations

import sys

from gonka_poc import serve


def main() -> None:
    """Run `gonka_poc.serve --enable-poc` with the same arguments."""
    if serve.ENABLE not in sys.argv:
        sys.argv.append(serve.ENABLE)
    serve.main()


if __name__ == "__main__":
    main()
