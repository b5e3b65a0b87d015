"""Options and models that are refused: found in vLLM's own configuration, before the workers are asked."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import httpx
import torch
from fakes import generate_body, round_body
from prometheus_client import CollectorRegistry
from starlette.responses import Response
from torch import nn
from vllm.engine.arg_utils import EngineArgs

from gonka_poc.app import build_app
from gonka_poc.errors import UnsupportedServerError
from gonka_poc.manager import PoCManagerV1
from gonka_poc.middleware import PoCMiddleware
from gonka_poc.routes import PREFIX
from gonka_poc.vllm_compat import ApiView
from gonka_poc.vllm_compat.refusals import refuse_unsupported, token_id_vocab_size
from gonka_poc.vllm_compat.release import WORKER_EXTENSION

MODELS = Path(__file__).parent / "data" / "models"
# what refuses each option of vLLM's server; an option that this platform or release lacks is set afterwards
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"enable_lora": True}, "--enable-lora"),
    ({"data_parallel_size": 2}, "--data-parallel-size above 1"),
    ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
]
CHANGED: list[tuple[str, str, Any, str]] = [
    ("parallel_config", "decode_context_parallel_size", 2, "--decode-context-parallel-size above 1"),
    ("parallel_config", "prefill_context_parallel_size", 2, "--prefill-context-parallel-size above 1"),
    ("cache_config", "cache_dtype", "fp8_per_token_head", "--kv-cache-dtype with scales per token"),
    ("cache_config", "calculate_kv_scales", True, "--calculate-kv-scales"),
    ("cache_config", "use_replayssm", True, "a recurrent-state cache with replay"),
]


@pytest.fixture(params=["qwen3", "qwen3_moe"])
def model(request) -> str:
    """A dense model, and one with experts."""
    return str(MODELS / request.param)


def config_of(model: str, **options: Any) -> Any:
    """vLLM's configuration, as its API process has it."""
    fixed = {"dtype": "float32", "enforce_eager": True, "worker_extension_cls": WORKER_EXTENSION}
    return EngineArgs(model=model, **fixed, **options).create_engine_config()


class EngineClient:
    """vLLM's client of an engine whose workers answer nothing, and remember that they were asked."""

    errored = False

    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def collective_rpc(self, method: Any, args: Any) -> list[Any]:
        self.calls.append(method)
        return []


async def refusal_of(config: Any) -> str:
    """What proof on a server with `config` is refused with; its workers are not asked."""
    client = EngineClient()
    view = ApiView(SimpleNamespace(state=SimpleNamespace(engine_client=client, vllm_config=config)))
    with pytest.raises(UnsupportedServerError) as caught:
        await PoCManagerV1(view).prepare()
    assert client.calls == []
    assert caught.value.http_status == 501
    return str(caught.value)


async def test_a_server_with_none_of_them_is_asked(model):
    client = EngineClient()
    view = ApiView(SimpleNamespace(state=SimpleNamespace(engine_client=client, vllm_config=config_of(model))))
    assert await view.call_workers("poc_describe") == []
    assert client.calls == ["poc_describe"]


@pytest.mark.parametrize(("options", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
async def test_options_are_refused_in_the_api_process(model, options, reason):
    assert f"proof of compute does not work with {reason}" in await refusal_of(config_of(model, **options))


@pytest.mark.parametrize(("part", "field", "value", "reason"), CHANGED, ids=[row[1] for row in CHANGED])
async def test_configurations_are_refused_in_the_api_process(model, part, field, value, reason):
    config = config_of(model)
    object.__setattr__(getattr(config, part), field, value)  # one that this platform or release does not have
    assert f"proof of compute does not work with {reason}" in await refusal_of(config)


async def test_such_a_server_serves_chat_and_answers_proof_with_501(model):
    async def chat(scope: Any, receive: Any, send: Any) -> None:
        await Response("chat", 200)(scope, receive, send)

    state = {"engine_client": EngineClient(), "vllm_config": config_of(model, enable_lora=True)}
    app = SimpleNamespace(state=SimpleNamespace(**state))

    async def with_app(scope: Any, receive: Any, send: Any) -> None:
        await middleware({**scope, "app": app}, receive, send)

    middleware = PoCMiddleware(chat, build=partial(build_app, registry=CollectorRegistry()))
    transport = httpx.ASGITransport(app=with_app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        params = {"model": model, "seq_len": 4, "k_dim": 3}
        for path, body in (
            ("generate", generate_body([0], wait=True, params=params)),
            ("init/generate", round_body(params=params)),
        ):
            response = await client.post(f"{PREFIX}/{path}", json=body)
            assert (response.status_code, "--enable-lora" in response.text) == (501, True), response.text
        assert (await client.get(f"{PREFIX}/status")).status_code == 200
        assert (await client.post("/v1/chat/completions")).text == "chat"


async def test_all_reasons_are_named_at_once(model):
    text = await refusal_of(config_of(model, enable_lora=True, kv_sharing_fast_prefill=True))
    assert "--enable-lora" in text
    assert "; nor with --kv-sharing-fast-prefill" in text


@pytest.mark.parametrize("tag", [None, "served"])
def test_the_model_that_is_served_may_be_named_by_its_place(tag):
    assert view_of_server(model_tag=tag, model="served").max_num_seqs > 0


def test_a_model_that_is_named_and_not_served_is_refused():
    """vLLM's server module drops a model without --model, and serves its default."""
    with pytest.raises(UnsupportedServerError, match="names 'mine' without --model, and vLLM serves 'default' instead"):
        view_of_server(model_tag="mine", model="default")


def view_of_server(**args: Any) -> ApiView:
    state = {"engine_client": EngineClient(), "vllm_config": config_of(str(MODELS / "qwen3"))}
    return ApiView(SimpleNamespace(state=SimpleNamespace(**state, args=SimpleNamespace(**args))))


# --- what only a worker knows -----------------------------------------------------------------------------------


def layer(**parts: Any) -> nn.Module:
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


@pytest.mark.parametrize(
    ("module", "layers", "reason"),
    [
        (layer(), {}, "a model without attention"),
        (layer(per_layer_embeddings=object()), {"a": layer()}, "per-layer embeddings"),
        (layer(), {"a": layer(impl=SimpleNamespace(_k_scale_cache=object()))}, "per-token quantised KV cache"),
    ],
)
def test_models_are_refused_in_the_worker(model, module, layers, reason):
    with pytest.raises(UnsupportedServerError, match=reason):
        refuse_unsupported(config_of(model), module, layers)


def gated(rows: int, dtype: torch.dtype, name: str = "gate") -> nn.Module:
    """A model with a table of `rows` in a layer's child `name`."""
    child = nn.Module()
    child.register_buffer("table", torch.zeros(rows, 6, dtype=dtype))
    return layer(layers=nn.ModuleList([layer(mlp=layer(**{name: child}))]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["gate", "router"])
def test_a_table_of_experts_by_token_id_is_refused(model, dtype, name):
    config = config_of(model)
    module = gated(config.model_config.get_vocab_size(), dtype, name)
    with pytest.raises(UnsupportedServerError, match="experts by token id"):
        refuse_unsupported(config, module, {"a": layer()})


@pytest.mark.parametrize(
    ("rows", "dtype", "name"),
    [(64, torch.int32, "gate"), (100_000, torch.float32, "gate"), (100_000, torch.int32, "embed_tokens")],
    ids=["packed weights of a gate", "weights of a gate", "packed embeddings"],
)
def test_other_tables_are_not_refused(model, rows, dtype, name):
    refuse_unsupported(config_of(model), gated(rows, dtype, name), {"a": layer()})


@pytest.mark.parametrize(("vision_layers", "refused"), [(0, False), (None, False), (24, True)])
def test_a_model_with_token_ids_of_its_own_may_have_such_a_table(model, vision_layers, refused):
    config = config_of(model)
    hf_config = config.model_config.hf_config
    hf_config.model_type = "deepseek_v4"
    if vision_layers is not None:
        hf_config.vision_n_layers = vision_layers
    module = gated(hf_config.vocab_size, torch.int32)
    assert token_id_vocab_size(hf_config) == hf_config.vocab_size
    with pytest.raises(UnsupportedServerError, match="images") if refused else contextlib.nullcontext():
        refuse_unsupported(config, module, {"a": layer()})


def test_a_model_with_attention_is_not_refused(model):
    refuse_unsupported(config_of(model), layer(), {"a": layer(impl=SimpleNamespace(_k_scale_cache=None))})


def test_a_worker_refuses_the_options_too(model):
    """An engine without a server has no API process."""
    with pytest.raises(UnsupportedServerError, match="--enable-lora"):
        refuse_unsupported(config_of(model, enable_lora=True), layer(), {"a": layer()})
