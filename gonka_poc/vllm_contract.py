"""Which names of vLLM this package relies on, and whether a release has them: read as text, never imported.

`CONTRACT` is the one list. `gonka-poc doctor` asks it about the installed vLLM, `gonka-poc doctor --vllm` about a
source tree, a package folder or a wheel. What is done with these names is in vllm_compat.py.
"""

from __future__ import annotations

import ast
import contextlib
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Literal

from packaging.version import Version

from gonka_poc.errors import ToolError
from gonka_poc.vllm_compat import INSECURE_SERIALIZATION

State = Literal["there", "optional", "moved", "gone", "required"]
Function = ast.FunctionDef | ast.AsyncFunctionDef
Found = tuple[ast.AST, str]  # what defines a name, and the file that has this definition

MAX_PLACES = 3


@dataclass(frozen=True)
class Name:
    """A name that we use.

    `name` is a function, a class, a variable, `Class.member` (a method, a field, or what a method assigns to self),
    `variable.attribute` (assigned somewhere in the file) or `--option`. What is called has parentheses, in them the
    parameters that we give; every other parameter must have a default.
    `files`: patterns, of which one must match a file that has it; `*` also stands for folders.
    `first`, `last`: the releases that have it, where not all supported ones do; vllm_compat.py asks for those.
    """

    name: str
    files: str
    first: str = ""
    last: str = ""

    @property
    def path(self) -> tuple[str, ...]:
        """Its parts without the parameters."""
        return tuple(self.name.partition("(")[0].split("."))

    @property
    def is_call(self) -> bool:
        """Whether we call it."""
        return "(" in self.name

    @property
    def parameters(self) -> list[str]:
        """The parameters that we give."""
        return re.findall(r"\w+", self.name.partition("(")[2])

    def may_be_absent(self, release: str) -> bool:
        """Whether `release` is one without it; an unknown release (an empty text) counts as the newest."""
        minor = Version(release).release[:2] if release else (9999,)
        return (bool(self.first) and minor < Version(self.first).release) or (
            bool(self.last) and minor > Version(self.last).release
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
        """Whether vllm_compat.py can do with it as it is."""
        return self.state in ("there", "optional")


def _members(files: str, owner: str, *members: str) -> tuple[Name, ...]:
    return tuple(Name(f"{owner}.{member}", files) for member in members)


CONTRACT = (
    # the server, its options and its environment
    Name("run_server", "entrypoints/openai/api_server.py"),
    Name("FrontendArgs.middleware", "entrypoints/*cli_args.py"),
    Name("EngineArgs.worker_extension_cls", "engine/arg_utils.py"),
    Name("EngineArgs.enforce_eager", "engine/arg_utils.py"),
    Name("--api-server-count", "entrypoints/*cli_args.py"),
    Name(INSECURE_SERIALIZATION, "envs.py"),
    # the API process
    Name("state.engine_client", "entrypoints/*.py"),
    Name("state.vllm_config", "entrypoints/*.py"),
    Name("state.openai_serving_models", "entrypoints/*.py"),
    Name("OpenAIServingModels.base_model_paths", "entrypoints/openai/*.py"),
    Name("BaseModelPath.name", "entrypoints/openai/*.py"),
    Name("AsyncLLM.collective_rpc(method, args)", "v1/engine/async_llm.py"),
    *_members("v1/engine/async_llm.py", "AsyncLLM", "vllm_config", "output_processor", "errored"),
    Name("OutputProcessor.has_unfinished_requests()", "v1/engine/output_processor.py"),
    Name("resolve_obj_by_qualname(qualname)", "utils/import_utils.py"),
    # the configuration
    *_members("config/vllm.py", "VllmConfig", "model_config", "cache_config", "parallel_config", "scheduler_config"),
    *_members("config/vllm.py", "VllmConfig", "compilation_config", "lora_config"),
    *_members("config/model.py", "ModelConfig", "model", "dtype", "max_model_len", "enforce_eager", "uses_mrope"),
    *_members("config/model.py", "ModelConfig", "get_hidden_size()", "get_total_num_hidden_layers()"),
    Name("ModelConfig.uses_xdrope_dim", "config/model.py", last="0.29"),
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
    *_members("v1/worker/worker_base.py", "WorkerBase", "vllm_config", "model_runner", "device", "rank"),
    *_members("v1/worker/gpu_model_runner.py", "GPUModelRunner", "get_model()", "model", "attn_groups"),
    *_members("v1/worker/gpu/model_runner.py", "GPUModelRunner", "get_model()", "model", "attn_groups"),
    # other ranks
    Name("get_pp_group()", "distributed/parallel_state.py"),
    Name("get_tp_group()", "distributed/parallel_state.py"),
    Name("get_world_group()", "distributed/parallel_state.py"),
    *_members("distributed/parallel_state.py", "GroupCoordinator", "is_first_rank", "is_last_rank", "rank_in_group"),
    *_members("distributed/parallel_state.py", "GroupCoordinator", "world_size", "cpu_group"),
    Name("GroupCoordinator.recv_tensor_dict(all_gather_group)", "distributed/parallel_state.py"),
    Name("GroupCoordinator.send_tensor_dict(tensor_dict, all_gather_group)", "distributed/parallel_state.py"),
    Name("IntermediateTensors(tensors)", "sequence.py"),
    Name("IntermediateTensors.tensors", "sequence.py"),
    # the model, one of them standing for all
    Name("PPMissingLayer", "model_executor/models/utils.py"),
    *_members("model_executor/models/qwen2.py", "Qwen2Model", "start_layer", "end_layer"),
    Name(
        "Qwen3ForCausalLM.forward(input_ids, positions, intermediate_tensors, inputs_embeds)",
        "model_executor/models/qwen3.py",
    ),
    Name("Qwen3ForCausalLM.compute_logits(hidden_states)", "model_executor/models/qwen3.py"),
    Name("self.per_layer_embeddings", "model_executor/models/gemma*.py"),
    # the forward and its attention
    Name("set_forward_context(attn_metadata, vllm_config, num_tokens)", "forward_context.py"),
    Name("set_forward_context(slot_mapping, skip_compiled)", "forward_context.py", first="0.15"),
    Name(
        "CommonAttentionMetadata(query_start_loc, query_start_loc_cpu, seq_lens, num_reqs, num_actual_tokens, "
        "max_query_len, max_seq_len, block_table_tensor, slot_mapping, causal)",
        "v1/attention/backend.py",
    ),
    Name("CommonAttentionMetadata(is_prefilling)", "v1/attention/backend.py", first="0.19"),
    Name("CommonAttentionMetadata(positions, seq_lens_cpu_upper_bound)", "v1/attention/backend.py", first="0.20"),
    Name("CommonAttentionMetadata(_seq_lens_cpu, _num_computed_tokens_cpu)", "v1/attention/backend.py", last="0.29"),
    Name("AttentionMetadataBuilder.build(common_prefix_len, common_attn_metadata)", "v1/attention/backend.py"),
    Name("AttentionMetadataBuilder.kv_cache_spec", "v1/attention/backend.py"),
    *_members("v1/worker/utils.py", "AttentionGroup", "get_metadata_builder(ubatch_id)", "layer_names"),
    *_members("v1/worker/utils.py", "AttentionGroup", "backend", "kv_cache_spec"),
    *_members("v1/kv_cache_interface.py", "AttentionSpec", "block_size", "num_kv_heads", "head_size"),
    Name(
        "AttentionBackend.get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str)",
        "v1/attention/backend.py",
        last="0.28",
    ),
    # what torch may compile
    *_members("model_executor/custom_op.py", "CustomOp", "forward_native()", "_forward_method"),
    Name("enable_torch_wrap", "ir/op.py", first="0.20"),
    Name("IrOp.registry", "ir/op.py", first="0.20"),
    Name("IrOp.set_priority", "ir/op.py", first="0.20"),
    # an engine without a server, and what its forward costs
    Name("EngineArgs.add_cli_args(parser)", "engine/arg_utils.py"),
    Name("EngineArgs.from_cli_args(args)", "engine/arg_utils.py"),
    Name("FlexibleArgumentParser", "utils/argparse_utils.py"),
    Name("LLMEngine.from_engine_args(engine_args)", "v1/engine/llm_engine.py"),
    Name("LLMEngine.collective_rpc(method, args)", "v1/engine/llm_engine.py"),
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
    Name("FusedMoEConfig.is_act_and_mul", "model_executor/layers/fused_moe/config.py"),
    *_members("attention/layer.py model_executor/layers/attention/attention.py", "Attention", "num_heads"),
    *_members("attention/layer.py model_executor/layers/attention/attention.py", "Attention", "head_size_v"),
    *_members("attention/layer.py model_executor/layers/attention/attention.py", "Attention", "sliding_window"),
    *_members("attention/layer.py model_executor/layers/attention/mla_attention.py", "MLAAttention", "v_head_dim"),
    *_members(
        "attention/layer.py model_executor/layers/attention/mla_attention.py", "MLAAttention", "qk_nope_head_dim"
    ),
    *_members(
        "attention/layer.py model_executor/layers/attention/mla_attention.py", "MLAAttention", "qk_rope_head_dim"
    ),
    # layers that have a KV cache
    *_members("attention/layer.py model_executor/layers/attention/attention.py", "Attention", "kv_cache", "impl"),
    Name("Attention.kv_sharing_target_layer_name", "attention/layer.py model_executor/layers/attention/attention.py"),
    Name("TritonAttentionImpl._k_scale_cache", "v1/attention/backends/triton_attn.py", first="0.20"),
)


# --- the judgement ----------------------------------------------------------------------------------------------


def judge(package: Package, contract: Iterable[Name] = CONTRACT) -> list[Finding]:
    """What became of each name and each parameter; and each parameter that became required, which we do not give."""
    findings: list[Finding] = []
    given: dict[tuple[tuple[str, ...], str], set[str]] = {}
    for name in contract:
        findings += _findings(package, name)
        if name.is_call:
            given.setdefault((name.path, name.files), set()).update(name.parameters)
    for (path, files), ours in given.items():
        file, found = package.find_in(path, files)
        for parameter, has_default in package.parameters(found).items():
            if not has_default and parameter not in ours:
                where = f"{file}: has no default, and gonka_poc does not give it"
                findings.append(Finding(f"{'.'.join(path)}({parameter})", "required", where))
    return findings


def _findings(package: Package, name: Name) -> list[Finding]:
    """One finding a parameter; one in all for a name without, or one that is not where it should be."""
    dotted = ".".join(name.path)
    file, found = package.find_in(name.path, name.files)
    absent: State = "optional" if name.may_be_absent(package.release) else "gone"
    why = f"optional: absent, {name.releases}" if absent == "optional" else ""
    if found is None:
        places = [] if why else package.places_of(name.path)
        if places:
            more = f" and {len(places) - MAX_PLACES} more" if len(places) > MAX_PLACES else ""
            return [Finding(name.name, "moved", f"{', '.join(places[:MAX_PLACES])}{more}; was in {name.files}")]
        return [Finding(name.name, absent, why or f"was in {name.files}, is nowhere")]
    has = package.parameters(found)
    findings = [
        Finding(f"{dotted}({parameter})", "there", file)
        if parameter in has
        else Finding(f"{dotted}({parameter})", absent, why or f"{file} has {dotted}, without this parameter")
        for parameter in name.parameters
    ]
    return findings or [Finding(name.name, "there", file)]


# --- vLLM's source ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_package(path: Path) -> Iterator[Package]:
    """vLLM's package in a source tree, an installed package's folder or a wheel. Raises ToolError if it is neither."""
    with contextlib.ExitStack() as stack:
        files: dict[str, Callable[[], bytes]]
        if path.is_dir():
            root = path / "vllm" if (path / "vllm" / "__init__.py").is_file() else path
            files = {file.relative_to(root).as_posix(): file.read_bytes for file in sorted(root.rglob("*.py"))}
        elif zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            members = [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")]
            files = {name.removeprefix("vllm/"): partial(archive.read, name) for name in sorted(members)}
        else:
            what = "is neither a folder nor a wheel" if path.exists() else "does not exist"
            raise ToolError(f"{path} {what}; give a vLLM source tree, an installed vllm folder, or a .whl file")
        if not {"__init__.py", "envs.py"} <= files.keys():
            raise ToolError(f"{path} holds no vLLM: vllm/__init__.py and vllm/envs.py were looked for in it")
        yield Package(files)


class Package:
    """vLLM's package as text: `files` gives the source of each Python file by its path in the package."""

    def __init__(self, files: Mapping[str, Callable[[], bytes]]) -> None:
        self._files = files
        self._trees: dict[str, ast.Module] = {}
        version_file = files["_version.py"]() if "_version.py" in files else b""
        found = re.search(rb"^(?:__version__ = )?version = ['\"](\d[^'\"]*)", version_file, flags=re.MULTILINE)
        self.release = found[1].decode() if found else ""

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
        if first.startswith("--"):
            return self._option(first, file)
        if rest and first.islower():
            return self._assigned(".".join(path), file)
        found = self._bound(first, file)
        return self._member(rest[0], found) if found and rest else found

    def places_of(self, path: tuple[str, ...]) -> list[str]:
        """The files that define the name; of a member, those that have it in a class of the same name."""
        word = re.escape(path[0].encode())
        # few of the thousands of files have to be parsed
        sign = re.compile(rb"\b(def|class)\s+%b\b|^\s*%b\s*[:=]" % (word, word), flags=re.MULTILINE)
        if path[0].startswith("--") or (len(path) > 1 and path[0].islower()):
            sign = re.compile(re.escape(".".join(path).encode()))
        likely = [file for file, read in self._files.items() if sign.search(read())]
        return [file for file in likely if (found := self.find(path, file)) and found[1] == file]

    def parameters(self, found: Found | None) -> dict[str, bool]:
        """The parameters of a function, or of a class when it is called, each with whether it has a default."""
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
        positional = [*node.args.posonlyargs, *node.args.args]
        num_required = len(positional) - len(node.args.defaults)
        parameters = {arg.arg: i >= num_required for i, arg in enumerate(positional)}
        for arg, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
            parameters[arg.arg] = default is not None
        return {name: has_default for name, has_default in parameters.items() if name not in ("self", "cls")}

    def _tree(self, file: str) -> ast.Module:
        if file not in self._trees:
            self._trees[file] = ast.Module([], [])
            with contextlib.suppress(SyntaxError, ValueError):
                self._trees[file] = ast.parse(self._files[file]())
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

    def _option(self, option: str, file: str) -> Found | None:
        """A call with the option among its arguments."""
        if option.encode() not in self._files[file]():
            return None
        for node in ast.walk(self._tree(file)):
            if isinstance(node, ast.Call) and option in [
                arg.value for arg in node.args if isinstance(arg, ast.Constant)
            ]:
                return node, file
        return None


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a block and of the blocks inside it; not those of functions and classes defined in it."""
    for node in body:
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for inner in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, inner, []))


def _bindings(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.AST]]:
    """The names that a module or class binds, each with the statement that does."""
    for node in _statements(body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)
        else:
            yield from ((target.id, node) for target in _targets(node) if isinstance(target, ast.Name))


def _targets(node: ast.AST) -> Iterator[ast.expr]:
    """What a statement assigns to, tuples taken apart."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    for target in targets:
        yield from target.elts if isinstance(target, ast.Tuple) else [target]


def _own_members(owner: ast.ClassDef) -> dict[str, ast.AST]:
    """Methods, class attributes, and what methods assign to self."""
    members = dict(_bindings(owner.body))
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


def _is_stub(node: ast.AST) -> bool:
    """Whether a method has no body of its own: it raises NotImplementedError, passes or is three dots."""
    if not isinstance(node, Function):
        return False
    last = node.body[-1]
    raises = isinstance(last, ast.Raise) and last.exc is not None and "NotImplementedError" in ast.unparse(last.exc)
    return raises or isinstance(last, ast.Pass) or (isinstance(last, ast.Expr) and isinstance(last.value, ast.Constant))


def _fields(owner: ast.ClassDef) -> Iterator[tuple[str, bool]]:
    """The fields of a dataclass that its constructor takes, each with whether it has a default."""
    for node in owner.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if re.search(r"\b(ClassVar|KW_ONLY)\b", ast.unparse(node.annotation)):
            continue
        has_default, value = node.value is not None, node.value
        if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "field":
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
            if options.get("init") == "False":
                continue
            has_default = "default" in options or "default_factory" in options
        yield node.target.id, has_default
