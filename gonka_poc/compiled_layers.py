"""The decoder layers, compiled together with their reflections (docs/protocol.md, section 3, step 1).

A reflection that runs by itself reads and writes every hidden state once more. Here it is compiled in front of the
next layer, where it becomes part of that layer's first kernel (the sum with the residual, and the norm). All layers
of a model share what is compiled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gonka_poc.errors import UnsupportedServerError
from gonka_poc.layer_hooks import is_hidden_state, reflect_output
from gonka_poc.rounded_ops import rounded

# what is compiled for kinds of layers and of shapes, before torch gives up and runs them plainly
RECOMPILE_LIMIT = 64
SHORT_REDUCTION = 1024


class LayerCompiler:
    """Calls `run_reflected`, compiled at its first call for each kind of layer, while in `settings`; one per worker.

    Where the compiler fails, torch runs the plain operations. Raises UnsupportedServerError where this release of torch
    has not what the compiler is set up with: those names are private, and may move.

    `emulate_casts`: every cast that an eager server makes stays in the compiled code. Layers whose operations all round
    by themselves (`rounded_ops`) do without, and are faster.
    """

    def __init__(self, emulate_casts: bool = False) -> None:
        self._emulate_casts = emulate_casts
        try:
            self._run = torch.compile(run_reflected, dynamic=True)
            self._choices = _persistent_norms()
            with self.settings():
                pass
        except (ImportError, AttributeError) as error:
            raise UnsupportedServerError(f"torch {torch.__version__} compiles in another way: {error}") from error

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """The compiler's settings, for a whole forward: to set them for each layer takes a sixth of its time."""
        import torch._dynamo.config
        import torch._inductor.config
        import torch.fx.experimental._config
        from torch._inductor.virtualized import V

        with (
            torch._dynamo.config.patch(
                recompile_limit=RECOMPILE_LIMIT,
                suppress_errors=True,
                nested_graph_breaks=True,  # around attention, deep inside of the layer
            ),
            # sizes that are equal are so by chance: hidden_size tokens are no case of their own
            torch.fx.experimental._config.patch(use_duck_shape=False),
            torch._inductor.config.patch(emulate_precision_casts=self._emulate_casts),
            V.set_choices_handler(self._choices),
        ):
            yield


def _persistent_norms() -> Any:
    """Inductor's choices, but for norms over a head, which are read once.

    Left to itself torch loops over them, because their rows are apart in memory.
    """
    from torch._inductor.choices import InductorChoices
    from torch._inductor.virtualized import V

    class PersistentNorms(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
                return True
            return not cooperative_reduction and V.graph.sizevars.statically_known_leq(
                features.reduction_numel, SHORT_REDUCTION
            )

    return PersistentNorms()


class CompiledReflections:
    """`LayerReflections` by way of `run`, a LayerCompiler: each layer reflects what the layer before it returned.

    The last layer's output is reflected behind it. Raises UnsupportedServerError for a layer whose `forward` was
    replaced (vLLM's CPU offloading fetches weights there), and unless each layer runs exactly once and in order, and is
    given what the one before it returned.
    """

    def __init__(
        self, layers: Mapping[int, nn.Module], vectors: Mapping[int, torch.Tensor], run: Callable[..., Any]
    ) -> None:
        replaced = [index for index, layer in layers.items() if "forward" in vars(layer)]
        if replaced:
            raise UnsupportedServerError(f"decoder layers {replaced} have a forward that is not their class's")
        self._layers, self._vectors, self._run = layers, vectors, run
        self._to_run = list(layers)
        self._returned: list[torch.Tensor] = []

    def __enter__(self) -> CompiledReflections:
        for index, layer in self._layers.items():
            layer.forward = self._make_forward(index, layer)
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        for layer in self._layers.values():
            vars(layer).pop("forward", None)
        self._returned = []
        if exc_type is None and self._to_run:
            raise UnsupportedServerError(f"decoder layers {self._to_run} did not run in a forward")

    def _make_forward(self, index: int, layer: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._to_run[:1] != [index]:
                raise UnsupportedServerError(f"decoder layer {index} ran where {self._to_run[:1]} should have")
            del self._to_run[0]
            # booleans: the compiler takes whole numbers for sizes that vary
            which = [any(x is y for y in self._returned) for x in (*args, *kwargs.values())]
            if sum(which) != len(self._returned):
                raise UnsupportedServerError(f"decoder layer {index} was not given what the layer before it returned")
            before, own = self._vectors.get(index - 1), self._vectors.get(index)
            output = self._run(type(layer).forward, layer, before, which, args, kwargs)
            self._returned = []
            if own is None:
                return output
            if not self._to_run:
                return reflect_output(output, own, index)
            parts = output if isinstance(output, (tuple, list)) else (output,)
            self._returned = [x for x in parts if is_hidden_state(x, own)]
            return output

        return forward


class LastPositions:
    """Only the last position of each sequence leaves the attention of the last decoder layer.

    Nothing else is read of the model's output, so the layer's MLP, the largest part of it, need not see the others.
    They are left out at `norm`, the layer's child that takes the attention's output and the residual.
    """

    def __init__(self, norm: nn.Module) -> None:
        self._norm = norm

    @contextlib.contextmanager
    def kept(self, num_seqs: int, seq_len: int, device: torch.device) -> Iterator[None]:
        """While entered, the norm and what follows it sees `num_seqs` rows, the last of each sequence."""
        norm, forward = self._norm, type(self._norm).forward
        last = torch.arange(seq_len - 1, num_seqs * seq_len, seq_len, device=device)

        def forward_last(x: torch.Tensor, residual: torch.Tensor) -> Any:
            return forward(norm, x.index_select(0, last), residual.index_select(0, last))

        norm.forward = forward_last
        try:
            yield
        finally:
            vars(norm).pop("forward", None)


class NormSearch:
    """Context manager: looks for that norm in `layer`, the last one, while the model runs."""

    def __init__(self, layer: nn.Module, is_attention: Callable[[nn.Module], bool]) -> None:
        self._layer, self._is_attention = layer, is_attention
        self._calls: list[tuple[nn.Module, bool]] = []
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> NormSearch:
        for child in self._layer.children():
            self._hooks.enter_context(child.register_forward_hook(self._note, with_kwargs=True))
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        self._hooks.close()

    def _note(self, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        is_residual_norm = (
            len(args) == len(tensors) == 2
            and not kwargs
            and args[0].shape == args[1].shape
            and isinstance(output, tuple)
            and [x.shape for x in output] == [x.shape for x in args]
            and "forward" not in vars(child)
        )
        self._calls.append((child, is_residual_norm))

    def found(self) -> LastPositions | None:
        """The norm behind the attention, or None where the layer is built in another way."""
        attention = [i for i, (child, _) in enumerate(self._calls) if any(map(self._is_attention, child.modules()))]
        behind = self._calls[attention[-1] + 1 :] if attention else []
        if not behind or not behind[0][1] or sum(child is behind[0][0] for child, _ in self._calls) != 1:
            return None
        return LastPositions(behind[0][0])


def run_reflected(
    forward: Callable[..., Any],
    layer: nn.Module,
    vector: torch.Tensor | None,
    which: Sequence[bool],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """`forward(layer, *args, **kwargs)`, with those arguments reflected by `vector` for which `which` says so."""
    values = [*args, *kwargs.values()]
    for i, reflects in enumerate(which):
        if reflects:
            values[i] = fusible_householder(values[i], vector)
    return forward(layer, *values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))


def fusible_householder(x: torch.Tensor, v: Any) -> torch.Tensor:
    """`gpu_random.householder_reference`, in a form whose roundings a compiler keeps.

    A compiler that fuses operations on 16-bit values computes them in float32 and rounds at the end. Each operation
    is rounded here as the reference rounds it, by `rounded`; so is the result, which the next norm is fused with.
    """
    dtype = x.dtype
    if dtype == torch.float32:
        dot = (x * v).sum(dim=-1, keepdim=True)
        return x - 2 * dot * v
    wide, v = x.to(torch.float32), rounded(v.to(torch.float32), dtype)
    dot = rounded(rounded(wide * v, dtype).sum(dim=-1, keepdim=True), dtype)
    return rounded(wide - rounded(rounded(2 * dot, dtype) * v, dtype), dtype).to(dtype)
