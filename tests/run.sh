#!/usr/bin/env bash
# Sets up .venv with the test tools and runs every check, also when an earlier one failed.
#   bash tests/run.sh                     what every change must pass
#   bash tests/run.sh --all               also the nightly tests, those that measure times, those on GPUs and those of tests/matrix
#   bash tests/run.sh -k validation -x    other arguments go to pytest
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

# ensure_installed PACKAGE WHAT COMMAND...: PACKAGE of Debian, unless one of the commands is there. The status page is
# tested in a browser, and the alerts in a Prometheus. Where one cannot be installed here, its tests fail and say so.
ensure_installed() {
    local package=$1 what=$2 name
    for name in "${@:3}"; do
        ! command -v "$name" >/dev/null || return 0
    done
    if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
        warn "no $package on PATH, and it takes root and apt-get to install it here"
        return 0
    fi
    export DEBIAN_FRONTEND=noninteractive
    if ! step "package lists" apt-get update; then
        return 0
    fi
    step "$package, for $what" apt-get install -y --no-install-recommends "$package" || true
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
    ensure_installed chromium "the test of the status page" chromium chromium-browser google-chrome
    ensure_installed prometheus "the test of the alerts" promtool
    export_engine_environment
    # Where it is set, each of some hundred Pythons that the tests start would compile again what has no byte code yet.
    unset PYTHONDONTWRITEBYTECODE
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
    # A worker takes a group of tests after another, in the order of tests/conftest.py: those of one server, or of a file.
    # More workers than cores, as a test waits for much of its time; each has up to 4 GB of a server's processes.
    local count=2 available
    available=$(awk '$1 == "MemAvailable:" { print $2 }' /proc/meminfo)
    ((available < 14000000)) || count=3
    ((available < 19000000)) || count=4
    local workers=(-n "$count" --dist loadgroup --no-loadscope-reorder)
    local not_by_default=(--ignore tests/gpu --ignore tests/test_matrix.py)
    if [[ $* == --all ]]; then
        local timed=()
        mapfile -t timed < <(grep -rlF --include='test_*.py' pytest.mark.timing tests)
        check "pytest, times" "$VENV/bin/python" -m pytest -m timing "${timed[@]}"
        check pytest "$VENV/bin/python" -m pytest -m "not timing" "${workers[@]}"
    elif (($# > 0)); then
        check pytest "$VENV/bin/python" -m pytest "$@"
    else
        check pytest "$VENV/bin/python" -m pytest -m "not timing and not nightly" "${workers[@]}" "${not_by_default[@]}"
    fi

    # No numbers here: the last count printed is pytest's own.
    for result in "${results[@]}"; do note "$result"; done
    exit "$failed"
}

main "$@"
