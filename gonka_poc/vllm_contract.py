"""Which names of vLLM this package relies on, and whether a release has them: read as text, never imported.

`CONTRACT` is the one list. `gonka-poc doctor` asks it about the installed vLLM, `gonka-poc doctor --vllm` about a
source tree, a package folder or a wheel. What is done with these names is in vllm_compat/.
"""

from __future__ import annotations

import ast
import contextlib
import platform
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from inspect import Parameter
from pathlib import Path
from typing import Any, Literal, TypeVar

from packaging.version import InvalidVersion, Version

from gonka_poc.errors import ToolError
from gonka_poc.vllm_compat import INSECURE_SERIALIZATION

State = Literal["there", "optional", "unsure", "moved", "gone", "changed", "required", "unread"]
Function = ast.FunctionDef | ast.AsyncFunctionDef
Found = tuple[ast.AST, str]  # what defines a name, and the file that has this definition

T = TypeVar("T")

MAX_PLACES = 3


@dataclass(frozen=True)
class Name:
    """A name that we use.

    `name` is a function, a class, a variable, `Class.member` (a method, a field, or what a method assigns to self),
    `variable.attribute` (assigned somewhere in the file), `--option`, `/route` (that takes POST) or `__main__` (the
    file can be run). What is called has parentheses, in them the parameters that we give, those before a `/` by
    position and the others by keyword; every other parameter must have a default. `await` stands before what is
    awaited, `with` before what is entered. A member without parentheses is read. A name that begins with VLLM_ is an
    environment variable that vLLM reads.
    `files`: patterns, of which one must match a file that has it; `*` also stands for folders.
    `first`, `last`: the releases that have it, where not all supported ones do; vllm_compat asks for those.
    """

    name: str
    files: str
    first: str = ""
    last: str = ""

    @property
    def path(self) -> tuple[str, ...]:
        """Its parts without the parameters."""
        return tuple(re.sub(r"^(await|with) |\(.*", "", self.name).split("."))

    @property
    def is_call(self) -> bool:
        """Whether we call it."""
        return "(" in self.name

    @property
    def is_awaited(self) -> bool:
        """Whether we await what the call returns."""
        return self.name.startswith("await ")

    @property
    def is_entered(self) -> bool:
        """Whether we enter what the call returns."""
        return self.name.startswith("with ")

    @property
    def by_position(self) -> list[str]:
        """The parameters that we give by position, in their order."""
        return re.findall(r"\w+", self.name.partition("(")[2].rpartition("/")[0])

    @property
    def parameters(self) -> list[str]:
        """The parameters that we give, those by position first."""
        return re.findall(r"\w+", self.name.partition("(")[2])

    def may_be_absent(self, release: str) -> bool:
        """Whether `release` is one without it."""
        known = known_release(release)
        return known is not None and (
            (bool(self.first) and known.release[:2] < Version(self.first).release)
            or (bool(self.last) and known.release[:2] > Version(self.last).release)
        )

    @property
    def releases(self) -> str:
        """Which releases have it; an empty text if all supported ones do."""
        limits = (self.first and f"first in {self.first}", self.last and f"last in {self.last}")
        return ", ".join(filter(None, limits))


@dataclass(frozen=True)
class Finding:
    """What became of one name: `where` says which file has it, or what is known instead."""

    name: str
    state: State
    where: str

    @property
    def is_good(self) -> bool:
        """Whether vllm_compat can do with it as it is, as far as is known."""
        return self.state in ("there", "optional", "unsure")


def known_release(text: str) -> Version | None:
    """The release that a version names; None where it names none.

    That is an empty text, what is no version (0.33.0-custom), and 0.1.dev, which builds from a checkout without tags
    have.
    """
    with contextlib.suppress(InvalidVersion):
        version = Version(text)
        return None if version.is_devrelease and version.release == (0, 1) else version
    return None


def _members(files: str, owner: str, *members: str) -> tuple[Name, ...]:
    return tuple(Name(f"{owner}.{member}", files) for member in members)


ATTENTION = "attention/layer.py model_executor/layers/attention/attention.py"  # the first until 0.15
MLA_ATTENTION = "attention/layer.py model_executor/layers/attention/mla_attention.py"

CONTRACT = (
    # the server, its options, its environment and the routes that wait for rounds
    Name("__main__", "entrypoints/openai/api_server.py"),
    Name("FrontendArgs.middleware", "entrypoints/*cli_args.py"),
    Name("EngineArgs.worker_extension_cls", "engine/arg_utils.py"),
    Name("EngineArgs.enforce_eager", "engine/arg_utils.py"),
    Name("--api-server-count", "entrypoints/*cli_args.py"),
    Name("-asc", "entrypoints/*cli_args.py"),
    Name(INSECURE_SERIALIZATION, "envs.py"),
    Name("VLLM_ENABLE_V1_MULTIPROCESSING", "envs.py"),
    Name("VLLM_CPU_KVCACHE_SPACE", "envs.py"),
    Name("/v1/chat/completions", "entrypoints/*.py"),
    Name("/v1/chat/completions/batch", "entrypoints/*.py", first="0.19"),
    Name("/v1/completions", "entrypoints/*.py"),
    Name("/v1/responses", "entrypoints/*.py"),
    Name("/v1/messages", "entrypoints/*.py"),
    Name("/invocations", "entrypoints/*.py"),
    Name("/cohere/v2/chat", "entrypoints/*.py", first="0.27"),
    Name("/inference/v1/generate", "entrypoints/*.py"),
    # the API process
    Name("state.engine_client", "entrypoints/*.py"),
    Name("state.vllm_config", "entrypoints/*.py"),
    Name("state.openai_serving_models", "entrypoints/*.py"),
    Name("OpenAIServingModels.base_model_paths", "entrypoints/openai/*.py"),
    Name("BaseModelPath.name", "entrypoints/openai/*.py"),
    Name("await AsyncLLM.collective_rpc(method, /, args)", "v1/engine/async_llm.py"),
    *_members("v1/engine/async_llm.py", "AsyncLLM", "vllm_config", "output_processor", "errored"),
    Name("OutputProcessor.has_unfinished_requests()", "v1/engine/output_processor.py"),
    Name("resolve_obj_by_qualname(qualname, /)", "utils/import_utils.py"),
    # the configuration
    *_members("config/vllm.py", "VllmConfig", "model_config", "cache_config", "parallel_config", "scheduler_config"),
    *_members("config/vllm.py", "VllmConfig", "compilation_config", "lora_config"),
    *_members("config/model.py", "ModelConfig", "model", "dtype", "max_model_len", "enforce_eager", "uses_mrope"),
    *_members("config/model.py", "ModelConfig", "get_hidden_size()", "get_total_num_hidden_layers()"),
    Name("ModelConfig.uses_xdrope_dim", "config/model.py", last="0.29"),
    Name("ModelConfig.mrope_num_dims", "config/model.py", first="0.30"),
    *_members("config/scheduler.py", "SchedulerConfig", "max_num_batched_tokens", "max_num_seqs"),
    *_members("config/parallel.py", "ParallelConfig", "worker_extension_cls", "data_parallel_size"),
    *_members("config/parallel.py", "ParallelConfig", "decode_context_parallel_size", "prefill_context_parallel_size"),
    Name("ParallelConfig._api_process_count", "config/parallel.py"),
    *_members("config/cache.py", "CacheConfig", "cache_dtype", "kv_sharing_fast_prefill"),
    Name("CacheConfig.calculate_kv_scales", "config/cache.py", last="0.27"),
    Name("CacheConfig.use_replayssm", "config/cache.py", first="0.27"),
    Name("CompilationConfig.static_forward_context", "config/compilation.py"),
    # a worker and its two model runners
    Name("WorkerWrapperBase.worker", "v1/worker/worker_base.py"),
    *_members("v1/worker/worker_base.py", "WorkerBase", "vllm_config", "model_runner", "rank"),
    *_members("v1/worker/gpu_model_runner.py", "GPUModelRunner", "device", "get_model()", "model", "attn_groups"),
    *_members("v1/worker/gpu/model_runner.py", "GPUModelRunner", "device", "get_model()", "model", "attn_groups"),
    # other ranks
    Name("get_pp_group()", "distributed/parallel_state.py"),
    Name("get_tp_group()", "distributed/parallel_state.py"),
    Name("get_world_group()", "distributed/parallel_state.py"),
    *_members("distributed/parallel_state.py", "GroupCoordinator", "is_first_rank", "is_last_rank", "rank_in_group"),
    *_members("distributed/parallel_state.py", "GroupCoordinator", "world_size", "cpu_group"),
    Name("GroupCoordinator.recv_tensor_dict(all_gather_group)", "distributed/parallel_state.py"),
    Name("GroupCoordinator.send_tensor_dict(tensor_dict, /, all_gather_group)", "distributed/parallel_state.py"),
    Name("IntermediateTensors(tensors, /)", "sequence.py"),
    Name("IntermediateTensors.tensors", "sequence.py"),
    # the model, one of them standing for all
    Name("PPMissingLayer", "model_executor/models/utils.py"),
    *_members("model_executor/models/qwen2.py", "Qwen2Model", "start_layer", "end_layer"),
    Name(
        "Qwen3ForCausalLM.forward(input_ids, positions, intermediate_tensors, inputs_embeds)",
        "model_executor/models/qwen3.py",
    ),
    Name("Qwen3ForCausalLM.compute_logits(hidden_states, /)", "model_executor/models/qwen3.py"),
    Name("self.per_layer_embeddings", "model_executor/models/gemma*.py"),
    # the forward and its attention
    Name("with set_forward_context(attn_metadata, vllm_config, /, num_tokens)", "forward_context.py"),
    Name("with set_forward_context(slot_mapping, skip_compiled)", "forward_context.py", first="0.15"),
    Name(
        "CommonAttentionMetadata(query_start_loc, query_start_loc_cpu, seq_lens, num_reqs, num_actual_tokens, "
        "max_query_len, max_seq_len, block_table_tensor, slot_mapping, causal)",
        "v1/attention/backend.py",
    ),
    Name("CommonAttentionMetadata(is_prefilling)", "v1/attention/backend.py", first="0.19"),
    Name("CommonAttentionMetadata(positions, seq_lens_cpu_upper_bound)", "v1/attention/backend.py", first="0.20"),
    Name("CommonAttentionMetadata(_seq_lens_cpu, _num_computed_tokens_cpu)", "v1/attention/backend.py", last="0.29"),
    Name("AttentionMetadataBuilder.build(common_prefix_len, common_attn_metadata, /)", "v1/attention/backend.py"),
    Name("AttentionMetadataBuilder.kv_cache_spec", "v1/attention/backend.py"),
    *_members("v1/worker/utils.py", "AttentionGroup", "get_metadata_builder(ubatch_id, /)", "layer_names"),
    *_members("v1/worker/utils.py", "AttentionGroup", "backend", "kv_cache_spec"),
    *_members("v1/kv_cache_interface.py", "AttentionSpec", "block_size", "num_kv_heads", "head_size"),
    Name(
        "AttentionBackend.get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, /, cache_dtype_str)",
        "v1/attention/backend.py",
        last="0.28",
    ),
    # what torch may compile
    *_members("model_executor/custom_op.py", "CustomOp", "forward_native()", "_forward_method"),
    *_members("model_executor/custom_op.py", "CustomOp", "forward_cuda()", "forward_cpu()"),
    Name("with enable_torch_wrap(enable, /)", "ir/op.py", first="0.20"),
    *(Name(f"IrOp.{member}", "ir/op.py", first="0.20") for member in ("registry", "impls")),
    Name("with IrOp.set_priority(priority, /)", "ir/op.py", first="0.20"),
    # an engine without a server, and what its forward costs
    Name("EngineArgs.add_cli_args(parser, /)", "engine/arg_utils.py"),
    Name("EngineArgs.from_cli_args(args, /)", "engine/arg_utils.py"),
    Name("FlexibleArgumentParser", "utils/argparse_utils.py"),
    Name("LLMEngine.from_engine_args(engine_args, /)", "v1/engine/llm_engine.py"),
    Name("LLMEngine.collective_rpc(method, /, args)", "v1/engine/llm_engine.py"),
    *_members("v1/engine/llm_engine.py", "LLMEngine", "engine_core", "vllm_config"),
    Name("EngineCoreClient.shutdown()", "v1/engine/core_client.py"),
    Name("cleanup_dist_env_and_memory()", "distributed/parallel_state.py"),
    Name("ModelConfig.get_vocab_size()", "config/model.py"),
    *_members("model_executor/layers/linear.py", "LinearBase", "input_size", "output_size"),
    Name("ColumnParallelLinear.output_size_per_partition", "model_executor/layers/linear.py"),
    Name("RowParallelLinear.input_size_per_partition", "model_executor/layers/linear.py"),
    Name("self.moe_config", "model_executor/layers/fused_moe/*.py"),
    *_members("model_executor/layers/fused_moe/config.py", "FusedMoEConfig", "num_experts", "num_local_experts"),
    *_members("model_executor/layers/fused_moe/config.py", "FusedMoEConfig", "experts_per_token", "hidden_dim"),
    Name("FusedMoEConfig.intermediate_size_per_partition", "model_executor/layers/fused_moe/config.py", first="0.15"),
    Name("FusedMoE.intermediate_size_per_partition", "model_executor/layers/fused_moe/layer.py", last="0.14"),
    Name("FusedMoEConfig.is_act_and_mul", "model_executor/layers/fused_moe/config.py"),
    *_members(ATTENTION, "Attention", "num_heads", "head_size", "head_size_v", "sliding_window"),
    *_members(MLA_ATTENTION, "MLAAttention", "num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    # layers that have a KV cache
    *_members(ATTENTION, "Attention", "kv_cache", "impl", "kv_sharing_target_layer_name"),
    *_members(MLA_ATTENTION, "MLAAttention", "kv_cache", "impl"),
    Name("MambaMixer2.kv_cache", "model_executor/layers/mamba/mamba_mixer2.py"),
    Name("TritonAttentionImpl._k_scale_cache", "v1/attention/backends/triton_attn.py", first="0.20"),
)


# --- the judgement ----------------------------------------------------------------------------------------------


def judge(package: Package, contract: Iterable[Name] = CONTRACT) -> list[Finding]:
    """What became of each name and each parameter; and each parameter that became required, which we do not give.

    Raises ToolError where a file of the package cannot be read.
    """
    findings: list[Finding] = []
    given: dict[tuple[tuple[str, ...], str], set[str]] = {}
    for name in contract:
        findings += _findings(package, name)
        if name.is_call:
            given.setdefault((name.path, name.files), set()).update(name.parameters)
    for (path, files), ours in given.items():
        file, found = package.find_in(path, files)
        for parameter, is_like in package.parameters(found).items():
            if is_like.default is Parameter.empty and parameter not in ours:
                where = f"{file}: has no default, and gonka_poc does not give it"
                findings.append(Finding(f"{'.'.join(path)}({parameter})", "required", where))
    return findings


def _findings(package: Package, name: Name) -> list[Finding]:
    """One finding a parameter; one in all for a name without, or one that is not where it should be."""
    dotted = ".".join(name.path)
    file, found = package.find_in(name.path, name.files)
    absent: State = "gone"
    why = ""
    if name.may_be_absent(package.release):
        absent, why = "optional", f"optional: absent, {name.releases}"
    elif name.releases and known_release(package.release) is None:
        absent, why = "unsure", f"optional: absent, {name.releases}; the release is not told"
    if found is None:
        places = [] if absent == "optional" else package.places_of(name.path)
        if places:
            more = f" and {len(places) - MAX_PLACES} more" if len(places) > MAX_PLACES else ""
            return [Finding(name.name, "moved", f"{', '.join(places[:MAX_PLACES])}{more}; was in {name.files}")]
        unread = "" if absent == "optional" else package.why_unread(name.path)
        if unread:
            return [Finding(name.name, "unread", unread)]
        return [Finding(name.name, absent, why or f"was in {name.files}, is nowhere")]
    change = _change(name, found[0])
    if change:
        return [Finding(name.name, "changed", f"{file}: {change}")]
    has = package.parameters(found)
    findings = []
    for i, parameter in enumerate(name.parameters):
        each = f"{dotted}({parameter})"
        if parameter not in has:
            findings.append(Finding(each, absent, why or f"{file} has {dotted}, without this parameter"))
        elif change := _parameter_change(has, parameter, i if i < len(name.by_position) else None):
            findings.append(Finding(each, "changed", f"{file}: {change}"))
        else:
            findings.append(Finding(each, "there", file))
    return findings or [Finding(name.name, "there", file)]


def _change(name: Name, node: ast.AST) -> str:
    """What speaks against using a function or a method as we do; an empty text if nothing does."""
    if not isinstance(node, Function):
        return ""
    if not name.is_call:
        return "" if _is_property(node) or len(name.path) == 1 else "is a method, and gonka_poc reads it"
    if _is_property(node):
        return "is a property, and gonka_poc calls it"
    is_async = isinstance(node, ast.AsyncFunctionDef)
    if is_async != name.is_awaited:
        return "is async, and gonka_poc does not await it" if is_async else "is not async, and gonka_poc awaits it"
    is_context = _is_decorated(node, r"\bcontextmanager$")
    if is_context != name.is_entered:
        what = "is a context manager, and gonka_poc does not enter it"
        return what if is_context else "is no context manager, and gonka_poc enters it"
    return ""


def _parameter_change(has: Mapping[str, Parameter], parameter: str, position: int | None) -> str:
    """What speaks against giving `parameter` at `position`, or by keyword (None); an empty text if nothing does."""
    if position is None:
        return "by position only" if has[parameter].kind is Parameter.POSITIONAL_ONLY else ""
    if has[parameter].kind is Parameter.KEYWORD_ONLY:
        return "by keyword only"
    # those by keyword come last
    actual = list(has).index(parameter)
    return "" if actual == position else f"is parameter {actual + 1}, gonka_poc gives it as {position + 1}"


# --- vLLM's source ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_package(path: Path) -> Iterator[Package]:
    """vLLM's package in a source tree, an installed package's folder or a wheel.

    Raises ToolError if it is neither, and, when it is read, where a file cannot be.
    """
    with contextlib.ExitStack() as stack:
        files: dict[str, Callable[[], bytes]]
        if path.is_dir():
            root = path / "vllm" if (path / "vllm" / "__init__.py").is_file() else path
            found = [file for file in sorted(root.rglob("*.py")) if file.is_file()]  # not a link to nowhere
            files = {file.relative_to(root).as_posix(): file.read_bytes for file in found}
        elif path.exists() and zipfile.is_zipfile(path):
            archive = stack.enter_context(_read(str(path), lambda: zipfile.ZipFile(path)))
            members = [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")]
            files = {name.removeprefix("vllm/"): partial(archive.read, name) for name in sorted(members)}
        else:
            what = "is neither a folder nor a wheel" if path.exists() else "does not exist"
            raise ToolError(f"{path} {what}; give a vLLM source tree, an installed vllm folder, or a .whl file")
        if not {"__init__.py", "envs.py"} <= files.keys():
            raise ToolError(f"{path} holds no vLLM: vllm/__init__.py and vllm/envs.py were looked for in it")
        yield Package({file: partial(_read, f"{path}: {file}", read) for file, read in files.items()})


def _read(what: str, read: Callable[[], T]) -> T:
    """What `read` returns. Raises ToolError where the file is damaged or may not be read."""
    try:
        return read()
    # an unknown or an encrypted member's are NotImplementedError and RuntimeError
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ToolError(f"{what} cannot be read: {error}; if it was downloaded, download it again") from error


class Package:
    """vLLM's package as text: `files` gives the source of each Python file by its path in the package.

    `release` is the one that `_version.py` tells; empty where there is none, as in a source tree.
    """

    def __init__(self, files: Mapping[str, Callable[[], bytes]]) -> None:
        self._files = files
        self._trees: dict[str, ast.Module] = {}
        self._unparsed: dict[str, str] = {}
        version_file = files["_version.py"]() if "_version.py" in files else b""
        found = re.search(rb"^(?:__version__ = )?version = ['\"](\d[^'\"]*)", version_file, flags=re.MULTILINE)
        self.release = found[1].decode(errors="replace") if found else ""

    def find_in(self, path: tuple[str, ...], patterns: str) -> tuple[str, Found | None]:
        """The first of the files that `patterns` match from which the name can be had, and its definition."""
        for file in self._files:
            if any(fnmatchcase(file, pattern) for pattern in patterns.split()):
                found = self.find(path, file)
                if found is not None:
                    return file, found
        return "", None

    def find(self, path: tuple[str, ...], file: str) -> Found | None:
        """The definition of the name that is in `file`, or that `file` imports from another file of the package."""
        first, rest = path[0], path[1:]
        if first.startswith(("-", "/")):
            return self._in_call(first, file)
        if first.startswith("VLLM_"):
            return self._variable(first, file)
        if first == "__main__":
            return self._main(file)
        if rest and first.islower():
            return self._assigned(".".join(path), file)
        found = self._bound(first, file)
        return self._member(rest[0], found) if found and rest else found

    def places_of(self, path: tuple[str, ...]) -> list[str]:
        """The files that define the name; of a member, those that have it in a class of the same name."""
        if path == ("__main__",):
            return []  # of many files, none of which is the server
        return [file for file in self._likely(path) if (found := self.find(path, file)) and found[1] == file]

    def why_unread(self, path: tuple[str, ...]) -> str:
        """Which files seem to define the name and do not parse, and why not; an empty text if there are none."""
        why = [
            f"{file} does not parse: {self._unparsed[file]}" for file in self._likely(path) if self._is_unparsed(file)
        ]
        return "; ".join(why[:MAX_PLACES])

    def _likely(self, path: tuple[str, ...]) -> list[str]:
        """The files in whose text the name seems to be defined: few of the thousands have to be parsed."""
        word = re.escape(path[0].encode())
        sign = re.compile(rb"\b(def|class)\s+%b\b|^\s*%b\s*[:=]" % (word, word), flags=re.MULTILINE)
        if path[0].startswith(("-", "/", "VLLM_")) or (len(path) > 1 and path[0].islower()):
            sign = re.compile(re.escape(".".join(path).encode()))
        return [file for file, read in self._files.items() if sign.search(read())]

    def _is_unparsed(self, file: str) -> bool:
        self._tree(file)
        return file in self._unparsed

    def parameters(self, found: Found | None) -> dict[str, Parameter]:
        """The parameters of a function, or of a class when it is called; a default is only known to be there."""
        if found is None:
            return {}
        node, file = found
        if isinstance(node, ast.ClassDef):
            initializer = self._member("__init__", found)
            if initializer:
                return self.parameters(initializer)
            inherited = [self.parameters(base) for base in self._bases(node, file)]
            return {
                name: value for fields in [*reversed(inherited), dict(_fields(node))] for name, value in fields.items()
            }
        if not isinstance(node, Function):
            return {}
        args = node.args
        kinds = [
            *((arg, Parameter.POSITIONAL_ONLY) for arg in args.posonlyargs),
            *((arg, Parameter.POSITIONAL_OR_KEYWORD) for arg in args.args),
            *((arg, Parameter.KEYWORD_ONLY) for arg in args.kwonlyargs),
        ]
        num_required = len(args.posonlyargs) + len(args.args) - len(args.defaults)
        defaults = [None] * num_required + args.defaults + args.kw_defaults
        parameters = [_parameter(arg.arg, kind, value) for (arg, kind), value in zip(kinds, defaults, strict=True)]
        return {each.name: each for each in parameters if each.name not in ("self", "cls")}

    def _tree(self, file: str) -> ast.Module:
        if file not in self._trees:
            try:
                self._trees[file] = ast.parse(self._files[file]())
            except (SyntaxError, ValueError) as error:
                self._trees[file] = ast.Module([], [])
                self._unparsed[file] = f"{error} (Python {platform.python_version()})"
        return self._trees[file]

    def _bound(self, name: str, file: str) -> Found | None:
        """What gives `name` its meaning in a module."""
        for bound, node in _bindings(self._tree(file).body):
            if bound != name:
                continue
            if not isinstance(node, ast.ImportFrom):
                return node, file
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            for module in self._modules(node, file):
                if module != file:
                    return self._bound(original, module)
        return None

    def _modules(self, node: ast.ImportFrom, file: str) -> list[str]:
        """The file of the package that an import reads from, if it is one of the package."""
        parts = [part for part in (node.module or "").split(".") if part]
        if node.level:
            parts = [*file.split("/")[: -node.level], *parts]
        elif parts.pop(0) != "vllm":
            return []
        candidates = ("/".join(parts) + ".py", "/".join([*parts, "__init__.py"]))
        return [path for path in candidates if path in self._files]

    def _bases(self, owner: ast.ClassDef, file: str) -> list[Found]:
        """The base classes that are defined in the package."""
        names = [base.value if isinstance(base, ast.Subscript) else base for base in owner.bases]
        bases = [self._bound(name.id, file) for name in names if isinstance(name, ast.Name)]
        return [base for base in bases if base is not None and base[0] is not owner]

    def _member(self, name: str, owner: Found) -> Found | None:
        """A member of a class or of its bases."""
        node, file = owner
        if not isinstance(node, ast.ClassDef):
            return None
        own = _own_members(node)
        if name in own:
            return own[name], file
        # what a base class only promises is not there
        inherited = (self._member(name, base) for base in self._bases(node, file))
        return next((found for found in inherited if found is not None and not _is_stub(found[0])), None)

    def _assigned(self, dotted: str, file: str) -> Found | None:
        """An assignment to this attribute, of something else than None."""
        if dotted.encode() not in self._files[file]():
            return None
        for node in ast.walk(self._tree(file)):
            value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
            is_none = value is None or (isinstance(value, ast.Constant) and value.value is None)
            if not is_none and any(ast.unparse(target) == dotted for target in _targets(node)):
                return node, file
        return None

    def _in_call(self, text: str, file: str) -> Found | None:
        """A call with an option among its arguments; of a route, one that has it first and is for POST."""
        if text.encode() not in self._files[file]():
            return None
        for node in ast.walk(self._tree(file)):
            if not isinstance(node, ast.Call):
                continue
            texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            if text in texts and (text.startswith("-") or ast.unparse(node.func).endswith(".post")):
                return node, file
        return None

    def _variable(self, name: str, file: str) -> Found | None:
        """An entry of the table by which vLLM reads its environment; what it annotates for type checkers may differ."""
        for bound, node in _bindings(self._tree(file).body):
            table = getattr(node, "value", None) if bound == "environment_variables" else None
            if isinstance(table, ast.Dict):
                for key in table.keys:
                    if isinstance(key, ast.Constant) and key.value == name:
                        return key, file
        return None

    def _main(self, file: str) -> Found | None:
        """What is done when the file is run."""
        for node in self._tree(file).body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
                return node, file
        return None


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a block and of the blocks inside it that can run; not those of functions and classes in it."""
    for node in body:
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if not _is_for_type_checkers(node):
                yield from _statements(getattr(node, "body", []))
            yield from _statements(getattr(node, "orelse", []))
            yield from _statements(getattr(node, "finalbody", []))


def _is_for_type_checkers(node: ast.stmt) -> bool:
    """Whether the body of a statement never runs."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _bindings(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """The names that a module or class binds, each with the statement that does."""
    for node in _statements(body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)
        elif not _is_stand_in(node):
            yield from ((target.id, node) for target in _targets(node) if isinstance(target, ast.Name))


def _is_stand_in(node: ast.stmt) -> bool:
    """Whether a statement only gives annotations a name that type checkers import from elsewhere."""
    value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
    return isinstance(value, ast.Name) and value.id in ("object", "Any")


def _targets(node: ast.AST) -> Iterator[ast.expr]:
    """What a statement assigns to, tuples taken apart."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    for target in targets:
        yield from target.elts if isinstance(target, ast.Tuple) else [target]


def _own_members(owner: ast.ClassDef) -> dict[str, ast.AST]:
    """Methods, class attributes, and what methods assign to self.

    An annotation without a value is a field where a decorator makes one of it (dataclass, vLLM's config), and a
    promise elsewhere.
    """
    members = {
        name: node
        for name, node in _bindings(owner.body)
        if owner.decorator_list or not isinstance(node, ast.AnnAssign) or node.value is not None
    }
    for method in [node for node in members.values() if isinstance(node, Function)]:
        for node in _statements(method.body):
            for target in _targets(node):
                if (
                    isinstance(target, ast.Attribute)
                    and isinstance(target.value, ast.Name)
                    and target.value.id == "self"
                ):
                    members.setdefault(target.attr, node)
    return members


def _is_property(node: Function) -> bool:
    """Whether a method is read like an attribute."""
    return _is_decorated(node, r"property$|\.(setter|getter|deleter)$")


def _is_decorated(node: Function, pattern: str) -> bool:
    """Whether a decorator of a function is like `pattern`."""
    return any(re.search(pattern, ast.unparse(decorator)) for decorator in node.decorator_list)


def _parameter(name: str, kind: Any, default: object) -> Parameter:
    """A parameter that has a default unless `default` is None."""
    return Parameter(name, kind, default=Parameter.empty if default is None else default)


def _is_stub(node: ast.AST) -> bool:
    """Whether a method has no body of its own: it raises NotImplementedError, passes or is three dots."""
    if not isinstance(node, Function):
        return False
    last = node.body[-1]
    raises = isinstance(last, ast.Raise) and last.exc is not None and "NotImplementedError" in ast.unparse(last.exc)
    return raises or isinstance(last, ast.Pass) or (isinstance(last, ast.Expr) and isinstance(last.value, ast.Constant))


def _fields(owner: ast.ClassDef) -> Iterator[tuple[str, Parameter]]:
    """The fields of a dataclass that its constructor takes, as parameters."""
    for node in owner.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if re.search(r"\b(ClassVar|KW_ONLY)\b", ast.unparse(node.annotation)):
            continue
        default = value = node.value
        if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "field":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
            if options.get("init") == "False":
                continue
            default = value if "default" in options or "default_factory" in options else None
        yield node.target.id, _parameter(node.target.id, Parameter.POSITIONAL_OR_KEYWORD, default)
