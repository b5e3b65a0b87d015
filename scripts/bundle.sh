#!/usr/bin/env bash
# Makes a folder of wheels for hosts without an index: gonka_poc of this checkout, what it requires and, with --vllm, vLLM.
# `bash install.sh --wheels DIR` installs from it and from nowhere else.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: bash scripts/bundle.sh --out DIR [options]

  --out DIR      the folder to make; it must not be there yet, or be empty
  --python P     the Python that downloads, of the same minor version as the host's (default: python3.12)
  --vllm V       vLLM and what it requires too (several GB); without it for hosts that keep theirs (--keep-vllm)
  --glibc V      the oldest glibc that the wheels may ask for is at most this (default: 2.35, Ubuntu 22.04)

The wheels are for Linux on x86_64, whatever runs this. SHA256SUMS in the folder is what install.sh checks.
TEXT
}

main() {
    local out="" python=python3.12 vllm="" glibc=2.35 minor platforms=(linux_x86_64 manylinux1_x86_64 manylinux2010_x86_64 manylinux2014_x86_64)
    while (($# > 0)); do
        case $1 in
        --help | -h) usage && exit 0 ;;
        --out | --python | --vllm | --glibc)
            (($# > 1)) && [[ -n $2 ]] || wrong_usage "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift
            ;;
        *) wrong_usage "unknown option: $1" ;;
        esac
        shift
    done
    [[ -n $out ]] || wrong_usage "--out DIR is missing"
    [[ $glibc =~ ^2\.[0-9]+$ ]] || wrong_usage "--glibc $glibc: it is a version such as 2.35"
    [[ ! -e $out || (-d $out && -z $(ls -A -- "$out")) ]] || die "$out is there already; name a folder that is not"
    command -v -- "$python" >/dev/null || die "$python was not found; name a Python of the host's version: --python"
    "$python" -m pip --version >/dev/null 2>&1 || die "$python has no pip"
    for ((minor = 5; minor <= ${glibc#2.}; minor++)); do platforms+=("manylinux_2_${minor}_x86_64"); done

    mkdir -p -- "$out"
    work=$(mktemp -d)
    trap 'rm -rf -- "$work"' EXIT
    say "gonka_poc of $ROOT"
    "$python" -B - "$ROOT/scripts" "$work" "$out" <<'PY' || exit 1
import shutil, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from host_common import InstallError
from host_options import Options
from host_steps import build_wheel
from host_target import Host, Target

try:
    shutil.copy(build_wheel(Host(Options(), Target(sys.executable).look(), Path(), None), Path(sys.argv[2])), sys.argv[3])
except InstallError as error:
    sys.exit(f"error: {error}")
PY
    local wheel=("$out"/gonka_poc*.whl)
    say "what it requires${vllm:+, and vLLM $vllm}"
    "$python" -m pip download --quiet --dest "$out" --only-binary :all: --implementation cp \
        --python-version "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" \
        "${platforms[@]/#/--platform=}" "${wheel[0]}" ${vllm:+"vllm==$vllm"}
    (cd -- "$out" && sha256sum -- *.whl >SHA256SUMS)
    say "$(wc -l <"$out/SHA256SUMS") wheels, $(du -sm -- "$out" | cut -f 1) MiB, in $out"
    [[ -n $vllm ]] || set -- --keep-vllm
    note "on the host: bash install.sh --wheels DIR $*"
}

wrong_usage() {
    err "$1"
    note "bash scripts/bundle.sh --help lists the options"
    exit 2
}

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/common.sh
source "$ROOT/scripts/common.sh"
main "$@"
