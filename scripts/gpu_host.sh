# shellcheck shell=bash
# Sourced, never run: finds a Python for host_install.py, which does the installation on a GPU host.

unset CDPATH
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/common.sh
source "$ROOT/scripts/common.sh"
ensure_stdin

# roots_alone PATH: true if nobody but root can exchange the file, a link to it, or a folder above one of them. Only asked
# as root: others risk no more than their own. The thorough look, into what that Python loads, is host_trust.py's.
roots_alone() {
    local file=$1 place owner group mode links=0
    ((EUID == 0)) || return 0
    while ((links++ < 40)); do
        file=$(cd -- "$(dirname -- "$file")" && pwd -P)/${file##*/} || return 1
        place=$file
        while [[ -n $place ]]; do
            read -r owner group mode < <(stat -Lc '%u %g %a' -- "$place") || return 1
            # the sticky bit keeps what is in a folder from others
            if ((owner != 0)) || ((!(8#$mode & 8#1000) && (8#$mode & 8#002 || (group != 0 && 8#$mode & 8#020)))); then
                return 1
            fi
            [[ $place != / ]] || break
            place=${place%/*}
            place=${place:-/}
        done
        [[ -L $file ]] || return 0
        place=$(readlink -- "$file")
        [[ $place == /* ]] || place=${file%/*}/$place
        file=$place
    done
    return 1
}

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
        if [[ -n $name ]] && command -v -- "$name" >/dev/null && roots_alone "$(command -v -- "$name")" &&
            "$name" -I -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            exec "$name" -E -s -B "$ROOT/scripts/host_install.py" "$@"
        fi
    done
    err "no Python 3.10 or newer was found$( ((EUID != 0)) || printf ' that only root can change')"
    note "install python3.12 with its venv and pip, or name one with --python"
    exit 2
}
