#!/usr/bin/env bash
# A whole installation on a machine with a GPU and without a network: plan, install from a wheel folder into a Python that
# has vLLM, start MLNode's patched launcher on a model without weights, ask the server, take everything back to the byte.
# Prints a transcript and ends with PASS or FAIL. It writes into a temporary folder only.
#
# usage: install_host.sh --wheels DIR [--site DIR] [--python P] [--profile NAME] [--gpus NAME] [--cpu]
#   --wheels   a folder of scripts/bundle.sh for the Python below
#   --site     a folder of packages with vLLM (default: /tmp/site; without one: those of the Python below)
#   --python   has pip, and what --site lacks (default: python3)
#   --cpu      a tiny model, for a try with vLLM for CPU (then with --gpus universal)
set -euo pipefail
unset CDPATH PYTHONPATH PYTHONHOME

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
WHEELS="" SITE=/tmp/site BASE=python3 PROFILE=standard GPUS="" CPU=""
while (($# > 0)); do
    case $1 in
    --wheels) WHEELS=$(cd -- "$2" && pwd -P) ;;
    --site) SITE=$2 ;;
    --python) BASE=$2 ;;
    --profile) PROFILE=$2 ;;
    --gpus) GPUS=$2 ;;
    --cpu) CPU=yes && shift && continue ;;
    *) echo "unknown option: $1" >&2 && exit 2 ;;
    esac
    shift 2
done
[[ -n $WHEELS ]] || { echo "--wheels DIR is missing" >&2 && exit 2; }

WORK=$(mktemp -d)
HOST=$WORK/host
PYTHON=$HOST/python/bin/python
RUNNER=$HOST/mlnode/packages/api/src/api/inference/vllm/runner.py
MODEL=$WORK/model
PORT=$("$BASE" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
URL=http://127.0.0.1:$PORT
LAUNCHER=""

export PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1
export HOME=$WORK XDG_CACHE_HOME=$WORK/cache VLLM_CACHE_ROOT=$WORK/cache/vllm POC_OUTBOX_PATH=$WORK/outbox.sqlite3

show() {
    printf '\n$ %s\n' "$*"
    "$@"
}

fail() {
    printf '\nFAIL after %d s: %s\n' "$SECONDS" "$1"
    [[ ! -s $WORK/server.log ]] || { echo "the end of the server's log:" && tail -n 40 "$WORK/server.log"; }
    exit 1
}

# The server's process is in server.pid; its workers are in its group.
end_server() {
    local pid group
    if [[ -s $WORK/server.pid ]]; then
        pid=$(<"$WORK/server.pid")
        if kill -TERM "$pid" 2>/dev/null; then
            group=$(ps -o pgid= -p "$pid" | tr -d ' ') || group=""
            for _ in $(seq 60); do
                kill -0 "$pid" 2>/dev/null || break
                sleep 0.5
            done
            [[ -z $group || $group == "$(ps -o pgid= -p $$ | tr -d ' ')" ]] || kill -KILL -- "-$group" 2>/dev/null || true
        fi
        rm -f "$WORK/server.pid"
    fi
    [[ -z $LAUNCHER ]] || wait "$LAUNCHER" 2>/dev/null || true
    LAUNCHER=""
}
trap 'end_server; rm -rf -- "$WORK"' EXIT

# Names, modes and contents of everything in the host's folder.
tree_hash() {
    (cd -- "$HOST" && find . -printf '%p %M %l\n' -type f -exec sha256sum {} + | LC_ALL=C sort | sha256sum | cut -d ' ' -f 1)
}

make_host() {
    local purelib
    mkdir -p "$(dirname "$RUNNER")" "$MODEL"
    cp "$ROOT/tests/data/runners/module_2026.py" "$RUNNER"
    "$BASE" -m venv --without-pip "$HOST/python"
    purelib=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    {
        [[ ! -d $SITE ]] || echo "$SITE"
        "$BASE" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'
    } >"$purelib/seen.pth"
    cp "$ROOT"/tests/data/models/qwen3/* "$MODEL/"
    [[ -n $CPU ]] || cat >"$MODEL/config.json" <<'JSON'
{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6,
 "rope_theta": 1000000, "attention_bias": false, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
 "max_position_embeddings": 40960, "vocab_size": 151936, "head_dim": 128, "hidden_size": 1024,
 "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
 "tie_word_embeddings": true}
JSON
    rm -f "$MODEL"/*.safetensors
}

install() { VLLM_PYTHON_PATH=$PYTHON show bash "$ROOT/install.sh" --python "$PYTHON" --mlnode-dir "$HOST/mlnode" ${GPUS:+--gpus "$GPUS"} "$@"; }

start_server() {
    local dtype=bfloat16 more='"--gpu-memory-utilization", "0.6"'
    if [[ -n $CPU ]]; then
        dtype=float32 more='"--max-num-seqs", "32"'
        export VLLM_CPU_KVCACHE_SPACE=1
    else
        export VLLM_USE_FLASHINFER_SAMPLER=0
    fi
    cat >"$WORK/launch.py" <<PY
import sys
sys.path.insert(0, "$(dirname "$RUNNER")")
import runner
runner.GPU_COUNT = 1
made = runner.VLLMRunner("$MODEL", "$dtype", ["--load-format", "dummy", "--max-model-len", "1024", $more])
made.start()
open("$WORK/server.pid", "w").write(str(made.processes[0].pid))
made.processes[0].wait()
PY
    printf '\n$ MLNode starts vLLM: VLLMRunner(MODEL, "%s", ["--load-format", "dummy", ...]).start()\n' "$dtype"
    INFERENCE_PORT=$((PORT - 1)) VLLM_PYTHON_PATH=$PYTHON MLNODE_VLLM_MODULE=gonka_poc.entrypoint.api_router \
        "$BASE" "$WORK/launch.py" >"$WORK/server.log" 2>&1 &
    LAUNCHER=$!
    local begin=$SECONDS
    until curl --silent --fail --output /dev/null --max-time 2 "$URL/health"; do
        kill -0 "$LAUNCHER" 2>/dev/null || fail "the launcher ended"
        ((SECONDS - begin < 150)) || fail "the server does not answer after 150 s"
        sleep 1
    done
    echo "answers after $((SECONDS - begin)) s; its options:"
    tr '\0' ' ' <"/proc/$(<"$WORK/server.pid")/cmdline" | sed 's/.* --max-model-len/  ... --max-model-len/'
    echo
    grep -E 'gonka_poc|PoC warmed up' "$WORK/server.log" | cut -c 1-300 | tail -n 5 || true
}

post() { show curl --silent --show-error --fail --max-time 120 "$URL$1" -H 'Content-Type: application/json' -d "$2" && echo; }

make_host
echo "== $("$BASE" --version), $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1 || echo 'no GPU')"
echo "== wheel folder: $(wc -l <"$WHEELS/SHA256SUMS") wheels"
before=$(tree_hash)
install --dry-run --wheels "$WHEELS" --keep-vllm --profile "$PROFILE" || fail "dry run"
[[ $(tree_hash) == "$before" ]] || fail "the dry run changed something"
install --yes --wheels "$WHEELS" --keep-vllm --profile "$PROFILE" || fail "installation"
install --status || fail "status"
start_server
show curl --silent --show-error --fail "$URL/api/v1/pow/versions" || fail "versions"
echo
WHO='"block_hash": "abc", "block_height": 1, "public_key": "key", "node_id": 0, "node_count": 1'
post /api/v1/pow/generate "{$WHO, \"params\": {\"model\": \"$MODEL\", \"seq_len\": 256, \"k_dim\": 12}, \"nonces\": [0, 1, 2], \"wait\": true}" ||
    fail "generate"
post /v1/completions "{\"model\": \"$MODEL\", \"prompt\": [1, 2, 3], \"max_tokens\": 4, \"temperature\": 0}" || fail "chat"
show "$HOST/python/bin/gonka-poc" doctor --live "$URL" || fail "doctor --live"
end_server
install --uninstall --yes || fail "uninstall"
[[ $(tree_hash) == "$before" ]] || fail "the host's folder is not as it was"
printf '\nPASS in %d s: the host'"'"'s folder is as it was, SHA-256 of its tree %s\n' "$SECONDS" "$before"
