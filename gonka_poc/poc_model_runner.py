"""A PoC batch on one worker: embeddings in, reflected prefill, vectors or distances out."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from gonka_poc.compiled_layers import CompiledReflections, LastPositions, LayerCompiler
from gonka_poc.data import DistanceSpec, Randomization, Spec, VectorSpec
from gonka_poc.errors import PoCError, RequestError, UnsupportedServerError
from gonka_poc.gpu_random import (
    PROJECTION_DIM,
    artifact_vectors,
    layer_reflection,
    nonce_inputs,
    nonce_projection,
    permuted_distances,
    projected_distances,
    random_projection,
    target,
)
from gonka_poc.layer_hooks import LayerReflections
from gonka_poc.vllm_compat import WorkerView

logger = logging.getLogger("vllm.gonka_poc.model_runner")

# A compiled forward whose vectors are further from the plain one's is not used: half of the distance at which a
# validator takes two vectors for different ones by default (0.02). How far rounding alone goes depends on the model.
MAX_COMPILED_DISTANCE = 0.01
# A batch that was computed ahead is kept while this many others that look ahead pass it: two callers may take turns.
MAX_PASSED = 1


class EmbeddingInjectionHook:
    """Context manager: the next forward of `model` sees `embeddings` in place of its token ids.

    vLLM's V1 runners call a model with `input_ids`; the hook leaves those as dummies and hands `embeddings`
    ([num_tokens, hidden_size], model dtype) to the model's own `inputs_embeds` path, so that a model which
    scales the output of its embedding table skips that scaling, as it does in vLLM. `embeddings` None (a later
    pipeline rank, whose input comes from the rank before it) injects nothing.

    Raises UnsupportedServerError if the model has no `inputs_embeds`, and on a clean exit if the model was not
    called exactly once. The hook is gone after the exit, whatever was raised.
    """

    def __init__(self, model: nn.Module, embeddings: torch.Tensor | None) -> None:
        if "inputs_embeds" not in inspect.signature(model.forward).parameters:
            raise UnsupportedServerError(
                f"{type(model).__name__}.forward has no inputs_embeds, so embeddings cannot be given to it; looked at "
                f"{list(inspect.signature(model.forward).parameters)}"
            )
        self._model = model
        self._embeddings = embeddings
        self._calls = 0
        self._handle: Any = None

    def __enter__(self) -> EmbeddingInjectionHook:
        self._handle = self._model.register_forward_pre_hook(self._inject, with_kwargs=True)
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        self._handle.remove()
        self._handle = None
        if exc_type is None and self._calls != 1:
            raise UnsupportedServerError(
                f"the model must be called exactly once with the injected embeddings; it was called {self._calls} times"
            )

    def _inject(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._calls += 1
        return args, {**kwargs, "inputs_embeds": self._embeddings}


@dataclass
class _Round:
    """What the batches of one block hash share, made when it is first needed and kept on the device."""

    block_hash: str
    reflections: dict[int, torch.Tensor]
    projection: torch.Tensor | None = None
    target: torch.Tensor | None = None


@dataclass
class _Launched:
    """A batch that the device was given: its values, one row a nonce, are on their way to the host.

    They are None on a rank that has none.
    """

    spec: VectorSpec | DistanceSpec
    nonces: Sequence[int]
    on_host: torch.Tensor | None
    ready: torch.cuda.Event | None
    failure: Exception | None = None
    num_passed: int = 0  # calls of another spec that would have looked ahead themselves

    @staticmethod
    def on_way(spec: VectorSpec | DistanceSpec, nonces: Sequence[int], values: torch.Tensor | None) -> _Launched:
        """With the copy of `values` to the host behind what makes them."""
        if values is None or not values.is_cuda:
            return _Launched(spec, nonces, None if values is None else values.cpu(), None)
        on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        on_host.copy_(values, non_blocking=True)
        ready = torch.cuda.Event(blocking=True)
        ready.record()
        return _Launched(spec, nonces, on_host, ready)

    def num_asked(self, nonces: Sequence[int]) -> int:
        """How many of the first of `nonces` are the first ones here."""
        pairs = zip(nonces, self.nonces, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def part(self, start: int, stop: int | None = None) -> _Launched:
        """Some of its rows."""
        values = None if self.on_host is None else self.on_host[start:stop]
        return _Launched(self.spec, self.nonces[start:stop], values, self.ready, self.failure)

    def values(self) -> np.ndarray | None:
        """Its rows, when the device has them ready."""
        if self.ready is not None:
            self.ready.synchronize()
        return None if self.on_host is None else self.on_host.numpy()


def _largest_norm(rows: np.ndarray) -> float:
    """The largest L2 norm of a row; infinite where one is not a number."""
    return float(np.nan_to_num(np.linalg.norm(rows, axis=-1), nan=np.inf).max())


class PoCModelRunner:
    """Computes PoC batches on the worker behind `view`; one object a worker, made at its first PoC call."""

    def __init__(self, view: WorkerView) -> None:
        self._view = view
        self._layers = view.decoder_layers()
        self._round: _Round | None = None
        self._ahead: _Launched | None = None
        self._compiler: LayerCompiler | None = None
        self._compiled_distance: float | None = None
        self._last_positions: LastPositions | None = None
        # asked for now, so that a model that cannot be used is refused before the first batch
        EmbeddingInjectionHook(view.model, None)

    @property
    def view(self) -> WorkerView:
        """The worker that this computes on."""
        return self._view

    def describe(self) -> dict[str, Any]:
        """Rank, kind of device and layers of this worker, for the log, for the warm-up and for tests.

        Prepares the smallest prefill, so that a server that cannot be prepared for one is refused here.
        """
        view = self._view
        with view.agreement(), view.prefill(1, 1):
            pass
        return {
            "rank": view.rank,
            "device": view.device.type,
            "layers": sorted(self._layers),
            "is_output_rank": view.is_output_rank,
        }

    @torch.inference_mode()
    def compute(self, spec: Spec, nonces: Sequence[int], next_nonces: Sequence[int] = ()) -> dict[str, Any] | None:
        """The artifact vectors or distances of `nonces`, on the output rank; None on every other rank.

        Returns {"nonces": the same again, "values": bytes, `spec.value_dtype` [len(nonces), *spec.value_shape],
        "finite": list[bool]}; a value that is not finite must not be sent. Every rank makes the same inputs and runs
        its part of the same forward. `next_nonces` are those of the call that is expected next: they are computed while
        this answer is on its way, and taken from there if that call comes.
        """
        if isinstance(spec, VectorSpec) and spec.k_dim > self._view.hidden_size:
            raise RequestError(f"k_dim {spec.k_dim} is larger than the model's hidden size {self._view.hidden_size}")
        values = self._values(spec, nonces, next_nonces)
        if values is None:
            return None
        finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
        return {
            "nonces": list(nonces),
            "values": values.astype(spec.value_dtype).tobytes(),
            "finite": finite.tolist(),
        }

    @torch.inference_mode()
    def warm_up(self, seq_len: int, num_nonces: int, first: int = 0) -> dict[str, Any]:
        """Compile the decoder layers with a batch of this size, and use them as long as their vectors are right.

        Called again with another `first` nonce it compares more vectors: rounding that sends a token to other experts
        is rare, and its vectors are far apart.

        Returns {"compiled": whether all ranks use them, "distance": the largest L2 so far of a vector to that of the
        plain forward, on the output rank}. A model whose layers cannot be compiled goes on with the plain forward, and
        so do all ranks where one of them cannot.
        """
        spec = VectorSpec("warm-up", "warm-up", seq_len, min(12, self._view.hidden_size))
        nonces = range(first, first + num_nonces)
        compiler, self._compiler = self._compiler, None
        calls = None
        if compiler is None and self._view.is_last_rank:
            calls = LastPositions.watch(self._layers, self._view.is_attention)
        with calls or contextlib.nullcontext():
            plain = self._values(spec, nonces)
        try:
            with self._view.agreement():
                with self._view.agreement():  # a batch begins with one of its own, which all ranks have to reach
                    if compiler is None:
                        self._last_positions = calls.found() if calls else None
                    self._compiler = compiler or LayerCompiler()
                compiled = self._values(spec, nonces)
                one = self._values(spec, nonces[:1])  # torch compiles a single sequence by itself
                if plain is not None and compiled is not None and one is not None:
                    differences = np.concatenate([compiled - plain, one - plain[:1]])
                    self._compiled_distance = max(self._compiled_distance or 0.0, _largest_norm(differences))
                    if not self._compiled_distance <= MAX_COMPILED_DISTANCE:
                        raise UnsupportedServerError(
                            f"the compiled layers gave vectors at a distance of {self._compiled_distance:g}"
                        )
        except Exception as error:
            if isinstance(error, PoCError):
                logger.warning("PoC goes on with the plain forward: %s", error)
            else:
                logger.exception("PoC goes on with the plain forward: the decoder layers cannot be compiled")
            self._compiler = self._last_positions = None
        self.release()
        return {"compiled": self._compiler is not None, "distance": self._compiled_distance}

    def release(self) -> None:
        """Drop what is kept between calls: the scratch KV cache, the tensors of the round, a batch computed ahead."""
        self._round = self._ahead = None
        self._view.release()

    # -- batches --

    def _values(
        self, spec: VectorSpec | DistanceSpec, nonces: Sequence[int], following: Sequence[int] = ()
    ) -> np.ndarray | None:
        """The values of `nonces` on the host, on the output rank. Nothing stays behind where it fails."""
        try:
            asked = self._asked_of_ahead(spec, nonces, bool(following))
            count = sum(len(part.nonces) for part in asked)
            if count < len(nonces):
                asked.append(self._launch(spec, nonces[count:]))
            if self._ahead is None and following:
                self._look_ahead(spec, following)
            # only now, with the next batch given to the device, is this one waited for
            parts = [values for part in asked if (values := part.values()) is not None]
            self._view.settle()
        except BaseException:
            self.release()
            raise
        return np.concatenate(parts) if parts else None

    def _asked_of_ahead(
        self, spec: VectorSpec | DistanceSpec, nonces: Sequence[int], looks_ahead: bool
    ) -> list[_Launched]:
        """What was computed ahead of the first of `nonces`; a batch ahead of other nonces of `spec` is dropped.

        One of another spec is kept for its next call, but not for ever: a round that was stopped asks for it no more,
        and the round behind it has to look ahead. Raises what kept the batch from being computed.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return []
        if ahead.spec != spec:
            ahead.num_passed += looks_ahead
            if ahead.num_passed <= MAX_PASSED:
                self._ahead = ahead
            return []
        count = ahead.num_asked(nonces)
        if count and ahead.failure is not None:
            raise ahead.failure
        if 0 < count < len(ahead.nonces):
            self._ahead = ahead.part(count)
        return [ahead.part(0, count)] if count else []

    def _look_ahead(self, spec: VectorSpec | DistanceSpec, nonces: Sequence[int]) -> None:
        """Have the device compute `nonces` next. What fails here is raised when they are asked for."""
        try:
            self._ahead = self._launch(spec, nonces)
        except Exception as error:
            self._ahead = _Launched(spec, nonces, None, None, error)

    def _launch(self, spec: VectorSpec | DistanceSpec, nonces: Sequence[int]) -> _Launched:
        """Give a batch to the device, without waiting for it; all ranks give it, or none.

        What a rank does before the forward and behind it can fail on that rank alone (memory is short, say). The others
        hear of it before they go on, with this batch or with the next one.
        """
        with contextlib.ExitStack() as stack:
            with self._view.agreement():
                run, finish = self._prepared(stack, spec, nonces)
            with self._view.agreement(), stack:
                hidden = self._last_hidden_states(run(), spec, nonces)
                return _Launched.on_way(spec, nonces, None if hidden is None else finish(hidden))

    def _prepared(
        self, stack: contextlib.ExitStack, spec: VectorSpec | DistanceSpec, nonces: Sequence[int]
    ) -> tuple[Callable[[], Any], Callable[[torch.Tensor], torch.Tensor | None]]:
        """The forward of a batch, its contexts on `stack`, and what makes its values of the last hidden states."""
        view = self._view
        finish: Callable[[torch.Tensor], torch.Tensor | None]
        if isinstance(spec, VectorSpec):
            # what can be made ahead of the forward is, so that only the hidden states are missing when it ends
            hooked, normalise, stronger_rng = True, False, spec.poc_stronger_rng
            finish = self._vectors(spec, nonces)
        else:
            hooked, normalise, stronger_rng = spec.randomization == Randomization.LAYER_HOOKS, True, False
            finish = partial(self._distances, spec, nonces)
        reflections = self._round_of(spec.block_hash).reflections if hooked else {}
        embeddings = None
        if view.is_first_rank:
            who, size = (spec.block_hash, spec.public_key, nonces), (spec.seq_len, view.hidden_size)
            embeddings = nonce_inputs(*who, *size, view.dtype, view.device, stronger_rng).flatten(0, 1)
        run = stack.enter_context(view.prefill(len(nonces), spec.seq_len))
        compiler = self._compiler_for(spec)
        if compiler is not None:
            stack.enter_context(view.compilable())
            stack.enter_context(CompiledReflections(self._layers, reflections, compiler))
            if self._last_positions is not None:
                stack.enter_context(self._last_positions.kept(len(nonces), spec.seq_len, view.device))
        else:
            stack.enter_context(view.eager_kernels())
            if reflections:
                stack.enter_context(LayerReflections(self._layers, reflections, normalise))
        stack.enter_context(EmbeddingInjectionHook(view.model, embeddings))
        return run, finish

    def _compiler_for(self, spec: VectorSpec | DistanceSpec) -> LayerCompiler | None:
        """What runs the decoder layers of a batch; None for the plain forward.

        Distances are compared far more closely than vectors are: all hosts compute them with the same operations.
        """
        return self._compiler if isinstance(spec, VectorSpec) else None

    def _last_hidden_states(
        self, output: torch.Tensor | None, spec: VectorSpec | DistanceSpec, nonces: Sequence[int]
    ) -> torch.Tensor | None:
        """The model's output at the last position: [len(nonces), hidden_size] on the last pipeline rank."""
        if output is None:
            return None
        size = (len(nonces), self._view.hidden_size)
        if self._compiler_for(spec) and self._last_positions and tuple(output.shape) == size:
            return output
        expected = (len(nonces) * spec.seq_len, self._view.hidden_size)
        if tuple(output.shape) != expected:
            raise UnsupportedServerError(
                f"the model returned hidden states of shape {tuple(output.shape)}, not {expected}"
            )
        return output.view(len(nonces), spec.seq_len, self._view.hidden_size)[:, -1]

    def _vectors(self, spec: VectorSpec, nonces: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor | None]:
        """What makes artifact vectors of the last hidden states, on the output rank."""
        if not self._view.is_output_rank:
            return lambda hidden: None
        size, device = self._view.hidden_size, self._view.device
        projection = nonce_projection(spec.block_hash, spec.public_key, nonces, size, spec.k_dim, device)
        return lambda hidden: artifact_vectors(hidden, projection)

    def _distances(self, spec: DistanceSpec, nonces: Sequence[int], hidden: torch.Tensor) -> torch.Tensor | None:
        """Distances of the last hidden states, on the output rank."""
        mode = Randomization(spec.randomization)
        who = (spec.block_hash, spec.public_key, nonces)
        if mode is Randomization.PERMUTATION:
            logits = self._view.logits(hidden)  # every tensor parallel rank takes part
            if not self._view.is_output_rank:
                return None
            return permuted_distances(*who, logits, self._target(spec.block_hash, logits.shape[-1]))
        if not self._view.is_output_rank:
            return None
        flip = mode is Randomization.SIGN_FLIPS
        target_vector = self._target(spec.block_hash, PROJECTION_DIM)
        return projected_distances(*who, hidden, flip, self._projection(spec.block_hash), target_vector)

    # -- what a round shares --

    def _projection(self, block_hash: str) -> torch.Tensor:
        current = self._round_of(block_hash)
        if current.projection is None:
            current.projection = random_projection(block_hash, self._view.hidden_size, self._view.device)
        return current.projection

    def _target(self, block_hash: str, size: int) -> torch.Tensor:
        current = self._round_of(block_hash)
        if current.target is None or len(current.target) != size:
            current.target = target(block_hash, size, self._view.device)
        return current.target

    def _round_of(self, block_hash: str) -> _Round:
        if self._round is None or self._round.block_hash != block_hash:
            size, device = self._view.hidden_size, self._view.device
            vectors = {i: layer_reflection(block_hash, i, size, device) for i in self._layers}
            self._round = _Round(block_hash, vectors)
        return self._round
