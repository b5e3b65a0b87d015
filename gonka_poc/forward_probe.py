"""One forward of a model before the first batch: who reads its token ids, and which layers return partial sums."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from gonka_poc.compiled_layers import is_hidden_state
from gonka_poc.errors import PoCError, UnsupportedServerError
from gonka_poc.vllm_compat.worker import WorkerView

# As many as a nonce of the network has, so that attention takes them for a prefill, and kernels that are tuned at their
# first call are tuned for such a length.
PROBE_TOKENS = 1024
KEPT_TOKENS = 2
# Of two tensor parallel ranks' copies of one hidden state, relative to its norm. Copies are equal up to rounding; parts
# of a sum are as far apart as they are long.
MAX_SPREAD = 0.1

# what these say of a tensor is not its values
SIZES = frozenset(("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "__len__"))
# fmt: off
KINDS = frozenset(
    (
        "type", "get_device", "element_size", "is_contiguous", "is_floating_point", "is_complex",
        "__hash__", "is_pinned", "is_inference", "_is_view", "is_same_size",
        "is_set_to", "is_shared", "untyped_storage", "result_type", "record_stream",
    )
)
# fmt: on


class TokenIdReaders(TorchFunctionMode):
    """While entered, notes each operation that is given the values of `token_ids`, or of a view of them.

    Every call from Python is seen: torch's functions and methods, custom operations, and the `data_ptr` that a Triton
    launch asks for. Sizes, kinds, attributes and views are no reading. Not seen are functions of a C extension that are
    no operations of torch, TorchScript, what torch has compiled (for which there is `eager_forward`), and an operation
    that finds the ids otherwise than among its arguments.
    """

    def __init__(self, token_ids: torch.Tensor) -> None:
        super().__init__()
        self.found: list[str] = []
        self._token_ids = token_ids
        self._storage = token_ids.untyped_storage().data_ptr()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(map(self._is_view, _tensors_in((args, kwargs)))) and self._reads(func, result):
            self.found.append(f"{_operation(func)}{_caller()}")
        return result

    def _reads(self, func: Any, result: Any) -> bool:
        name = getattr(func, "__name__", "")
        if name == "__get__" or name.startswith("new_") or name.endswith("_like"):
            return False  # an attribute, or a new tensor of the same kind
        returned = list(_tensors_in(result))
        if not returned:
            return name not in SIZES | KINDS
        writes = name.endswith("_") and not name.endswith("__")
        return writes or not all(map(self._is_view, returned))

    def _is_view(self, x: torch.Tensor) -> bool:
        if x is self._token_ids:
            return True
        try:
            return x.untyped_storage().data_ptr() == self._storage
        except (RuntimeError, NotImplementedError):  # a tensor without a storage
            return False


class LayerOutputs:
    """Context manager: keeps the hidden states that each of `layers` returns for the first of `num_tokens` tokens.

    They are float32 on the host, flat, in `found` by layer index. A tensor with fewer rows than `num_tokens` is a shard
    of the tokens, and is left out.
    """

    def __init__(self, layers: Mapping[int, nn.Module], hidden_size: int, num_tokens: int) -> None:
        self.found: dict[int, list[torch.Tensor]] = {index: [] for index in layers}
        self._layers, self._like, self._num_tokens = layers, torch.empty(hidden_size), num_tokens
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> LayerOutputs:
        with contextlib.ExitStack() as hooks:
            for index, layer in self._layers.items():
                hooks.enter_context(layer.register_forward_hook(self._keeper(index)))
            self._hooks = hooks.pop_all()
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        self._hooks.close()

    def partial_layers(self, range_of: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> list[int]:
        """The layers whose tensor parallel ranks return different hidden states: each a part of their sum.

        `range_of` gives the smallest and the largest value that the ranks have of each element.
        """
        found = []
        for index, tensors in self.found.items():
            for x in tensors:
                low, high = range_of(torch.nan_to_num(x))
                longest = torch.linalg.vector_norm(torch.maximum(low.abs(), high.abs()))
                if torch.linalg.vector_norm(high - low) > MAX_SPREAD * longest and index not in found:
                    found.append(index)
        return found

    def _keeper(self, index: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            for x in output if isinstance(output, (tuple, list)) else (output,):
                if is_hidden_state(x, self._like) and x.shape[0] == self._num_tokens:
                    self.found[index].append(x[:KEPT_TOKENS].detach().to("cpu", torch.float32).flatten())

        return keep


def probe(
    view: WorkerView,
    layers: Mapping[int, nn.Module],
    inputs: Callable[[int], tuple[torch.Tensor | None, contextlib.AbstractContextManager[Any]]],
) -> list[int]:
    """Collective: run the model over one sequence; the `layers` that return partial sums.

    `inputs` gives, for a number of tokens, the token ids of the protocol (None where it has none for this model) and
    what injects embeddings. Raises UnsupportedServerError for a model that reads token ids for which the protocol has
    none, or that cannot run on embeddings.
    """
    num_tokens = min(PROBE_TOKENS, view.max_prefill_tokens)
    with contextlib.ExitStack() as stack, view.synchronized_on_failure():
        with view.error_barrier():
            known_ids, injection = inputs(num_tokens)
            token_ids = known_ids
            if token_ids is None:
                token_ids = torch.zeros(num_tokens, dtype=torch.int32, device=view.device)
            run = stack.enter_context(view.prefill(1, num_tokens, token_ids))
            stack.enter_context(view.operations.eager_kernels())
            stack.enter_context(injection)
            outputs = stack.enter_context(LayerOutputs(layers, view.hidden_size, num_tokens))
            stack.enter_context(eager_forward())
        with view.error_barrier():
            with TokenIdReaders(token_ids) as readers:
                _run(run, type(view.model).__name__)
            stack.close()
            if readers.found and known_ids is None:
                raise UnsupportedServerError(
                    f"{type(view.model).__name__} reads its token ids while it runs "
                    f"({', '.join(sorted(set(readers.found)))}), and the protocol has none for it"
                )
        with view.error_barrier():
            partial_layers = outputs.partial_layers(view.tensor_parallel_range)
    view.settle()
    return partial_layers


def _run(run: Callable[[], Any], model_name: str) -> None:
    try:
        run()
    except (PoCError, torch.OutOfMemoryError, torch.AcceleratorError):  # of the GPU, not of the model
        raise
    except Exception as error:
        raise UnsupportedServerError(
            f"{model_name} cannot run on embeddings and positions alone: {type(error).__name__}: {error}"
        ) from error


def eager_forward() -> contextlib.AbstractContextManager[Any]:
    """While entered, what torch has compiled of a model runs as plain Python, where `TokenIdReaders` sees it."""
    return torch.compiler.set_stance("force_eager")


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors_in(part)
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))


def _operation(func: Any) -> str:
    return str(torch.overrides.resolve_name(func) or getattr(func, "__qualname__", func))


def _caller() -> str:
    """The class of the module whose forward called the operation, for the message."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return f" in {type(owner).__name__}"
        frame = frame.f_back
    return ""
