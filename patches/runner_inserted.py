"""The lines that patch_runner.py puts before class VLLMRunner, from the first definition on.

They are text to it, and run where MLNode runs: its Python need not have gonka_poc, and may be older than ours. As they
stand here they are those of the profile `standard` with replays; others leave entries of the two tables out.
"""

_GONKA_POC_OPTIONS = {
    "--enforce-eager": "",
    "--middleware": "gonka_poc.middleware.PoCMiddleware",
    "--worker-extension-cls": "gonka_poc.worker.PoCWorkerExtension",
    "--logprobs-mode": "processed_logprobs",
    "--logits-processors": "gonka_poc.replay.processor:ReplayProcessor",
}
_GONKA_POC_ENV = {
    "VLLM_USE_V1": "1",
    "VLLM_USE_CUDA_GRAPHS": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}


def _gonka_poc_command(command):
    """`command` with each of these options once, at its end; what the operator chose otherwise stays."""
    import logging

    log = logging.getLogger("gonka_poc")
    options, has = dict(_GONKA_POC_OPTIONS), _gonka_poc_look(str(command[0]))
    if "gonka_poc" not in has:
        why = (
            "%s has no gonka_poc: vLLM starts without proof of compute (to take the patch out: patch_runner.py revert)"
        )
        log.warning(why, command[0])
        return command
    compiling = [str(word) for word in command if str(word).replace("_", "-").startswith(_GONKA_POC_COMPILING)]
    if "--enforce-eager" in options and compiling and "skip_compiled" in has:
        log.warning("%s is given: vLLM starts without --enforce-eager, proof skips its compiled model", compiling[0])
        del options["--enforce-eager"]
    words, processors = _gonka_poc_replay(list(command), options, has, log)
    kept, names = [], set()
    while words:
        name, equals, value = str(words[0]).partition("=")
        name = name.replace("_", "-")
        own_value, length = options.get(name), 1
        if own_value and not equals and len(words) > 1 and not str(words[1]).startswith("--"):
            value, length = words[1], 2
        if value != own_value:
            kept += words[:length]
            names.add(name)
        del words[:length]
    for name, value in options.items():
        replaced = name in names or "--no-" + name[2:] in names
        if name == "--middleware" or not replaced:  # the only one of which vLLM takes several
            kept += [name, value] if value else [name]
    return kept + processors + _gonka_poc_batch(names)


_GONKA_POC_COMPILING = ("--compilation-config", "--optimization-level", "-cc", "-O")


# a file may bring any of the others
_GONKA_POC_NO_REPLAY = ("-sc", "--runner", "--convert", "--config", "--enable-trace-replay")


def _gonka_poc_replay(words, options, has, log):
    """`words` without --logits-processors, and those with ours behind them, for replays. Where these cannot be, `words`
    stay, and `options` loses what is theirs."""
    import os

    name, mode = "--logits-processors", "--logprobs-mode"
    ours = options.pop(name, None)
    if ours is None:
        return words, []
    names = [str(word).partition("=")[0].replace("_", "-") for word in words]
    why = "" if "replay" in has else "its gonka_poc has none"
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0") not in ("", "0"):
        why = "VLLM_USE_V2_MODEL_RUNNER is set"
    for index, option in enumerate(names):
        if option.startswith("--spec") or option in _GONKA_POC_NO_REPLAY:
            why = option + " is given"
        elif option == mode:
            value = str(words[index]).partition("=")[2] or "".join(map(str, words[index + 1 : index + 2]))
            if not value.endswith("_logprobs"):
                why = mode + " " + value + " is given"
    if why:
        log.warning("vLLM starts without replays of chats: %s", why)
        options.pop(mode, None)
        return words, []
    kept, values, takes = [], [], False
    for option, word in zip(names, words):  # noqa: B905 (Python 3.9)
        value = str(word).partition("=")[2]
        if option == name:  # vLLM takes the last of several, with all its values
            values, takes = [value] if value else [], not value
        elif takes and not str(word).startswith("-"):
            values.append(word)
        else:
            kept.append(word)
            takes = False
    return kept, [name] + [value for value in values if value != ours] + [ours]


def _gonka_poc_environment(command):
    """The variables for `command`, as it was made above: none without proof, each with the option that it goes with."""
    if _GONKA_POC_OPTIONS["--middleware"] not in command:
        return {}
    needed = {"VLLM_USE_CUDA_GRAPHS": "--enforce-eager"}
    needed["VLLM_USE_V2_MODEL_RUNNER"] = _GONKA_POC_OPTIONS.get("--logits-processors", "")
    return {name: value for name, value in _GONKA_POC_ENV.items() if name not in needed or needed[name] in command}


def _gonka_poc_look(python):
    """The names of gonka_poc, its replay and `skip_compiled` that vLLM's Python has; nothing is imported."""
    import subprocess

    code = (
        "import importlib.util as u, os\n"
        "def read(package, file):\n"
        "    spec = u.find_spec(package)\n"
        "    paths = [os.path.join(f, file) for f in spec and spec.submodule_search_locations or ()]\n"
        "    return ''.join(open(p, encoding='utf-8').read() for p in paths if os.path.isfile(p))\n"
        "print('gonka_poc' if 'PoCMiddleware' in read('gonka_poc', 'middleware.py') else '')\n"
        "print('replay' if 'ReplayProcessor' in read('gonka_poc', 'replay/processor.py') else '')\n"
        "print('skip_compiled' if 'skip_compiled' in read('vllm', 'forward_context.py') else '')\n"
    )
    try:
        return subprocess.check_output([python, "-c", code], stderr=subprocess.DEVNULL, timeout=60).decode().split()
    except (OSError, ValueError, subprocess.SubprocessError):
        return ["gonka_poc"]  # it does not run: vLLM will say why


def _gonka_poc_batch(names):
    """The option for batches of 32 sequences of 1024 tokens, where no other speaks of it and the GPUs have 70 GiB."""
    import shutil
    import subprocess

    others = {"--config", "--no-enable-chunked-prefill", "--runner", "--convert", "--nnodes", "-n"}
    if any(name.startswith("--max-num-b") for name in names) or others & names or not shutil.which("nvidia-smi"):
        return []
    ask = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        sizes = [int(mib) for mib in subprocess.check_output(ask, timeout=60).split()]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    return ["--max-num-batched-tokens", "32768"] if min(sizes, default=0) >= 70 * 1024 else []
