#!/usr/bin/env bash
# Sets up gonka_poc on a host with B200 or B300 GPUs (SM 10.0 and 10.3). install.sh comes here by itself; --help tells
# the options.
#
# The pinned vLLM, and why:
#   0.32.0   The wheel of this version that package indexes offer is built for CUDA 13 (torch 2.13), so it needs a driver
#            580 or newer. It is the release that this project's own end-to-end tests run on (its CPU build), and CUDA 13
#            builds carry kernels for the whole 10.x family.
#   not older than 0.20.0: until then the default wheel is built for CUDA 12 and has no code for SM 10.3, so there is
#            none to fall back to where the driver is older.
set -euo pipefail

# shellcheck source=scripts/gpu_host.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/gpu_host.sh"

# Last, so that a half-downloaded file does nothing.
install_generation b300 --pin 0.32.0 --oldest 0.20.0 --oldest-why "the first whose default wheel is for CUDA 13" -- "$@"
