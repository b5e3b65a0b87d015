"""WorkerView over made-up configurations: what it gives a model that is not built like most."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

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
