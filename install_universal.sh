#!/usr/bin/env bash
# Sets up gonka_poc on a host with H100, H200 (SM 9.0) or A100 (SM 8.0) GPUs. install.sh comes here by itself; --help
# tells the options.
#
# The pinned vLLM, and why:
#   0.25.1   The release on which this project's proofs were compared with the network's on an H200. Its default wheel is
#            built for CUDA 13 (torch 2.11): driver 580 or newer.
#   0.19.1   What an older driver is told to take: the last release whose default wheel is built for CUDA 12 (torch 2.10,
#            CUDA 12.8). Any driver from 525 on runs it, by CUDA's minor version compatibility, and it can already leave a
#            compiled model aside (0.15). It is named, not chosen silently: hosts should know which of the two they run.
set -euo pipefail

# shellcheck source=scripts/gpu_host.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/gpu_host.sh"

# Last, so that a half-downloaded file does nothing.
install_generation universal --pin 0.25.1 --older-driver-pin 0.19.1 -- "$@"
