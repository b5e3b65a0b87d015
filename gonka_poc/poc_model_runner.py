"""A PoC batch on one worker: embeddings in, reflected prefill, vectors or distances out."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from gonka_poc.cheats import cheating
from gonka_poc.compiled_layers import CompiledReflections, LastPositions, LayerCompiler, NormSearch
from gonka_poc.data import Randomization, Spec, VectorSpec
from gonka_poc.errors import PoCError, RequestError, UnsupportedServerError
from gonka_poc.forward_probe import probe
from gonka_poc.gpu_random import NonceKeys, nonce_inputs, nonce_token_ids
from gonka_poc.layer_hooks import LayerReflections
from gonka_poc.noise_floor import CompiledCheck, moved_by_one_step
from gonka_poc.prefetch import InFlightBatch, Prefetched
from gonka_poc.round_tensors import RandomHead, RoundTensors
from gonka_poc.vllm_compat.worker import WorkerView

logger = logging.getLogger("vllm.gonka_poc.model_runner")


class EmbeddingInjectionHook:
    """Context manager: the next forward of `model` sees `embeddings` in place of its token ids.

    `embeddings` ([num_tokens, hidden_size], model dtype) go to the model's own `inputs_embeds` path, so that a model
    which scales the output of its embedding table skips that scaling, as it does in vLLM. None (a later pipeline rank,
    whose input comes from the rank before it) injects nothing.

    Raises UnsupportedServerError if the model has no `inputs_embeds`, and on a clean exit if the model was not
    called exactly once. The hook is gone after the exit, whatever was raised.
    """

    def __init__(self, model: nn.Module, embeddings: torch.Tensor | None) -> None:
        parameters = list(inspect.signature(model.forward).parameters)
        if "inputs_embeds" not in parameters:
            raise UnsupportedServerError(
                f"{type(model).__name__}.forward has no inputs_embeds, so embeddings cannot be given to it; looked at "
                f"{parameters}"
            )
        self._model, self._embeddings = model, embeddings
        self._calls = 0
        self._handle: Any = None

    def __enter__(self) -> EmbeddingInjectionHook:
        self._handle = self._model.register_forward_pre_hook(self._inject, with_kwargs=True)
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        self._handle.remove()
        if exc_type is None and self._calls != 1:
            raise UnsupportedServerError(
                f"the model must be called exactly once with the injected embeddings; it was called {self._calls} times"
            )

    def _inject(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._calls += 1
        return args, {**kwargs, "inputs_embeds": self._embeddings}


class PoCModelRunner:
    """Computes PoC batches on the worker behind `view`; one object per worker, made at its first PoC call."""

    def __init__(self, view: WorkerView) -> None:
        self.view = view
        self._layers = view.decoder_layers()
        self._tensors: RoundTensors | None = None
        self._head: RandomHead | None = None
        self._prefetched = Prefetched()
        self._compiler: LayerCompiler | None = None
        self._compiled_check = CompiledCheck()
        self._last_positions: LastPositions | None = None
        self._partial_layers: list[int] | None = None  # None before the model was probed
        # asked for now, so that a model that cannot be used is refused before the first batch
        EmbeddingInjectionHook(view.model, None)

    def describe(self) -> dict[str, Any]:
        """Rank, device, layers, dtype and attention of this worker, for the log, the warm-up and GET /versions.

        Runs the smallest prefill, so that a server that cannot give correct vectors is refused here.
        """
        view = self.view
        self._probe()
        return {
            "rank": view.rank,
            "device": view.device.type,
            "gpu": torch.cuda.get_device_name(view.device) if view.device.type == "cuda" else view.device.type,
            "dtype": str(view.dtype).removeprefix("torch."),
            "attention_backend": view.attention_backends(),
            "layers": sorted(self._layers),
            "is_output_rank": view.is_output_rank,
        }

    @torch.inference_mode()
    def compute(self, spec: Spec, nonces: Sequence[int], next_nonces: Sequence[int] = ()) -> dict[str, Any] | None:
        """The artifact vectors or distances of `nonces`, on the output rank; None on every other rank.

        Returns {"nonces": the same again, "values": bytes, `spec.value_dtype` [len(nonces), *spec.value_shape],
        "finite": list[bool]}; a value that is not finite must not be sent. `next_nonces`, those of the call that is
        expected next, are computed while this answer is on its way.
        """
        if isinstance(spec, VectorSpec) and spec.k_dim > self.view.hidden_size:
            raise RequestError(f"k_dim {spec.k_dim} is larger than the model's hidden size {self.view.hidden_size}")
        values = self._values(spec, nonces, next_nonces)
        if values is None:
            return None
        finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
        return {"nonces": list(nonces), "values": values.astype(spec.value_dtype).tobytes(), "finite": finite.tolist()}

    @torch.inference_mode()
    def prepare(self, spec: Spec, budget_sec: float) -> dict[str, Any]:
        """Make a part of what batches of `spec` need, in about `budget_sec`; a batch makes at once what is missing.
        Returns {"ready": whether there is all of it}."""
        try:
            head = self._head_of(spec)
            return {"ready": head is None or head.make(budget_sec)}
        except BaseException:
            self.release()
            raise

    def _head_of(self, spec: Spec) -> RandomHead | None:
        """The random head of a spec, which may be incomplete; None where this rank needs none for it."""
        if not RoundTensors.needs_head(spec, self.view):
            return None
        if self._head is None or self._head.block_hash != spec.block_hash:
            self._head = None  # its memory is free before the next one is asked for
            self._head = RandomHead(spec.block_hash, self.view)
        return self._head

    @torch.inference_mode()
    def warm_up(self, seq_len: int, num_nonces: int, first: int = 0) -> dict[str, Any]:
        """Compile the decoder layers with a batch of this size, and use them as long as their vectors are right.

        They are where they are no further from those of the plain forward than the model's noise floor is wide
        (`noise_floor.CompiledCheck`), which is measured here too. Called again with another `first` nonce it compares
        more vectors. Where one rank cannot compile its layers, all go on with the plain forward.

        Returns {"compiled": whether all ranks use them}, on the output rank also the figures of CompiledCheck so far.
        """
        self._probe()
        spec = VectorSpec("warm-up", "warm-up", seq_len, min(12, self.view.hidden_size))
        nonces = range(first, first + num_nonces)
        compiler, self._compiler = self._compiler, None
        calls = None
        if compiler is None and self.view.is_last_rank:
            calls = NormSearch(self._layers[max(self._layers)], self.view.is_attention)
        with calls or contextlib.nullcontext():
            plain = self._values(spec, nonces)
        moved = self._values(replace(spec, moved=1), nonces)
        try:
            with self.view.error_barrier():
                with self.view.error_barrier():  # a batch begins with one of its own, which all ranks have to reach
                    if compiler is None:
                        self._last_positions = calls.found() if calls else None
                    self._compiler = compiler or LayerCompiler(not self.view.operations.all_round())
                compiled = self._values(spec, nonces)
                one = self._values(spec, nonces[:1])  # torch compiles a single sequence by itself
                if plain is not None and moved is not None and compiled is not None and one is not None:
                    self._compiled_check.add(plain, moved, compiled)
                    self._compiled_check.add(plain[:1], moved[:1], one)
                    self._compiled_check.refuse_far_layers()
        except Exception as error:
            if isinstance(error, PoCError):
                logger.warning("PoC goes on with the plain forward: %s", error)
            else:
                logger.exception("PoC goes on with the plain forward: the decoder layers cannot be compiled")
            self._compiler = self._last_positions = None
        self.release()
        return {"compiled": self._compiler is not None, **self._compiled_check.figures()}

    def release(self) -> None:
        """Drop what is kept between calls: the scratch KV cache, the tensors of the round, a prefetched batch."""
        self.view.release()  # waits for the device first
        self._tensors = self._head = None
        self._prefetched = Prefetched()

    @torch.inference_mode()
    def _probe(self) -> None:
        """Collective, before the first batch: `forward_probe.probe` of the model. Raises what that raises."""
        if self._partial_layers is None:
            try:
                self._partial_layers = probe(self.view, self._layers, self._probe_inputs)
            except BaseException:
                self.release()
                raise

    def _probe_inputs(self, num_tokens: int) -> tuple[torch.Tensor | None, EmbeddingInjectionHook]:
        keys = NonceKeys("probe", "probe", [0])
        hook = EmbeddingInjectionHook(self.view.model, self._embeddings(keys, num_tokens))
        return self._token_ids(keys, num_tokens), hook

    def _values(self, spec: Spec, nonces: Sequence[int], next_nonces: Sequence[int] = ()) -> np.ndarray | None:
        """The values of `nonces` on the host, on the output rank. Nothing stays behind where it fails."""
        try:
            batches = self._prefetched.take(spec, nonces, bool(next_nonces))
            count = sum(len(batch.nonces) for batch in batches)
            if count < len(nonces):
                batches.append(self._launch(spec, nonces[count:]))
            if next_nonces and self._prefetched.is_empty:
                try:
                    self._prefetched.put(self._launch(spec, next_nonces))
                except Exception as error:  # raised when they are asked for
                    self._prefetched.put(InFlightBatch(spec, next_nonces, None, None, error))
            # only now, with the next batch given to the device, is this one waited for
            parts = [values for batch in batches if (values := batch.values()) is not None]
            self.view.settle()
        except BaseException:
            self.release()
            raise
        return np.concatenate(parts) if parts else None

    def _launch(self, spec: Spec, nonces: Sequence[int]) -> InFlightBatch:
        """Give a batch to the device, without waiting for it; all ranks give it, or none.

        What a rank does before and after the forward can fail on it alone (memory is short, say). The others hear of it
        before they go on.
        """
        self._probe()
        # a failure, here or on another rank, waits for the device before anything on the stack is released
        with contextlib.ExitStack() as stack, self.view.synchronized_on_failure():
            with self.view.error_barrier():
                run, finish = self._prepared(stack, spec, nonces)
            with self.view.error_barrier():
                hidden = self._last_hidden_states(run(), spec, nonces)
                batch = InFlightBatch.launched(spec, nonces, None if hidden is None else finish(hidden))
                stack.close()  # refuses a forward that went past its hooks
        return batch

    def _prepared(
        self, stack: contextlib.ExitStack, spec: Spec, nonces: Sequence[int]
    ) -> tuple[Callable[[], Any], Callable[[torch.Tensor], torch.Tensor | None]]:
        """The forward of a batch, its contexts on `stack`, and what makes its values of the last hidden states."""
        view = self.view
        if self._tensors is None or self._tensors.block_hash != spec.block_hash:
            self._tensors = RoundTensors(spec.block_hash, view, self._layers)
        tensors = self._tensors
        finish: Callable[[torch.Tensor], torch.Tensor | None]
        if isinstance(spec, VectorSpec):
            # what can be made before the forward is, so that only the hidden states are missing when it ends
            hooked, normalise, stronger_rng, moved = True, False, spec.poc_stronger_rng, spec.moved
            finish = tensors.vectors_of(spec, nonces)
        else:
            hooked, normalise, stronger_rng, moved = spec.randomization == Randomization.LAYER_HOOKS, True, False, 0
            head = self._head_of(spec)
            if head is not None:
                head.make()
            finish = partial(tensors.distances, spec, nonces, head)
        reflections = tensors.reflections if hooked else {}
        if hooked and normalise:
            self._refuse_partial_sums()
        keys = NonceKeys(spec.block_hash, spec.public_key, nonces)
        embeddings = self._embeddings(keys, spec.seq_len, stronger_rng, moved)
        run = stack.enter_context(view.prefill(len(nonces), spec.seq_len, self._token_ids(keys, spec.seq_len)))
        compiler = self._compiler_for(spec)
        if compiler is not None:
            stack.enter_context(compiler.settings())
            stack.enter_context(view.operations.compilable())
            stack.enter_context(CompiledReflections(self._layers, reflections, compiler))
            if self._last_positions is not None:
                stack.enter_context(self._last_positions.kept(len(nonces), spec.seq_len, view.device))
        else:
            stack.enter_context(view.operations.eager_kernels())
            if reflections:
                stack.enter_context(LayerReflections(self._layers, reflections, normalise))
        if isinstance(spec, VectorSpec) and spec.cheat is not None:
            stack.enter_context(cheating(spec.cheat, view, self._layers, len(nonces) * spec.seq_len))
        stack.enter_context(EmbeddingInjectionHook(view.model, embeddings))
        return run, finish

    def _embeddings(self, keys: NonceKeys, seq_len: int, strong: bool = False, moved: int = 0) -> torch.Tensor | None:
        """The input of the model, [len(keys) * seq_len, hidden_size], on the first pipeline rank."""
        view = self.view
        if not view.is_first_rank:
            return None
        made = nonce_inputs(keys, seq_len, view.hidden_size, view.dtype, view.device, strong).flatten(0, 1)
        return moved_by_one_step(made, seq_len, moved - 1) if moved else made

    def _token_ids(self, keys: NonceKeys, seq_len: int) -> torch.Tensor | None:
        """The pseudo token ids of a model that has them, [len(keys) * seq_len], on every rank: any stage may route."""
        if self.view.token_id_vocab_size is None:
            return None
        return nonce_token_ids(keys, seq_len, self.view.token_id_vocab_size, self.view.device).flatten()

    def _refuse_partial_sums(self) -> None:
        """Raise UnsupportedServerError where a layer's output would be divided by another norm than its own."""
        if self._partial_layers:
            raise UnsupportedServerError(
                f"randomization layer_hooks divides what each decoder layer returns by its norm; on this server layers "
                f"{self._partial_layers} return a part of a sum on each tensor parallel rank. Ask for sign_flips, or "
                "start the server with --tensor-parallel-size 1"
            )

    def _compiler_for(self, spec: Spec) -> LayerCompiler | None:
        # distances are compared far more closely than vectors: all hosts compute them with the same operations
        return self._compiler if isinstance(spec, VectorSpec) and spec.cheat is None else None

    def _last_hidden_states(
        self, output: torch.Tensor | None, spec: Spec, nonces: Sequence[int]
    ) -> torch.Tensor | None:
        """The model's output at the last position: [len(nonces), hidden_size] on the last pipeline rank."""
        if output is None:
            return None
        shape = tuple(output.shape)
        if self._compiler_for(spec) and self._last_positions and shape == (len(nonces), self.view.hidden_size):
            return output
        expected = (len(nonces) * spec.seq_len, self.view.hidden_size)
        if shape != expected:
            raise UnsupportedServerError(f"the model returned hidden states of shape {shape}, not {expected}")
        return output.view(len(nonces), spec.seq_len, self.view.hidden_size)[:, -1]
