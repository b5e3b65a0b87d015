"""WorkerView over made-up configurations: what it gives a model that is not built like most."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

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
