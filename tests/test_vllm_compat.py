"""WorkerView over made-up configurations: what it gives a model that is not built like most."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gonka_poc.errors import UnsupportedServerError
from gonka_poc.vllm_compat.scratch import ScratchAttention
from gonka_poc.vllm_compat.worker import WorkerView


@pytest.mark.parametrize(
    ("config", "axes"),
    [
        pytest.param({"uses_mrope": False, "uses_xdrope_dim": 0}, 0, id="one axis, until 0.29"),
        pytest.param({"uses_mrope": True, "uses_xdrope_dim": 0}, 3, id="M-RoPE, until 0.29"),
        pytest.param({"uses_mrope": False, "uses_xdrope_dim": 4}, 4, id="XD-RoPE"),
        pytest.param({"uses_mrope": False, "mrope_num_dims": 0}, 0, id="one axis"),
        pytest.param({"uses_mrope": True, "mrope_num_dims": 3}, 3, id="M-RoPE"),
        pytest.param({"uses_mrope": True, "mrope_num_dims": 4}, 4, id="M-RoPE of four axes"),
    ],
)
def test_positions_have_a_row_an_axis(config: dict[str, Any], axes: int):
    view = object.__new__(WorkerView)
    view._config = SimpleNamespace(model_config=SimpleNamespace(**config))
    positions = view._model_positions(torch.arange(5))
    assert positions.tolist() == ([list(range(5))] * axes if axes else list(range(5)))


# --- the decoder layers of a model ------------------------------------------------------------------------------


class Part(nn.Module):
    """A module with `children`; a decoder if it has `stages`, its first layer and the one behind its last."""

    def __init__(self, stages: tuple[int, int] | None = None, **children: nn.Module) -> None:
        super().__init__()
        if stages is not None:
            self.start_layer, self.end_layer = stages
        for name, child in children.items():
            self.add_module(name, child)


class Multimodal(Part):
    """A model that tells its language model, or cannot."""

    def __init__(self, told: str, /, **children: nn.Module) -> None:
        super().__init__(None, **children)
        self._name = told

    def get_language_model(self) -> Any:
        if not self._name:
            raise NotImplementedError("no language model")
        return self.get_submodule(self._name)


def layers(count: int = 4, placeholders: tuple[int, ...] = ()) -> nn.ModuleList:
    from vllm.model_executor.models.utils import PPMissingLayer

    return nn.ModuleList(PPMissingLayer() if i in placeholders else nn.Linear(1, 1) for i in range(count))


def decoder_layers_of(model: nn.Module, count: int = 4) -> dict[int, Any]:
    view = object.__new__(WorkerView)
    view.model = model
    view._config = SimpleNamespace(model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: count))
    return view.decoder_layers()


def test_a_second_list_of_the_same_layers_is_no_second_stack():
    """As in GLM-5.3: a list of all layers, and one of those that it runs."""
    pytest.importorskip("vllm")
    own = layers()
    active = nn.ModuleList(own[0:4])
    found = decoder_layers_of(Part(model=Part((0, 4), layers=own, _active_layers=active)))
    assert [found[i] is layer for i, layer in enumerate(own)] == [True] * 4


def test_a_second_list_on_a_stage_of_a_pipeline():
    pytest.importorskip("vllm")
    own = layers(placeholders=(0, 1))
    same = nn.ModuleList([*layers(placeholders=(0, 1))[0:2], *own[2:4]])
    short = nn.ModuleList(own[2:4])
    found = decoder_layers_of(Part(model=Part((2, 4), layers=own, again=same, _active_layers=short)))
    assert found == {2: own[2], 3: own[3]}


def test_lists_of_other_layers_are_refused():
    pytest.importorskip("vllm")
    own = layers()
    other = nn.ModuleList([*own[0:3], nn.Linear(1, 1)])
    with pytest.raises(UnsupportedServerError, match=r"cannot tell .* found \['model.layers', 'model.other'\]"):
        decoder_layers_of(Part(model=Part((0, 4), layers=own, other=other)))


def test_a_speculators_list_is_no_stack():
    pytest.importorskip("vllm")
    own = layers()
    found = decoder_layers_of(Part(model=Part((0, 4), layers=own), mtp=Part(layers=layers())))
    assert list(found.values()) == list(own)


@pytest.mark.parametrize("told", ["language_model", "language_model.model", ""])
def test_a_vision_tower_with_as_many_layers(told: str):
    """Refused where the model cannot tell which is which."""
    pytest.importorskip("vllm")
    own = layers()
    model = Multimodal(told, visual=Part((0, 4), blocks=layers()), language_model=Part(model=Part((0, 4), layers=own)))
    if told:
        assert list(decoder_layers_of(model).values()) == list(own)
    else:
        with pytest.raises(UnsupportedServerError, match=r"visual\.blocks"):
            decoder_layers_of(model)


@pytest.mark.parametrize("told", ["visual", ""])
def test_a_stack_that_is_not_where_the_model_says(told: str):
    pytest.importorskip("vllm")
    own = layers()
    model = Multimodal(told, visual=Part(blocks=layers()), text=Part((0, 4), layers=own))
    assert list(decoder_layers_of(model).values()) == list(own)


# --- a failure on a device that is still at work ----------------------------------------------------------------


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the device was waited for, and the scratch released, in order."""
    found: list[str] = []
    release = ScratchAttention.release
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: found.append("synchronize"))
    monkeypatch.setattr(ScratchAttention, "release", lambda self: (found.append("release"), release(self)))
    return found


def view_on(device: str) -> Any:
    view = object.__new__(WorkerView)
    view.device, view._metadata_read, view._forward_options = torch.device(device), None, {}
    view._runner = SimpleNamespace(prepare_inputs_event=None)
    view.scratch = ScratchAttention(SimpleNamespace(attn_groups=[]), None, {})
    return view


@pytest.mark.parametrize("fails", ["metadata", "forward"])
@pytest.mark.parametrize(("device", "expected"), [("meta", ["synchronize", "release"]), ("cpu", ["release"])])
def test_scratch_is_released_when_the_device_is_done(
    device: str, expected: list[str], fails: str, events: list[str], monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("vllm")
    view = view_on(device)
    if fails == "metadata":
        monkeypatch.setattr(ScratchAttention, "metadata", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError), view.prefill(2, 3):
        raise ZeroDivisionError
    assert events == expected


def test_a_clean_prefill_waits_for_nothing(events: list[str]):
    pytest.importorskip("vllm")
    with view_on("meta").prefill(2, 3):
        pass
    assert events == []


def test_release_waits_for_a_batch_in_flight(events: list[str]):
    view_on("meta").release()
    assert events == ["synchronize", "release"]


def test_a_device_that_failed_hides_no_error(
    monkeypatch: pytest.MonkeyPatch, events: list[str], caplog: pytest.LogCaptureFixture
):
    def fail(device: torch.device) -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(torch.accelerator, "synchronize", fail)
    view = view_on("meta")
    with pytest.raises(ZeroDivisionError), contextlib.ExitStack() as stack:
        stack.callback(view.release)
        stack.enter_context(view.synchronized_on_failure())
        raise ZeroDivisionError
    assert events == ["release"]
    assert "illegal memory access" in caplog.text
