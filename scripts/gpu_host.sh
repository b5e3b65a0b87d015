# shellcheck shell=bash
# Sourced, never run: what install.sh, install_b300.sh and install_universal.sh share on a GPU host. The shell finds out
# which GPUs there are and which options were given; host_install.py does the steps.

unset CDPATH
ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/common.sh
source "$ROOT/scripts/common.sh"

gpu_usage() {
    cat <<'TEXT'
On a GPU host (each option also works with install_b300.sh and install_universal.sh):

  --yes              do not ask; needed where there is no terminal
  --dry-run          print every step, change nothing; needs no root
  --python P         the Python that MLNode starts vLLM with (default: $VLLM_PYTHON_PATH, then the one that runner.py
                     names, then python3.12 or newer on PATH; 3.10 and 3.11 only if named)
  --mlnode-dir DIR   MLNode's folder (default: /app, ./mlnode, ../mlnode, /opt/mlnode, /opt/gonka/mlnode)
  --profile NAME     standard (default), or hardened: no VLLM_ALLOW_INSECURE_SERIALIZATION, and CUDA graphs for chat
                     where the installed vLLM can skip the compiled forward
  --vllm-version V   install this vLLM (default: an installed one that is supported is kept, else the pinned one)
  --keep-vllm        insist on the installed vLLM; never install another
  --force            go on with GPUs that are not supported, or with a Python that the operating system manages; with
                     --uninstall: also take back what was edited since
  --uninstall        take everything back, as the journal recorded it
  --status           what is installed; exit status 0 in order, 3 not installed, 1 changed since
  --help             print this text

What it does not do: kill processes, delete caches, touch the driver or the CUDA toolkit, write outside that Python's
folder and MLNode's runner.py (pip's cache apart, and /var/lib/gonka-poc for the system's Python). It needs root only
to write there.

Exit status: 0 done or nothing to do, 1 failed and taken back, 2 refused before anything was changed, 3 see --status.
TEXT
}

refuse() {
    local line
    err "$1"
    for line in "${@:2}"; do note "$line"; done
    exit 2
}

# read_gpu_options ARGUMENT...: sets ARGS (as --option value), GPU_ACTION, GPU_FORCE and WANTED_PYTHON; ends the script
# where they are wrong or ask for help.
read_gpu_options() {
    ARGS=() GPU_ACTION=install GPU_FORCE="" WANTED_PYTHON=""
    local option value
    while (($# > 0)); do
        option=${1%%=*}
        case $option in
        --python | --mlnode-dir | --profile | --vllm-version)
            if [[ $1 == *=* ]]; then
                value=${1#*=}
            else
                value=${2-}
                (($# < 2)) || shift
            fi
            [[ -n $value && $value != --* ]] || refuse "$option needs a value"
            if [[ $option == --profile && $value != standard && $value != hardened ]]; then
                refuse "--profile $value: it is standard or hardened"
            fi
            [[ $option != --python ]] || WANTED_PYTHON=$value
            ARGS+=("$option" "$value")
            ;;
        --yes | --dry-run | --force | --keep-vllm | --uninstall | --status)
            [[ $1 != *=* ]] || refuse "$option takes no value"
            case $option in
            --force) GPU_FORCE=yes ;;
            --uninstall | --status) GPU_ACTION=${option#--} ;;
            esac
            ARGS+=("$option")
            ;;
        --help | -h)
            gpu_usage
            exit 0
            ;;
        *) refuse "unknown option: $1" "--help tells what there is" ;;
        esac
        shift
    done
}

# Sets GPU_GENERATION (b300, universal or other), GPU_TEXT ("8 x NVIDIA H200, SM 9.0") and GPU_DRIVER, or ends the script.
detect_gpus() {
    local try="to try it without a GPU: bash install.sh --cpu" output status=0 line
    command -v nvidia-smi >/dev/null ||
        refuse "nvidia-smi is not on PATH, so there is no NVIDIA driver here, or a container without access to one" \
            "install the NVIDIA driver, or start the container with its GPUs (--gpus all)" "$try"
    output=$(timeout 60 nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv,noheader 2>&1 </dev/null) ||
        status=$?
    if [[ $output == *"No devices were found"* ]] || { ((status == 0)) && [[ -z ${output//[[:space:]]/} ]]; }; then
        refuse "nvidia-smi finds no GPUs" \
            "are they visible to this machine or container (lspci | grep -i nvidia, NVIDIA_VISIBLE_DEVICES)?" "$try"
    fi
    if [[ $output == *"not a valid field"* ]]; then
        refuse "this nvidia-smi does not know compute_cap: its driver is older than any that vLLM can use" \
            "update the NVIDIA driver to 580 or newer" "$try"
    fi
    if ((status != 0)); then
        refuse "nvidia-smi failed (status $status): ${output%%$'\n'*}" \
            "it must work first: often the driver and its kernel module differ after an update, and a reboot helps" "$try"
    fi
    if [[ $output == *"[N/A]"* || $output == *"[Not Supported]"* || $output == *"[Unknown Error]"* ]]; then
        refuse "nvidia-smi does not tell the GPU's name, compute capability or driver: ${output%%$'\n'*}" \
            "a GPU that fell off the bus, a virtual GPU or a broken driver does that; look at nvidia-smi -q" "$try"
    fi

    local names=() caps=() driver="" generations=()
    while IFS= read -r line; do
        # name, compute capability, driver: from the right, since a name may hold a comma
        if ! [[ $line =~ ^(.+),\ *([0-9]+\.[0-9]+),\ *([0-9]+[0-9.]*)[[:space:]]*$ ]]; then
            refuse "nvidia-smi answered a line that is not understood: $line" \
                "the line should be: name, compute capability, driver version" "$try"
        fi
        names+=("${BASH_REMATCH[1]}") caps+=("${BASH_REMATCH[2]}") driver=${BASH_REMATCH[3]}
        generations+=("$(generation_of "${BASH_REMATCH[2]}")")
    done <<<"$output"

    local i
    for i in "${!names[@]}"; do
        if [[ ${generations[i]} != "${generations[0]}" ]]; then
            refuse "GPUs of different generations: ${names[0]} (SM ${caps[0]}) and ${names[i]} (SM ${caps[i]})" \
                "one server computes on one generation; hide the others from this machine or container" \
                "(docker: --gpus '\"device=0,1\"'), and install for each generation in its own container"
        fi
    done
    GPU_TEXT="${#names[@]} x ${names[0]}, SM ${caps[0]}" GPU_DRIVER=$driver
    case ${generations[0]} in
    10.x) GPU_GENERATION=b300 ;;
    9.0 | 8.0) GPU_GENERATION=universal ;;
    *) GPU_GENERATION=other ;;
    esac
}

# Releases of one generation run the same installer, and one server may span them: B200 (10.0) and B300 (10.3).
generation_of() {
    case $1 in
    10.*) printf '10.x' ;;
    *) printf '%s' "$1" ;;
    esac
}

# install_detected ARGUMENT...: install.sh's part, the hand-over to the script of this host's GPUs.
install_detected() {
    read_gpu_options "$@"
    if [[ $GPU_ACTION != install ]]; then
        run_host_install
    fi
    detect_gpus
    local script=install_$GPU_GENERATION.sh
    if [[ $GPU_GENERATION == other ]]; then
        other_gpus
        script=install_universal.sh
    fi
    say "$GPU_TEXT, driver $GPU_DRIVER: $script"
    exec bash "$ROOT/$script" "${ARGS[@]+"${ARGS[@]}"}"
}

# install_generation b300|universal OWN... -- ARGUMENT...: the part of the two scripts; OWN goes to host_install.py.
install_generation() {
    local generation=$1 own=()
    shift
    while [[ $1 != -- ]]; do
        own+=("$1")
        shift
    done
    shift
    ensure_stdin
    read_gpu_options "$@"
    if [[ $GPU_ACTION != install ]]; then
        run_host_install
    fi
    detect_gpus
    if [[ $GPU_GENERATION == other && $generation == universal ]]; then
        other_gpus
    elif [[ $GPU_GENERATION == other ]]; then
        refuse "install_$generation.sh does not take these GPUs: $GPU_TEXT" "bash install.sh says what can be done"
    elif [[ $GPU_GENERATION != "$generation" ]]; then
        refuse "install_$generation.sh does not take these GPUs: $GPU_TEXT" "run: bash install_$GPU_GENERATION.sh"
    fi
    run_host_install --gpus "$GPU_TEXT" --driver "$GPU_DRIVER" "${own[@]}"
}

other_gpus() {
    if [[ -z $GPU_FORCE ]]; then
        refuse "not supported: $GPU_TEXT; supported are B200 and B300 (SM 10.x), H100 and H200 (9.0), A100 (8.0)" \
            "proofs of other GPUs were not compared with these; to go on all the same: --force"
    fi
    warn "$GPU_TEXT is not supported; going on because of --force"
}

# run_host_install OWN...: replaces this process by host_install.py with $ARGS and OWN.
run_host_install() {
    local name
    for name in "$WANTED_PYTHON" "${VLLM_PYTHON_PATH-}" python3.12 python3.13 python3.14 python3.11 python3.10 python3; do
        if [[ -n $name ]] && command -v -- "$name" >/dev/null &&
            "$name" -I -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            exec "$name" -E -s -B "$ROOT/scripts/host_install.py" "${ARGS[@]+"${ARGS[@]}"}" "$@"
        fi
    done
    refuse "no Python 3.10 or newer was found" "install python3.12 with its venv and pip, or name one with --python"
}
