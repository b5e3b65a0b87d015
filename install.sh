#!/usr/bin/env bash
# Sets up gonka_poc. Run it from a checkout; `bash install.sh --help` lists its options.
#
# With --cpu it asks no questions, needs no root and writes nothing outside this checkout (all of it is in .venv; `rm -rf
# .venv` takes it back). On a GPU host it finds out which GPUs there are and goes on as install_b300.sh or
# install_universal.sh; `--uninstall` takes that back.
#
# Variables:
#   TORCH_CPU_INDEX   where torch's CPU build is looked for if pip as configured does not find it
#                     (default: PyTorch's own CPU wheel index; for a mirror)
#   GONKA_POC_WHEEL   on a GPU host: a wheel of this very checkout, for a host that cannot build one (it needs
#                     setuptools 77 or newer, or an index to take it from)
# `sh install.sh` goes on in bash; the shell has read no further than this.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: bash install.sh [options]            on a GPU host, beside MLNode
       bash install.sh --cpu [options]      a try-out without a GPU

Without a GPU:

  --cpu           try it on a machine without a GPU: sets up .venv in this checkout (vLLM for CPU and gonka_poc;
                  about 4 GB, some minutes the first time), then runs the demo and exits with its status
  --setup-only    with --cpu: set up .venv, do not run the demo
  --model M       with --cpu: the demo's model, tiny (random weights; the default) or smollm2 (a trained one of 135
                  million weights, 93 MB more, which answers a question)
  --python P      with --cpu: the Python to use, 3.11 to 3.14, as a path or a name on PATH
                  (default: the first on PATH for which pip finds torch's CPU build)

Exit status: 0 done, 1 failed, 2 wrong usage; after the set-up, the demo's.

TEXT
    run_host_install install.sh --help
}

wrong_usage() {
    err "$1"
    note "bash install.sh --help lists the options"
    exit 2
}

main() {
    local here option
    here=$(dirname -- "${BASH_SOURCE[0]:-install.sh}")
    if [[ ! -r $here/scripts/gpu_host.sh ]]; then
        printf 'error: %s/scripts is missing; run install.sh from a checkout of the project\n' "$here" >&2
        exit 1
    fi
    # shellcheck source=scripts/gpu_host.sh
    source "$here/scripts/gpu_host.sh"

    for option in "$@"; do
        case $option in
        --cpu) install_cpu "$@" ;;
        --help | -h) usage ;;
        esac
    done
    run_host_install install.sh "$@"
}

install_cpu() {
    local setup_only="" python="" model=""
    while (($# > 0)); do
        case $1 in
        --cpu) ;;
        --setup-only) setup_only=yes ;;
        --python)
            (($# > 1)) && [[ -n $2 ]] || wrong_usage "--python needs a value"
            python=$2
            shift
            ;;
        --python=?*) python=${1#--python=} ;;
        --model)
            (($# > 1)) || wrong_usage "--model needs a value"
            model=$2
            shift
            ;;
        --model=*) model=${1#--model=} ;;
        --help | -h) usage ;;
        *) wrong_usage "unknown option with --cpu: $1" ;;
        esac
        shift
    done
    [[ -z $model || $model == tiny || $model == smollm2 ]] || wrong_usage "--model takes tiny or smollm2, not $model"
    # shellcheck source=scripts/cpu_venv.sh
    source "$ROOT/scripts/cpu_venv.sh"
    set_up_venv project "$python"
    if [[ -n $setup_only ]]; then
        say "ready; the demo: bash install.sh --cpu"
        exit 0
    fi
    say "demo: $VENV/bin/gonka-poc demo${model:+ --model $model}"
    export_engine_environment
    exec "$VENV/bin/gonka-poc" demo ${model:+--model "$model"}
}

# Last, so that a half-downloaded file does nothing.
main "$@"
