#!/usr/bin/env bash
# Packs Ray, without what a server does not need of it, into pieces of at most 40 MiB, for a GPU machine that has
# vLLM and Ray's own dependencies (click, filelock, jsonschema, msgpack, packaging, protobuf, pyyaml, requests) but no
# network. There:  cat PIECES/r* | xz -dc -T0 | tar xf - -C /tmp && export PYTHONPATH=/tmp/ray-site:$PYTHONPATH
# usage: pack_ray.sh [--version 2.60.0] [--python 3.12] [--out .carry-ray]
set -euo pipefail

version=2.60.0 python=3.12 out=.carry-ray
while (($# > 0)); do
    case $1 in
        --version) version=$2 ;;
        --python) python=$2 ;;
        --out) out=$2 ;;
        *)
            echo "usage: $0 [--version V] [--python 3.X] [--out DIR]" >&2
            exit 2
            ;;
    esac
    shift 2
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$python" --implementation cp \
    --platform manylinux2014_x86_64 -d "$work" "ray==$version"
python3 - "$work" <<'PY'
import pathlib
import sys
import zipfile

work = pathlib.Path(sys.argv[1])
(wheel,) = work.glob("ray-*.whl")
unneeded = ["jars", "rllib", "serve", "tune", "train", "data", "llm", "cpp", "dashboard/client"]
prefixes = tuple(f"ray/{name}/" for name in unneeded)
with zipfile.ZipFile(wheel) as archive:
    for entry in archive.infolist():
        if not entry.filename.startswith(prefixes):
            target = pathlib.Path(archive.extract(entry, work / "ray-site"))
            mode = entry.external_attr >> 16 & 0o777
            if mode and not entry.is_dir():
                target.chmod(mode)
PY
rm -f "$out"/r[0-9][0-9]
tar -C "$work" -cf - ray-site | xz -T0 -6 | split -b 40M -d - "$out/r"
ls -la "$out"
