"""All contact with vLLM's private names: one package, so that a new vLLM release means one folder.

Features are asked for, not compared by version; each comment names the first release that has the feature, or the
last. Every name used here stands in vllm_contract.py, against which a release is judged (`gonka-poc doctor --vllm`);
0.14.0 to 0.33.0 have them. vLLM is imported inside functions, so that the package can be imported without it.

The API process and the tools import from here, without torch; the workers import `gonka_poc.vllm_compat.worker`.
"""

from gonka_poc.vllm_compat.api import ApiView, OfflineEngine, address_of
from gonka_poc.vllm_compat.release import (
    API_SERVER_MODULE,
    BATCH_INVARIANT,
    INSECURE_SERIALIZATION,
    MIDDLEWARE,
    SUPPORTED,
    WORKER_EXTENSION,
    can_skip_compiled,
    found_version,
    installed_version,
    is_cpu_build,
)
from gonka_poc.vllm_compat.replay import (
    EXTRA_FIELD,
    LOGPROBS_MODES,
    REPLAY_IDS,
    REPLAY_KEY,
    REPLAY_MODE,
    REPLAY_PREFIX,
    REPLAY_SIGNATURE,
    RETURN_IDS_FIELD,
    TOKEN_IDS_FIELD,
    V1_PROCESSOR,
    V2_PROCESSOR,
    LogprobsMode,
    ReplayServer,
    has_trace_replay,
)
from gonka_poc.vllm_compat.swagger import swagger_file

__all__ = [
    "API_SERVER_MODULE",
    "BATCH_INVARIANT",
    "EXTRA_FIELD",
    "INSECURE_SERIALIZATION",
    "LOGPROBS_MODES",
    "MIDDLEWARE",
    "REPLAY_IDS",
    "REPLAY_KEY",
    "REPLAY_MODE",
    "REPLAY_PREFIX",
    "REPLAY_SIGNATURE",
    "RETURN_IDS_FIELD",
    "SUPPORTED",
    "TOKEN_IDS_FIELD",
    "V1_PROCESSOR",
    "V2_PROCESSOR",
    "WORKER_EXTENSION",
    "ApiView",
    "LogprobsMode",
    "OfflineEngine",
    "ReplayServer",
    "address_of",
    "can_skip_compiled",
    "found_version",
    "has_trace_replay",
    "installed_version",
    "is_cpu_build",
    "swagger_file",
]
