"""The engine from inside of a GPU worker: its model, its ranks, and prefills of PoC sequences."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from gonka_poc.errors import OtherRankError, UnsupportedServerError
from gonka_poc.vllm_compat.operations import ModelOperations
from gonka_poc.vllm_compat.refusals import forward_options, refuse_unsupported, token_id_vocab_size
from gonka_poc.vllm_compat.scratch import ScratchAttention, has_values

logger = logging.getLogger("vllm.gonka_poc.worker_view")


class WorkerView:
    """The engine of a GPU worker, and the prefill of PoC sequences on it.

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
        # tokens of the longest sequence that a prefill can have
        self.max_prefill_tokens: int = min(
            self._config.model_config.max_model_len, self._config.scheduler_config.max_num_batched_tokens
        )
        # of the pseudo token ids that a model which routes by token id is given; None for every other model
        self.token_id_vocab_size = token_id_vocab_size(self._config.model_config.hf_config)
        self.model = self._runner.get_model() if hasattr(self._runner, "get_model") else self._runner.model
        # a speculator's layers are registered too, but they take no part in the model's forward
        own = set(map(id, self.model.modules()))
        registered = self._config.compilation_config.static_forward_context
        layers = {name: layer for name, layer in registered.items() if id(layer) in own}
        # those with a KV cache (or a recurrent state), by name
        caches = {name: getattr(layer, "kv_cache", None) for name, layer in layers.items()}
        self.attention_layers = {name: layers[name] for name, cache in caches.items() if has_values(cache)}
        refuse_unsupported(self._config, self.model, self.attention_layers)
        self._forward_options = forward_options(self._config)
        self.scratch = ScratchAttention(self._runner, self._config, self.attention_layers)
        self.operations = ModelOperations(self.model, layers, self.device, self._config.model_config.enforce_eager)
        self._metadata_read: Any = None

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
        """The decoder layers of this rank by global index (a pipeline stage holds placeholders for the others).

        vLLM builds the list of them by `make_layers`, and the module that owns it has start_layer and end_layer.
        """
        from vllm.model_executor.models.utils import PPMissingLayer

        expected = self._config.model_config.get_total_num_hidden_layers()
        stacks = _stacks_of(_language_model_of(self.model), expected) or _stacks_of(self.model, expected)
        # a model may list the same layers twice, without the placeholders the second time
        different = {
            tuple(None if isinstance(layer, PPMissingLayer) else id(layer) for layer in stack): stack
            for stack in stacks.values()
        }
        if len(different) != 1:
            raise UnsupportedServerError(
                f"cannot tell the decoder layers of {type(self.model).__name__}: looked for one module list of "
                f"{expected} layers in a module with start_layer and end_layer, found {sorted(stacks) or 'none'}"
            )
        (stack,) = different.values()
        return {i: layer for i, layer in enumerate(stack) if not isinstance(layer, PPMissingLayer)}

    def attention_backends(self) -> str:
        """The names of the attention backends, as vLLM's option takes them, with commas."""
        groups = [group for groups in self._runner.attn_groups for group in groups]
        return ",".join(sorted({group.backend.get_name() for group in groups}))

    # -- other ranks --

    def tensor_parallel_range(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Collective: the smallest and the largest of each of `values` (on the host) among the tensor parallel ranks.

        Every rank of a stage must call this, with values of the same shape.
        """
        lowest, highest = values.clone(), values.clone()
        if self._tp_group.world_size > 1:
            torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN, group=self._tp_group.cpu_group)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=self._tp_group.cpu_group)
        return lowest, highest

    @contextlib.contextmanager
    def error_barrier(self) -> Iterator[None]:
        """Collective: raises on every rank if any rank failed inside.

        Around what can fail on one rank alone: the others would wait in their next collective operation for ever.
        Raises what this rank raised, or OtherRankError.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if self._world_group.world_size > 1:
            failed = torch.tensor(int(failure is not None))
            torch.distributed.all_reduce(failed, group=self._world_group.cpu_group)
            if failed.item() and failure is None:
                raise OtherRankError(f"{failed.item()} other rank(s) failed in this batch")
        if failure is not None:
            raise failure

    # -- one prefill --

    @contextlib.contextmanager
    def prefill(
        self, num_seqs: int, seq_len: int, token_ids: torch.Tensor | None = None, skip_compiled: bool = True
    ) -> Iterator[Callable[[], Any]]:
        """Prepares one run of the model over `num_seqs` fresh sequences of `seq_len` tokens, on scratch KV cache.

        Gives the function that runs it on embeddings that the caller injects. It returns the model's output after the
        final norm, [num_seqs * seq_len, hidden_size], on the last pipeline rank and None on the others; it alone talks
        to other ranks. `token_ids` (int32 [num_seqs * seq_len], on every rank) is what the model gets as its
        `input_ids`; without them it gets zeros, which nothing may read. The serving KV cache is neither read nor
        written. Without `skip_compiled` a compiled model runs compiled, as for chat; then no hook inside of it is
        called.
        """
        from vllm.forward_context import set_forward_context
        from vllm.sequence import IntermediateTensors

        num_tokens = num_seqs * seq_len
        positions = torch.arange(seq_len, device=self.device).repeat(num_seqs)
        input_ids = token_ids
        if input_ids is None:
            input_ids = torch.zeros(num_tokens, dtype=torch.int32, device=self.device)

        def run() -> Any:
            received = None
            if not self.is_first_rank:
                received = IntermediateTensors(self._pp_group.recv_tensor_dict(all_gather_group=self._tp_group))
            with set_forward_context(metadata, self._config, num_tokens=num_tokens, **options):
                output = self.model(
                    input_ids=input_ids, positions=self._model_positions(positions), intermediate_tensors=received
                )
            if not self.is_last_rank:
                self._pp_group.send_tensor_dict(output.tensors, all_gather_group=self._tp_group)
                return None
            # a model that also feeds a speculator returns (hidden states, auxiliary hidden states)
            return output[0] if isinstance(output, tuple) else output

        self.settle()
        with self.scratch.installed(num_seqs, seq_len), self.synchronized_on_failure():
            metadata, slot_mapping = self.scratch.metadata(num_seqs, seq_len, positions)
            if self.device.type == "cuda":
                self._metadata_read = torch.cuda.Event(blocking=True)
                self._metadata_read.record()
            options = dict(self._forward_options)
            if "slot_mapping" in options:
                options["slot_mapping"] = slot_mapping
            if not skip_compiled:
                options.pop("skip_compiled", None)
            yield run

    @contextlib.contextmanager
    def synchronized_on_failure(self) -> Iterator[None]:
        """A failure leaves this only when the device has done all that it was given.

        Until then the device may use what the failure releases, and the host buffers of the engine's builders.
        """
        try:
            yield
        except BaseException:
            self._synchronize()
            raise

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            try:
                torch.accelerator.synchronize(self.device)
            except RuntimeError:  # the device itself failed, and does no more; every later call will say so
                logger.exception("PoC: the device did not finish what it was given")

    def settle(self) -> None:
        """Returns when the device has read what the engine's builders wrote for the last prefill.

        They write into buffers on the host that they use again, for chat too, and that the device reads in its turn.
        """
        if self._metadata_read is not None:
            self._metadata_read.synchronize()
            self._metadata_read = None
        # An aborted step of chat can still be on its way to the device: this is the engine's own guard of the buffers.
        # It is None where each step waits for the device. The V2 runner has none.
        event = getattr(self._runner, "prepare_inputs_event", None)
        if event is not None:
            event.synchronize()

    def logits(self, hidden: Any) -> Any:
        """The model's logits of `hidden` [n, hidden_size]: [n, vocab_size] on the output rank, None on others.

        Every tensor parallel rank of the last stage must call this.
        """
        return self.model.compute_logits(hidden)

    def is_attention(self, module: nn.Module) -> bool:
        """True if `module` has a KV cache (or a recurrent state)."""
        return any(module is layer for layer in self.attention_layers.values())

    def release(self) -> None:
        """Drop the scratch KV cache, once the device is done with it."""
        self._synchronize()
        self.scratch.release()

    def _model_positions(self, positions: Any) -> Any:
        """Multi-axis rotary models (M-RoPE) take one row per axis; text has the same position on each."""
        model_config = self._config.model_config
        axes = getattr(model_config, "mrope_num_dims", 3) if model_config.uses_mrope else 0  # 0.30
        axes = axes or getattr(model_config, "uses_xdrope_dim", 0)  # until 0.29
        return positions.expand(axes, -1) if axes else positions


def _stacks_of(model: nn.Module, length: int) -> dict[str, nn.ModuleList]:
    """The module lists of `length` in a module of `model` with start_layer and end_layer, by name."""
    return {
        f"{name}.{child_name}": child
        for name, module in model.named_modules()
        if hasattr(module, "start_layer") and hasattr(module, "end_layer")
        for child_name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == length
    }


def _language_model_of(model: nn.Module) -> nn.Module:
    """The language model inside of a multimodal one, whose encoders may have as many layers; else `model`."""
    try:
        found = model.get_language_model() if hasattr(model, "get_language_model") else None
    except NotImplementedError:  # a model that cannot tell
        found = None
    return found if isinstance(found, nn.Module) else model
