"""The names of vLLM that this package relies on, and a check of a release against them.

`CONTRACT` is the one list. vLLM's source is parsed, never imported or run. `gonka-poc doctor` checks the installed
vLLM, `gonka-poc doctor --vllm` a source tree, a package folder or a wheel. vllm_compat is what uses these names.
"""

from __future__ import annotations

import ast
import contextlib
import fnmatch
import platform
import re
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from packaging.version import InvalidVersion, Version

from gonka_poc.errors import ToolError
from gonka_poc.vllm_compat import BATCH_INVARIANT, INSECURE_SERIALIZATION

Presence = Literal["there", "optional", "unsure", "gone", "parameter missing", "newly required"]
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Name:
    """A name of vLLM that this package uses.

    `name` is a function, a class or `Class.member` (a method, a field, an attribute that a method assigns to self);
    `variable.attribute`, assigned in the file; `--option`; `/route` (POST); an environment variable, `VLLM_...`; or
    `__main__`, where the file is run. A name that is called has parentheses with the parameters that we pass; all its
    other parameters must have defaults.
    `files`: patterns of the files of which one defines it; `*` also matches folders.
    `first`, `last`: the range of releases that have it, where not all supported ones do.
    """

    name: str
    files: str
    first: str = ""
    last: str = ""

    @property
    def dotted(self) -> str:
        """The name without the parameters."""
        return self.name.partition("(")[0]

    @property
    def is_call(self) -> bool:
        """True if we call it."""
        return "(" in self.name

    @property
    def parameters(self) -> list[str]:
        """The parameters that we pass."""
        return re.findall(r"\w+", self.name.partition("(")[2])

    def may_be_absent(self, release: str) -> bool:
        """True if `release` is known to be outside the range."""
        known = known_release(release)
        return known is not None and (
            (bool(self.first) and known.release[:2] < Version(self.first).release)
            or (bool(self.last) and known.release[:2] > Version(self.last).release)
        )


@dataclass(frozen=True)
class Finding:
    """The presence of one name or parameter in a release; `where` gives the file or the reason."""

    name: str
    presence: Presence
    where: str

    @property
    def is_good(self) -> bool:
        """True unless vllm_compat would fail with this release."""
        return self.presence in ("there", "optional", "unsure")


def known_release(text: str) -> Version | None:
    """The release in a version text; None for "", "0.33.0-custom" and "0.1.dev" (a checkout without tags)."""
    with contextlib.suppress(InvalidVersion):
        version = Version(text)
        return None if version.is_devrelease and version.release == (0, 1) else version
    return None


def _names(files: str, *names: str, first: str = "", last: str = "") -> Iterator[Name]:
    """Names of the same files. `Class: a b(c, d)` stands for `Class.a` and `Class.b(c, d)`."""
    for text in names:
        owner, _, members = text.rpartition(": ")
        for name in re.findall(r"[^\s(]+(?:\([^)]*\))?", members):
            yield Name(f"{owner}.{name}" if owner else name, files, first, last)


ATTENTION = "attention/layer.py model_executor/layers/attention/attention.py"  # the first until 0.15
MLA_ATTENTION = "attention/layer.py model_executor/layers/attention/mla_attention.py"
FUSED_MOE = "model_executor/layers/fused_moe/config.py"
LINEAR = "model_executor/layers/linear.py"
PARALLEL = "distributed/parallel_state.py"
BACKEND = "v1/attention/backend.py"
PROCESSORS = "v1/sample/logits_processor/interface.py"
V2_PROCESSORS = "v1/worker/gpu/sample/logits_processor/interface.py"
QWEN = "model_executor/models/qwen*.py"  # one model stands for all

CONTRACT = (
    # the server, its options, its environment and the routes that wait for rounds
    *_names("entrypoints/openai/api_server.py", "__main__"),
    *_names("entrypoints/*cli_args.py", "FrontendArgs.middleware --api-server-count -asc --config"),
    *_names("envs.py", f"{INSECURE_SERIALIZATION} VLLM_ENABLE_V1_MULTIPROCESSING VLLM_CPU_KVCACHE_SPACE"),
    *_names("envs.py", "VLLM_SERVER_DEV_MODE"),
    *_names("envs.py", BATCH_INVARIANT, first="0.25"),  # read elsewhere before
    *_names("entrypoints/*.py", "/v1/chat/completions /v1/completions /v1/responses /v1/messages"),
    *_names("entrypoints/*.py", "/invocations /inference/v1/generate"),
    *_names("entrypoints/*.py", "/v1/chat/completions/batch", first="0.19"),
    *_names("entrypoints/*.py", "/cohere/v2/chat", first="0.27"),
    *_names("entrypoints/*.py", "/v1/audio/transcriptions /v1/audio/translations"),
    *_names("entrypoints/*.py", "/generative_scoring", first="0.25"),
    *_names("entrypoints/*.py", "/v1/systemone", first="0.32"),
    # the API process
    *_names("entrypoints/*.py", "state: args engine_client vllm_config openai_serving_models"),
    *_names("entrypoints/openai/*.py", "OpenAIServingModels.base_model_paths BaseModelPath.name"),
    *_names("v1/engine/async_llm.py", "AsyncLLM: collective_rpc(method, args) vllm_config output_processor errored"),
    *_names("v1/engine/async_llm.py", "AsyncLLM: abort(request_id, internal) is_sleeping() is_paused()"),
    *_names("v1/engine/output_processor.py", "OutputProcessor: has_unfinished_requests() request_states"),
    *_names("v1/engine/output_processor.py", "OutputProcessor.parent_requests RequestState.detokenizer"),
    *_names("v1/metrics/loggers.py", "PrometheusStatLogger.gauge_engine_sleep_state"),
    *_names("utils/import_utils.py", "resolve_obj_by_qualname(qualname)"),
    # the configuration
    *_names("config/vllm.py", "VllmConfig: model_config cache_config parallel_config scheduler_config lora_config"),
    *_names("config/vllm.py", "VllmConfig.compilation_config"),
    *_names("config/model.py", "ModelConfig: model dtype max_model_len enforce_eager uses_mrope get_vocab_size()"),
    *_names("config/model.py", "ModelConfig: get_hidden_size() get_total_num_hidden_layers() enable_sleep_mode"),
    *_names("config/model.py", "ModelConfig.hf_config"),
    *_names("config/model.py", "ModelConfig.uses_xdrope_dim", last="0.29"),
    *_names("config/model.py", "ModelConfig.mrope_num_dims", first="0.30"),
    *_names("config/scheduler.py", "SchedulerConfig: max_num_batched_tokens max_num_seqs"),
    *_names("config/parallel.py", "ParallelConfig: worker_extension_cls data_parallel_size _api_process_count"),
    *_names("config/parallel.py", "ParallelConfig: decode_context_parallel_size prefill_context_parallel_size"),
    *_names("config/cache.py", "CacheConfig: cache_dtype kv_sharing_fast_prefill"),
    *_names("config/cache.py", "CacheConfig.calculate_kv_scales", last="0.27"),
    *_names("config/cache.py", "CacheConfig.use_replayssm", first="0.27"),
    *_names("config/compilation.py", "CompilationConfig.static_forward_context"),
    # a worker and its two model runners
    *_names("v1/worker/worker_base.py", "WorkerWrapperBase.worker", "WorkerBase: vllm_config model_runner rank"),
    *_names(
        "v1/worker/gpu_model_runner.py", "GPUModelRunner: device get_model() model attn_groups prepare_inputs_event"
    ),
    *_names("v1/worker/gpu/model_runner.py", "GPUModelRunner: device get_model() model attn_groups"),
    *_names("device_allocator/cumem.py", "CuMemAllocator", "CuMemAllocator: instance pointer_to_data"),
    *_names("device_allocator/*.py", "AllocationData.cpu_backup_tensor"),
    *_names("v1/worker/gpu_worker.py", "Worker._sleep_saved_buffers"),
    # other ranks
    *_names(PARALLEL, "get_pp_group() get_tp_group() get_world_group() cleanup_dist_env_and_memory()"),
    *_names(PARALLEL, "GroupCoordinator: is_first_rank is_last_rank rank_in_group world_size cpu_group"),
    *_names(PARALLEL, "GroupCoordinator: recv_tensor_dict(all_gather_group)"),
    *_names(PARALLEL, "GroupCoordinator: send_tensor_dict(tensor_dict, all_gather_group)"),
    *_names("sequence.py", "IntermediateTensors(tensors) IntermediateTensors.tensors"),
    # the model
    *_names("model_executor/models/utils.py", "PPMissingLayer"),
    *_names(QWEN, "Qwen2Model: start_layer end_layer", "Qwen3ForCausalLM.compute_logits(hidden_states)"),
    *_names(QWEN, "Qwen3ForCausalLM.forward(input_ids, positions, intermediate_tensors, inputs_embeds)"),
    *_names("model_executor/models/interfaces.py", "SupportsMultiModal.get_language_model()"),
    *_names("model_executor/models/gemma*.py", "self.per_layer_embeddings"),
    # the forward and its attention
    *_names("forward_context.py", "set_forward_context(attn_metadata, vllm_config, num_tokens)"),
    *_names("forward_context.py", "set_forward_context(slot_mapping, skip_compiled)", first="0.15"),
    *_names(
        BACKEND,
        "CommonAttentionMetadata(query_start_loc, query_start_loc_cpu, seq_lens, num_reqs, num_actual_tokens, "
        "max_query_len, max_seq_len, block_table_tensor, slot_mapping, causal)",
        "AttentionMetadataBuilder: build(common_prefix_len, common_attn_metadata) kv_cache_spec",
    ),
    *_names(BACKEND, "CommonAttentionMetadata(is_prefilling)", first="0.19"),
    *_names(BACKEND, "CommonAttentionMetadata(positions, seq_lens_cpu_upper_bound)", first="0.20"),
    *_names(BACKEND, "CommonAttentionMetadata(_seq_lens_cpu, _num_computed_tokens_cpu)", last="0.29"),
    *_names(
        BACKEND,
        "AttentionBackend.get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str)",
        last="0.28",
    ),
    *_names("v1/worker/utils.py", "AttentionGroup: get_metadata_builder(ubatch_id) layer_names backend kv_cache_spec"),
    *_names(BACKEND, "AttentionBackend.get_name()"),
    *_names("v1/kv_cache_interface.py", "KVCacheSpec: block_size page_size_bytes"),
    *_names("v1/kv_cache_interface.py", "AttentionSpec: num_kv_heads head_size real_page_size_bytes"),
    *_names("v1/kv_cache_interface.py", "KVCacheSpec.get_block_stride_alignment()", first="0.32"),
    # what torch may compile
    *_names("model_executor/custom_op.py", "CustomOp: forward_native() forward_cuda() forward_cpu() _forward_method"),
    *_names("model_executor/layers/layernorm.py", "RMSNorm: variance_epsilon variance_size_override has_weight"),
    *_names("model_executor/layers/activation.py", "SiluAndMul"),
    *_names(
        "model_executor/layers/rotary_embedding/base.py",
        "RotaryEmbedding.forward_cuda(positions, query, key)",
        "RotaryEmbeddingBase: head_size is_neox_style cos_sin_cache use_flashinfer",
    ),
    *_names("ir/op.py", "enable_torch_wrap(enable)", "IrOp: registry impls set_priority(priority)", first="0.20"),
    # an engine without a server, and what its forward costs
    *_names("engine/arg_utils.py", "EngineArgs: worker_extension_cls enforce_eager model"),
    *_names("engine/arg_utils.py", "EngineArgs: max_num_batched_tokens enable_chunked_prefill runner convert"),
    *_names("engine/arg_utils.py", "EngineArgs.nnodes -n"),
    *_names("engine/arg_utils.py", "EngineArgs: add_cli_args(parser) from_cli_args(args)"),
    *_names("utils/argparse_utils.py", "FlexibleArgumentParser"),
    *_names("v1/engine/llm_engine.py", "LLMEngine: from_engine_args(engine_args) collective_rpc(method, args)"),
    *_names("v1/engine/llm_engine.py", "LLMEngine: engine_core vllm_config"),
    *_names("v1/engine/core_client.py", "EngineCoreClient.shutdown()"),
    *_names(LINEAR, "LinearBase: input_size output_size quant_method"),
    *_names(LINEAR, "UnquantizedLinearMethod.apply(layer, x, bias)"),
    *_names(LINEAR, "ColumnParallelLinear.output_size_per_partition RowParallelLinear.input_size_per_partition"),
    *_names("model_executor/layers/fused_moe/*.py", "self.moe_config"),
    *_names(FUSED_MOE, "FusedMoEConfig: num_experts num_local_experts experts_per_token hidden_dim is_act_and_mul"),
    *_names(FUSED_MOE, "FusedMoEConfig.intermediate_size_per_partition", first="0.15"),
    *_names("model_executor/layers/fused_moe/layer.py", "FusedMoE.intermediate_size_per_partition", last="0.14"),
    *_names(ATTENTION, "Attention: num_heads head_size head_size_v sliding_window"),
    *_names(MLA_ATTENTION, "MLAAttention: num_heads qk_nope_head_dim qk_rope_head_dim v_head_dim kv_cache impl"),
    # replays of chats: the logits processors of both runners, the sampler's functions and what carries the tokens
    *_names("engine/arg_utils.py", "--logits-processors --logprobs-mode"),
    *_names("engine/arg_utils.py", "--enable-trace-replay", first="0.29"),
    *_names("config/model.py", "ModelConfig: logits_processors logprobs_mode try_get_generation_config()"),
    *_names("config/model.py", "ModelConfig.enable_trace_replay", first="0.29"),
    *_names("config/vllm.py", "VllmConfig.speculative_config"),
    *_names("envs.py", "VLLM_USE_V2_MODEL_RUNNER"),
    *_names("entrypoints/*.py", "ChatCompletionRequest: return_tokens_as_token_ids return_token_ids vllm_xargs"),
    *_names("entrypoints/*.py", "CompletionRequest.return_tokens_as_token_ids"),
    *_names("tokenizers/registry.py", "cached_tokenizer_from_config(model_config)"),
    *_names("tokenizers/protocol.py", "TokenizerLike: eos_token_id encode(text, add_special_tokens)"),
    *_names("sampling_params.py", "SamplingParams: extra_args n logprobs temperature top_p top_k min_p"),
    *_names("sampling_params.py", "SamplingParams: presence_penalty frequency_penalty repetition_penalty"),
    *_names("sampling_params.py", "SamplingParams.trace_decode_token_ids", first="0.29"),
    *_names(PROCESSORS, "LogitsProcessor: update_state(batch_update) apply(logits) is_argmax_invariant()"),
    *_names(PROCESSORS, "LogitsProcessor.validate_params(sampling_params)"),
    *_names(PROCESSORS, "BatchUpdate: removed added moved"),
    *_names("v1/sample/logits_processor/state.py", "LogitsProcessors.non_argmax_invariant"),
    *_names("v1/worker/gpu_model_runner.py", "GPUModelRunner.input_batch"),
    *_names("v1/worker/gpu_input_batch.py", "InputBatch.logitsprocs"),
    *_names(
        V2_PROCESSORS,
        "LogitsProcessor: validate_params(sampling_params) add_request(req_idx, sampling_params)",
        first="0.31",
    ),
    *_names(V2_PROCESSORS, "LogitsProcessor.apply(logits, ctx)", first="0.31"),
    *_names("v1/sample/ops/topk_topp_sampler.py", "apply_top_k_top_p(logits, k, p)"),
    *_names(
        "model_executor/layers/utils.py",
        "apply_penalties(logits, prompt_tokens_tensor, output_tokens_tensor, presence_penalties, "
        "frequency_penalties, repetition_penalties)",
    ),
    # layers that have a KV cache
    *_names(ATTENTION, "Attention: kv_cache impl kv_sharing_target_layer_name"),
    *_names("model_executor/layers/mamba/mamba_mixer2.py", "MambaMixer2.kv_cache"),
    *_names("v1/attention/backends/triton_attn.py", "TritonAttentionImpl._k_scale_cache", first="0.20"),
)


def judge(package: Package, contract: Collection[Name] = CONTRACT) -> list[Finding]:
    """The names that are there, and each name or parameter that is not as the contract has it.

    Raises ToolError if a file does not parse.
    """
    findings = []
    for name in contract:
        file = package.find(name)
        if not file:
            findings.append(_not_there(package, name, name.name, "gone", f"not in {name.files}"))
            continue
        in_vllm = package.parameters(name.dotted, file) if name.is_call else {}
        passed = {each for other in contract if other.dotted == name.dotted for each in other.parameters}
        wrong = [
            _not_there(package, name, f"{name.dotted}({parameter})", "parameter missing", f"{file} has it without")
            for parameter in name.parameters
            if parameter not in in_vllm
        ]
        for parameter, has_default in in_vllm.items():
            if not has_default and parameter not in passed:
                where = f"{file}: has no default, and gonka_poc does not pass it"
                wrong.append(Finding(f"{name.dotted}({parameter})", "newly required", where))
        findings += wrong or [Finding(name.name, "there", file)]
    return list(dict.fromkeys(findings))


def _not_there(package: Package, name: Name, shown: str, presence: Presence, where: str) -> Finding:
    """A finding of this presence, or a milder one if the release may lack the name."""
    releases = f"optional: absent, {f'first in {name.first}' if name.first else f'last in {name.last}'}"
    if name.may_be_absent(package.release):
        return Finding(shown, "optional", releases)
    if (name.first or name.last) and known_release(package.release) is None:
        return Finding(shown, "unsure", f"{releases}; the release is not known")
    return Finding(shown, presence, where)


# --- vLLM's source ----------------------------------------------------------------------------------------------


def read_package(path: Path) -> Package:
    """vLLM's source in a source tree, an installed package's folder or a wheel, as far as the contract needs it.

    Raises ToolError if there is no vLLM at `path`, or if a file cannot be read.
    """
    what = str(path)
    try:
        with contextlib.ExitStack() as stack:
            if path.is_dir():
                root = path / "vllm" if (path / "vllm" / "__init__.py").is_file() else path
                # is_file: a link to nowhere is none
                members = {f.relative_to(root).as_posix(): f.read_bytes for f in root.rglob("*.py") if f.is_file()}
            elif path.exists() and zipfile.is_zipfile(path):
                archive = stack.enter_context(zipfile.ZipFile(path))
                names = [name for name in archive.namelist() if name.startswith("vllm/")]
                members = {name.removeprefix("vllm/"): partial(archive.read, name) for name in names}
            else:
                wrong = "is neither a folder nor a wheel" if path.exists() else "does not exist"
                raise ToolError(f"{path} {wrong}; give a vLLM source tree, an installed vllm folder, or a .whl file")
            if not {"__init__.py", "envs.py"} <= members.keys():
                raise ToolError(f"{path} holds no vLLM: vllm/__init__.py and vllm/envs.py were looked for in it")
            files = {}
            for file in _matching(members, " ".join(["_version.py", *{name.files for name in CONTRACT}])):
                what = f"{path}: {file}"
                files[file] = members[file]()
            return Package(files)
    # zipfile raises NotImplementedError and RuntimeError for a file that is packed in an unknown way or encrypted
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ToolError(f"{what} cannot be read: {error}; if it was downloaded, download it again") from error


def _matching(files: Iterable[str], patterns: str) -> list[str]:
    matches = re.compile("|".join(map(fnmatch.translate, patterns.split()))).match
    return sorted(file for file in files if matches(file))


class Package:
    """Source files of vLLM by their path in its package.

    `release` is the one that `_version.py` states; empty without that file, as in a checkout.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files
        self._parsed: dict[str, dict[str, ast.AST]] = {}
        stated = rb"^(?:__version__ = )?version = ['\"](\d[^'\"]*)"
        found = re.search(stated, files.get("_version.py", b""), flags=re.MULTILINE)
        self.release = found[1].decode(errors="replace") if found else ""

    def find(self, name: Name) -> str:
        """The first matching file that defines `name`; empty if none does."""
        words = [word.encode() for word in re.findall(r"[\w/-]+", name.dotted)]
        for file in _matching(self.files, name.files):
            # most files need not be parsed
            if all(word in self.files[file] for word in words) and name.dotted in self._definitions(file):
                return file
        return ""

    def parameters(self, dotted: str, file: str) -> dict[str, bool]:
        """The parameters of a function, or of a class when it is called, and if each has a default."""
        definitions = self._definitions(file)
        node = definitions.get(f"{dotted}.__init__", definitions[dotted])
        if isinstance(node, ast.ClassDef):
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
            fields = [field for field in fields if "ClassVar" not in ast.unparse(field.annotation)]
            return {ast.unparse(field.target): field.value is not None for field in fields}
        if not isinstance(node, Function):
            return {}
        args = node.args
        positional = [*args.posonlyargs, *args.args]
        num_required = len(positional) - len(args.defaults)
        has_default = {arg.arg: i >= num_required for i, arg in enumerate(positional)}
        has_default |= {arg.arg: bool(default) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)}
        return {name: value for name, value in has_default.items() if name not in ("self", "cls")}

    def _definitions(self, file: str) -> dict[str, ast.AST]:
        if file not in self._parsed:
            try:
                self._parsed[file] = dict(_definitions(ast.parse(self.files[file])))
            except (SyntaxError, ValueError) as error:
                reason = f"{error} (Python {platform.python_version()})"
                raise ToolError(f"{file} does not parse: {reason}; take a newer Python, or a whole vLLM") from error
        return self._parsed[file]


def _definitions(node: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.AST]]:
    """The definitions inside of `node`, by the names that the contract has for them; `owner` is the class around it."""
    for target, value in _assigned(node):
        if owner and target.startswith("self."):
            yield f"{owner}.{target.removeprefix('self.')}", node
        if "." in target and not (isinstance(value, ast.Constant) and value.value is None):
            yield target, node
        elif target == "environment_variables" and isinstance(value, ast.Dict):
            yield from ((ast.literal_eval(key), key) for key in value.keys if isinstance(key, ast.Constant))
    if isinstance(node, ast.Call):
        texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        is_route = isinstance(node.func, ast.Attribute) and node.func.attr == "post"
        yield from ((text, node) for text in texts if text.startswith("/" if is_route else "-"))
    elif isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
        yield "__main__", node
    elif isinstance(node, (ast.Module, ast.ClassDef)):
        owner = node.name if isinstance(node, ast.ClassDef) else ""
        prefix = f"{owner}." if owner else ""
        for statement in node.body:
            if isinstance(statement, (*Function, ast.ClassDef)):
                yield f"{prefix}{statement.name}", statement
            # an annotation without a value is a field only if a decorator makes one of it (a dataclass)
            is_field = owner and (getattr(statement, "value", None) or getattr(node, "decorator_list", None))
            yield from ((f"{prefix}{target}", statement) for target, _ in _assigned(statement) if is_field)
    for child in ast.iter_child_nodes(node):
        yield from _definitions(child, owner)


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr | None]]:
    """The `name` or `variable.attribute` of each target of an assignment, and the value."""
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in [each for one in targets for each in (one.elts if isinstance(one, ast.Tuple) else [one])]:
            if isinstance(target, ast.Name):
                yield target.id, node.value
            elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                yield f"{target.value.id}.{target.attr}", node.value
