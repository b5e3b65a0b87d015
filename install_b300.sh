#!/usr/bin/env bash
# Sets up gonka_poc on a host with B200 or B300 GPUs (SM 10.0 and 10.3); --help tells the options. scripts/host_gpus.py
# says which vLLM it installs, and why.
# `sh install.sh` goes on in bash; the shell has read no further than this.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

# shellcheck source=scripts/gpu_host.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/gpu_host.sh"
run_host_install install_b300.sh "$@"
