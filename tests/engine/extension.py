"""A worker extension for tests: ours, plus looks at the worker's state and faults that strike the next forward once."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from vllm.forward_context import is_forward_context_available

from gonka_poc import poc_model_runner, round_tensors
from gonka_poc.worker import PoCWorkerExtension


class Probe(PoCWorkerExtension):
    """Reached through vLLM's POST /collective_rpc; answers are dicts, since it makes text of anything else."""

    # -- looking --

    def poc_test_cache_digests(self) -> dict[str, str]:
        """SHA-256 of the serving KV cache, by layer."""
        return {
            name: hashlib.sha256(_cache_of(layer).contiguous().view(torch.uint8).numpy()).hexdigest()
            for name, layer in _attention_layers(self).items()
        }

    def poc_test_state(self) -> dict[str, Any]:
        """What a forward may leave behind; a cache counts as moved if it is not the object of the first call."""
        layers = _attention_layers(self)
        if not hasattr(self, "poc_test_first_caches"):
            self.poc_test_first_caches = {name: layer.kv_cache for name, layer in layers.items()}
        first = self.poc_test_first_caches
        hooks = [h for m in self.model_runner.model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
        runner = getattr(self, "poc_runner", None)
        return {
            "num_hooks": len(hooks),
            "moved_caches": [name for name, layer in layers.items() if layer.kv_cache is not first[name]],
            "num_scratch": len(runner.view.scratch._caches) if runner else 0,
            "has_round": runner is not None and runner._tensors is not None,
            "forward_context": is_forward_context_available(),
        }

    def poc_test_runner(self) -> dict[str, list[str]]:
        """The modules of the classes that make up the model runner, the nearest first."""
        return {"modules": [cls.__module__ for cls in type(self.model_runner).__mro__]}

    # -- faults --

    def poc_test_fail_once(self, where: str, rank: int | None = None, memory: bool = False) -> None:
        """The next call of what `where` names raises, with `memory` for want of it; with `rank` there only."""
        if rank not in (None, self.rank):
            return
        model = self.model_runner.model.model
        group = self.model_runner.attn_groups[0][0]
        attention = _attention_layers(self)[group.layer_names[1]]
        owner, name = {
            "inputs": (poc_model_runner, "nonce_inputs"),
            "metadata builder": (group.get_metadata_builder(0), "build"),
            "first layer": (model.layers[0], "forward"),
            "attention": (attention.impl, "forward"),
            "middle layer": (model.layers[len(model.layers) // 2], "forward"),
            "final norm": (model.norm, "forward"),
            "projection": (round_tensors, "nonce_projection"),
            "vectors": (round_tensors, "artifact_vectors"),
        }[where]

        def fail(original: Any, *args: Any, **kwargs: Any) -> Any:
            raise (torch.OutOfMemoryError if memory else RuntimeError)(f"injected into {where}")

        _replace_once(owner, name, fail)

    def poc_test_sleep_once(self, seconds: float, rank: int) -> None:
        """On worker `rank` the next forward waits in its last layer but one, while the others go on to meet it."""
        if rank != self.rank:
            return
        layers = [layer for layer in self.model_runner.model.model.layers if hasattr(layer, "self_attn")]

        def sleep(original: Any, *args: Any, **kwargs: Any) -> Any:
            time.sleep(seconds)
            return original(*args, **kwargs)

        _replace_once(layers[-2], "forward", sleep)

    def poc_test_pid(self) -> dict[str, int]:
        """Which process this worker is."""
        return {"rank": self.rank, "pid": os.getpid()}

    def poc_test_poison_once(self, row: int, seq_len: int) -> None:
        """In the next forward the first layer gives NaN for all tokens of sequence number `row`."""

        def poison(original: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            for tensor in output:
                tensor[row * seq_len : (row + 1) * seq_len] = torch.nan
            return output

        _replace_once(self.model_runner.model.model.layers[0], "forward", poison)

    def poc_test_poison_all(self) -> None:
        """The first layer gives only NaN, until `poc_test_heal`."""
        self._replace_first_layer(lambda output: [tensor.fill_(torch.nan) for tensor in output])

    def poc_test_slow_down(self, seconds: float) -> None:
        """Each forward takes `seconds` longer, until `poc_test_heal`."""
        self._replace_first_layer(lambda output: time.sleep(seconds))

    def _replace_first_layer(self, then: Callable[[Any], object]) -> None:
        layer = self.model_runner.model.model.layers[0]
        original = layer.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            then(output)
            return output

        layer.forward = call

    def poc_test_heal(self) -> None:
        """The first layer as it was before `poc_test_poison_all` or `poc_test_slow_down`."""
        del self.model_runner.model.model.layers[0].forward

    def poc_test_hide(self, what: str) -> None:
        """Make the model one whose decoder layers or embedding cannot be found, until `poc_test_unhide`."""
        model = self.model_runner.model
        if what == "layers":
            self.poc_test_hidden = {name: getattr(model.model, name) for name in ("start_layer", "end_layer")}
            for name in self.poc_test_hidden:
                delattr(model.model, name)
        else:
            model.forward = lambda input_ids, positions, intermediate_tensors=None: None
        self.poc_runner = None  # as in a worker that was not asked yet

    def poc_test_unhide(self) -> None:
        """The model as it was."""
        model = self.model_runner.model
        vars(model).pop("forward", None)
        for name, value in getattr(self, "poc_test_hidden", {}).items():
            setattr(model.model, name, value)
        self.poc_runner = None


def _attention_layers(worker: Any) -> dict[str, Any]:
    context = worker.vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in context.items() if hasattr(layer, "kv_cache")}


def _cache_of(layer: Any) -> torch.Tensor:
    """The layer's cache, which until 0.17 is in a list of one."""
    return layer.kv_cache[0] if isinstance(layer.kv_cache, list) else layer.kv_cache


def _replace_once(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """The next call of `owner.name` calls `replacement(original, ...)`; the original is back before it runs."""
    own = name in vars(owner)
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
        return replacement(original, *args, **kwargs)

    setattr(owner, name, call)
