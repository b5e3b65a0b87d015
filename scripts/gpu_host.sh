# shellcheck shell=bash
# Sourced, never run: finds a Python for host_install.py, which does the installation on a GPU host.

unset CDPATH
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/common.sh
source "$ROOT/scripts/common.sh"
ensure_stdin

# run_host_install SCRIPT ARGUMENT...: replaces this process by host_install.py. The Python that --python names may be the
# only one here, so it is tried first.
run_host_install() {
    local names=("${VLLM_PYTHON_PATH-}" python3.12 python3.13 python3.14 python3.11 python3.10 python3) name previous=""
    for name in "$@"; do
        [[ $previous != --python ]] || names=("$name" "${names[@]}")
        [[ $name != --python=* ]] || names=("${name#*=}" "${names[@]}")
        previous=$name
    done
    for name in "${names[@]}"; do
        if [[ -n $name ]] && command -v -- "$name" >/dev/null &&
            "$name" -I -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            exec "$name" -E -s -B "$ROOT/scripts/host_install.py" "$@"
        fi
    done
    err "no Python 3.10 or newer was found"
    note "install python3.12 with its venv and pip, or name one with --python"
    exit 2
}
