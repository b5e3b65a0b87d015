#!/usr/bin/env bash
# Sets up gonka_poc on a host with H100, H200 (SM 9.0) or A100 (SM 8.0) GPUs; --help tells the options.
# scripts/host_gpus.py says which vLLM it installs, and why.
# `sh install.sh` goes on in bash; the shell has read no further than this.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

# shellcheck source=scripts/gpu_host.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/gpu_host.sh"
run_host_install install_universal.sh "$@"
