#!/usr/bin/env bash
# Sets up .venv with the test tools and runs every check, also when an earlier one failed. Arguments go to pytest:
#   bash tests/run.sh -k validation -x
set -euo pipefail

results=()
failed=0

check() {
    local name=$1
    shift
    say "$name"
    if "$@" </dev/null; then
        results+=("$name: passed")
    else
        results+=("$name: FAILED")
        failed=1
    fi
}

main() {
    local here result
    here=$(dirname -- "${BASH_SOURCE[0]}")
    unset CDPATH
    ROOT=$(cd -- "$here/.." && pwd -P)
    # shellcheck source=scripts/common.sh
    source "$ROOT/scripts/common.sh"
    # shellcheck source=scripts/cpu_venv.sh
    source "$ROOT/scripts/cpu_venv.sh"
    ensure_stdin
    set_up_venv tests
    export_engine_environment
    cd -- "$ROOT"
    PATH="$VENV/bin:$PATH"

    local scripts=(install.sh .ci/run) script
    while IFS= read -r script; do
        [[ $script == ./install.sh ]] || scripts+=("$script")
    done < <(find . \( -name '.?*' -o -name build \) -prune -o -name '*.sh' -type f -print | sort)

    check shellcheck "$VENV/bin/shellcheck" --external-sources --source-path="$ROOT" "${scripts[@]}"
    check "ruff check" "$VENV/bin/ruff" check .
    check "ruff format" "$VENV/bin/ruff" format --check .
    check mypy "$VENV/bin/mypy"
    check pytest "$VENV/bin/python" -m pytest "$@"

    # No numbers here: the last count printed is pytest's own.
    for result in "${results[@]}"; do note "$result"; done
    exit "$failed"
}

main "$@"
