"""Encoding of vectors, the nonces of a node, and what a request may say."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import MODEL, generate_body, round_body
from pydantic import ValidationError

from gonka_poc.answers import ArtifactsAnswer, Encoding
from gonka_poc.data import (
    DistanceSpec,
    GenerateRequest,
    InitGenerateRequest,
    NonceSequence,
    Randomization,
    StatTest,
    VectorSpec,
    chunks,
    decode_vector,
    encode_vector,
    spec_from,
)
from gonka_poc.errors import UnsupportedSchemeError
from gonka_poc.request_fields import MAX_FIELDS, MAX_LISTED, MAX_NAME, MAX_NONCE, MAX_TEXT
from gonka_poc.server.delivery import fingerprint
from gonka_poc.threshold_data import ProofBatch, ThresholdRequest

GOLDEN = json.loads((Path(__file__).parent / "data" / "primitives.json").read_text())["encode"]
MISSING = object()


def changed(body: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`body` with the field at `path` (dots go deeper) set to `value`, or left out."""
    name, _, rest = path.partition(".")
    result = dict(body)
    if rest:
        result[name] = changed(body.get(name) or {}, rest, value)
    elif value is MISSING:
        del result[name]
    else:
        result[name] = value
    return result


# --- vectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_encoding(case):
    assert encode_vector(np.array(case["vector"])) == case["b64"]
    assert decode_vector(case["b64"], len(case["vector"])).tolist() == case["vector"]


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f8"])
def test_encoding_is_little_endian_float16_whatever_it_is_given(dtype):
    vector = np.array([1.0, -2.0, 0.1, 65504.0, 6e-8], dtype=dtype)
    raw = base64.b64decode(encode_vector(vector[::2]))
    assert raw == vector[::2].astype("<f2").tobytes()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "AAAA",
        "AAA",
        "AAAAAAA",
        "AAAAAAA=AAAA",
        "AAAAAAA==",
        "AAAAAAA=\n",
        " AAAAAAA=",
        "AAAA AAA=",
        "-_AAAAA=",
        "AAAAAA\u00e9=",
        "\ud800AAAAAA=",
        "A" * 1_000_000,
    ],
)
def test_what_is_not_two_float16_is_no_vector(text):
    assert decode_vector("AAAAAA==", 2) is not None
    assert decode_vector(text, 2) is None


def test_a_vector_of_another_length_is_no_vector():
    encoded = encode_vector(np.ones(12))
    assert [k_dim for k_dim in range(30) if decode_vector(encoded, k_dim) is not None] == [12]


# --- nonces -----------------------------------------------------------------------------------------------------


def test_nonces_by_the_formula():
    sequence = NonceSequence(node_id=2, node_count=5, group_id=1, n_groups=3)
    assert sequence.slice(0, 4) == [2 + 1 * 5 + i * 15 for i in range(4)]


@pytest.mark.parametrize(("node_count", "n_groups"), [(1, 1), (3, 1), (1, 4), (3, 2), (5, 7)])
def test_all_nodes_and_groups_together_leave_no_gap_and_repeat_nothing(node_count, n_groups):
    owners = [(node, group) for node in range(node_count) for group in range(n_groups)]
    nonces = [n for node, group in owners for n in NonceSequence(node, node_count, group, n_groups).slice(0, 20)]
    assert sorted(nonces) == list(range(20 * node_count * n_groups))


def test_slices_join():
    sequence = NonceSequence(1, 3)
    assert sequence.slice(0, 2) + sequence.slice(2, 5) + sequence.slice(7, 1) == sequence.slice(0, 8)


@pytest.mark.parametrize(
    ("size", "expected"), [(2, [[5, 3], [9, 1], [4]]), (5, [[5, 3, 9, 1, 4]]), (9, [[5, 3, 9, 1, 4]])]
)
def test_chunks_keep_the_order(size, expected):
    assert list(chunks([5, 3, 9, 1, 4], size)) == expected
    assert list(chunks([], size)) == []


# --- requests that are accepted ---------------------------------------------------------------------------------


def test_defaults_of_a_round():
    request = InitGenerateRequest.model_validate(changed(round_body(), "params.k_dim", MISSING))
    assert (request.group_id, request.n_groups, request.batch_size) == (0, 1, None)
    assert (request.params.k_dim, request.url, request.poc_stronger_rng) == (12, None, False)


def test_defaults_of_a_request_for_nonces():
    request = GenerateRequest.model_validate(generate_body([4, 2]))
    assert (request.nonces, request.wait, request.validation) == ([4, 2], False, None)
    stat_test = request.stat_test
    assert (stat_test.dist_threshold, stat_test.p_mismatch, stat_test.fraud_threshold) == (0.02, 0.001, 0.01)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("nonces", []),
        ("nonces", [MAX_NONCE, 0]),
        ("nonces", list(range(10_000))),
        ("stat_test", None),
        ("stat_test", {}),
        ("stat_test.p_mismatch", 0),
        ("validation", None),
        ("validation.artifacts", []),
        ("validation.artifacts", [{"nonce": 0, "vector_b64": "not base64 \ud800"}]),
        ("url", None),
        ("url", ""),
        ("url", "http://127.0.0.1:9000"),
        ("url", "https://[::1]:9000/a/b"),
        ("wait", True),
        ("poc_stronger_rng", True),
        ("block_height", 0),
        ("block_hash", "x" * MAX_TEXT),
        ("public_key", "ключ"),
        ("params.k_dim", 1),
        ("params.seq_len", 1),
        ("batch_size", 1),
        ("node_id", 9),  # node_count is 1
        ("group_id", 9),  # of rounds only
        ("n_groups", None),
    ],
)
def test_good_requests_for_nonces(path, value):
    GenerateRequest.model_validate(changed(generate_body([0]), path, value))


@pytest.mark.parametrize(("sent", "computed"), [([3, 5, 3], [3, 5]), ([5, 5, 5, 3, 5], [5, 3]), ([], [])])
def test_a_nonce_that_is_sent_twice_is_computed_once(sent, computed):
    assert GenerateRequest.model_validate(generate_body(sent)).nonces == computed


def test_stat_test_null_is_the_default():
    assert GenerateRequest.model_validate(generate_body([0], stat_test=None)).stat_test == StatTest()


@pytest.mark.parametrize("url", ["http://host", "http://host/", "http://host//"])
def test_callback_urls_lose_their_last_slash(url):
    assert InitGenerateRequest.model_validate(round_body(url=url)).url == "http://host"


def test_spec_and_nonces_of_a_request():
    request = InitGenerateRequest.model_validate(
        round_body(node_id=1, node_count=2, group_id=2, n_groups=3, poc_stronger_rng=True)
    )
    assert request.spec == VectorSpec("block", "key", seq_len=4, k_dim=3, poc_stronger_rng=True)
    assert request.nonces == NonceSequence(node_id=1, node_count=2, group_id=2, n_groups=3)


# --- fields of other clients ------------------------------------------------------------------------------------

# what clients of the decode scheme send with every request, where they ask for nothing but the prefill scheme
OFF = [
    *[("params.scheme", value) for value in ("prefill", "", None)],
    *[("params.decode", value) for value in (False, None, 0)],
    *[("params.max_tokens", value) for value in (0, 256, None)],
    *[("params.route_window", value) for value in (0, 256, None)],
    *[("batch_size", value) for value in (0, None, MISSING)],
    *[(name, value) for name in ("decode", "debug", "per_nonce_reflection") for value in (False, None, 0)],
    *[(name, value) for name in ("enforced_k_steps", "poc_vector_artifact_steps") for value in (None, {}, [], 0)],
    *[("k_points_steps", value) for value in (None, [1, 2])],
    *[("scheme", value) for value in ("prefill", "", None)],
    *[(name, 0) for name in ("max_tokens", "route_window")],
]
DECODE = [
    *[(f"{part}decode", value) for part in ("", "params.") for value in (True, 1, "true")],
    *[(f"{part}scheme", value) for part in ("", "params.") for value in ("decode", "another")],
    *[(name, True) for name in ("debug", "per_nonce_reflection")],
    ("enforced_k_steps", {"0": [1, 2]}),
    ("poc_vector_artifact_steps", [4]),
]


def _id(value: Any) -> str:
    return "missing" if value is MISSING else ascii(value)[:24].strip("'")


def requests_with(path: str, value: Any) -> list[tuple[type, dict[str, Any]]]:
    """Both kinds of request with the field at `path` set to `value`."""
    bodies = [(InitGenerateRequest, round_body(batch_size=32)), (GenerateRequest, generate_body([0], batch_size=32))]
    return [(model, changed(body, path, value)) for model, body in bodies]


@pytest.mark.parametrize(("path", "value"), OFF, ids=_id)
def test_fields_that_ask_for_nothing_change_nothing(path, value):
    """And a round that differs only by them goes on where it was."""
    for model, body in requests_with(path, value):
        request, plain = model.model_validate(body), model.model_validate({**round_body(), "nonces": [0]})
        assert request.ignored_fields == ()
        assert request.model_dump(exclude={"batch_size"}) == plain.model_dump(exclude={"batch_size"})
        assert not request.batch_size or path != "batch_size"
    assert fingerprint(InitGenerateRequest.model_validate(requests_with(path, value)[0][1])) == fingerprint(
        InitGenerateRequest.model_validate(round_body())
    )


@pytest.mark.parametrize(("path", "value"), DECODE, ids=_id)
def test_what_asks_for_the_decode_scheme_is_named(path, value):
    """Also where the request has fields that are unknown here, or lacks others."""
    for model, body in requests_with(path, value):
        broken = changed(changed(body, "params.top_p", 1), "params.seq_len", MISSING)
        for sent in (body, broken):
            with pytest.raises(UnsupportedSchemeError, match=f"^{path}: this server computes the prefill scheme only"):
                model.model_validate(sent)


UNKNOWN = [
    ("surprise", "surprise"),
    ("\ud800", "\ud800"),
    ("x" * 1_000_000, "x" * MAX_NAME),
    ("validation.surprise", "validation.surprise"),
    ("stat_test.surprise", "stat_test.surprise"),
]


@pytest.mark.parametrize(("path", "said"), UNKNOWN, ids=_id)
def test_unknown_fields_are_ignored_and_said(path, said):
    plain = generate_body([0], validation={"artifacts": []})
    request = GenerateRequest.model_validate(changed(plain, path, {"any": "thing"}))
    assert request.ignored_fields == (said,)
    assert request.model_dump() == GenerateRequest.model_validate(plain).model_dump()


def test_unknown_fields_of_artifacts_are_said_once():
    artifacts = [{"nonce": n, "vector_b64": "", "surprise": n, "k_points_steps": None} for n in range(3)]
    body = generate_body([0, 1, 2], validation={"artifacts": artifacts}, stat_test={"p_value_threshold": 0.5})
    assert GenerateRequest.model_validate(body).ignored_fields == ("validation.artifacts.surprise",)


def test_few_of_very_many_unknown_fields_are_kept():
    artifacts = [{"nonce": n, "vector_b64": "", **{f"{n}_{i}": 0 for i in range(90)}} for n in range(1000)]
    request = GenerateRequest.model_validate(generate_body([0], validation={"artifacts": artifacts}))
    assert len(request.ignored_fields) == MAX_FIELDS


def test_what_belongs_to_requests_for_nonces_is_unknown_to_a_round():
    body = round_body(nonces=[1], wait=True, validation={"artifacts": 1}, stat_test=5, request_id="1")
    ignored = InitGenerateRequest.model_validate(body).ignored_fields
    assert ignored == ("nonces", "request_id", "stat_test", "validation", "wait")


@pytest.mark.parametrize(
    ("stat_test", "used"),
    [
        ({"p_value_threshold": 0.05}, 0.05),
        ({"fraud_threshold": 0.02}, 0.02),
        ({"p_value_threshold": 0.05, "fraud_threshold": 0.02}, 0.02),
        ({"fraud_threshold": 0.02, "p_value_threshold": 0.05}, 0.02),
        ({"fraud_threshold": None, "p_value_threshold": 0.05}, 0.05),
        ({"fraud_threshold": 0.02, "p_value_threshold": None}, 0.02),
        ({"p_value_threshold": None}, 0.01),
        (dict.fromkeys(("dist_threshold", "p_mismatch", "fraud_threshold", "p_value_threshold")), 0.01),
        ({}, 0.01),
    ],
)
def test_p_value_threshold_is_fraud_threshold(stat_test, used):
    request = GenerateRequest.model_validate(generate_body([0], stat_test=stat_test))
    assert request.stat_test == StatTest(fraud_threshold=used)
    assert request.ignored_fields == ()
    assert "fraud_threshold" in request.stat_test.model_dump()


# --- requests that are refused ----------------------------------------------------------------------------------

TEXTS = ["block_hash", "public_key", "params.model"]
COUNTS = ["block_height", "node_id", "node_count", "params.k_dim", "params.seq_len"]
GROUPS = ["group_id", "n_groups"]
REQUIRED = ["block_hash", "block_height", "public_key", "node_id", "node_count", "params", "params.model"]
REQUIRED += ["params.seq_len"]

BAD = [
    *[(path, MISSING) for path in REQUIRED],
    *[(path, value) for path in TEXTS for value in ("", "x" * (MAX_TEXT + 1), "\ud800", 1, None, ["x"], b"x")],
    *[(path, value) for path in COUNTS for value in (-1, 1.0, "1", True, None, math.nan, [1])],
    *[("batch_size", value) for value in (-1, 1.0, "1", True, math.nan, [1], 2**63, 1_000_001)],
    *[(path, 2**63) for path in COUNTS if not path.startswith("params")],
    *[(path, 0) for path in ("node_count", "params.k_dim", "params.seq_len")],
    ("node_id", 2**53 + 1),
    ("node_count", 2**53 + 1),
    *[("params", value) for value in (None, [], "x", {})],
    *[("poc_stronger_rng", value) for value in (None, 1, "true")],
    ("params.surprise", 1),
    *[("params.decode", value) for value in ("", [])],
    *[("params.scheme", value) for value in (1, ["decode"])],
    *[(f"params.{name}", value) for name in ("max_tokens", "route_window") for value in ("1", 1.5, True)],
    ("params.poc_stronger_rng", True),
    *[
        ("url", url)
        for url in (
            "host",
            "//host",
            "ftp://host",
            "file:///etc/passwd",
            "javascript:alert(1)",
            "http://",
            "http:///path",
            "http://host:port",
            "http://host:0",
            "http://host:70000",
            "http://[::1",
            "http://\ud800",
            "http://host/" + "x" * 4096,
            1,
            ["http://host"],
        )
    ],
    # accepted, these would fail at each attempt to deliver, for ever
    *[("url", url) for url in (" http://host", "http://ho st", "http://host\n", "http://ho\tst", "http://\x00")],
    *[("url", url) for url in ("http://xn--a", "http://\u200b.com", "http://host/a\x7f")],
    # "/generated" would become a part of the query or of the fragment
    *[("url", url) for url in ("http://host/?token=1", "http://host/#part", "http://h/x?", "http://h/x#")],
]

BAD_FOR_A_ROUND = [
    *[(path, value) for path in GROUPS for value in (-1, 1.0, "1", True, None, math.nan, [1], 2**63)],
    ("n_groups", 0),
    ("group_id", 1),  # n_groups is 1
    ("n_groups", 2**53 + 1),
]

BAD_FOR_NONCES = [
    ("nonces", MISSING),
    *[("nonces", value) for value in (None, 1, "1", {"0": 1}, [None], [[1]])],
    *[("nonces", [0, value]) for value in (-1, 2**63, 2**4000, 1.0, 1.5, "1", True, math.nan, math.inf)],
    *[("wait", value) for value in (None, 1, "true")],
    *[("validation", value) for value in ([], {}, {"artifacts": None}, {"surprise": 1})],
    *[
        ("validation.artifacts", [artifact])
        for artifact in (
            {"nonce": 0},
            {"vector_b64": "AAAA"},
            {"nonce": "0", "vector_b64": "AAAA"},
            {"nonce": -1, "vector_b64": "AAAA"},
            {"nonce": 0, "vector_b64": None},
            {"nonce": 0, "vector_b64": [0.5]},
        )
    ],
    *[("stat_test", value) for value in ([], 1)],
    *[
        (f"stat_test.{name}", value)
        for name in ("dist_threshold", "p_mismatch", "fraud_threshold", "p_value_threshold")
        for value in (-0.1, math.nan, math.inf, "0.1", True)
    ],
    *[(f"stat_test.{name}", 1.1) for name in ("p_mismatch", "fraud_threshold", "p_value_threshold")],
]


def refusal(model: type, body: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as error:
        model.model_validate(body)
    return str(error.value.errors(include_input=False, include_context=False))


@pytest.mark.parametrize(("path", "value"), BAD, ids=_id)
def test_bad_requests(path, value):
    """Refused alike by both kinds of request, naming the field."""
    for model, body in ((InitGenerateRequest, round_body()), (GenerateRequest, generate_body([0]))):
        model.model_validate(body)
        assert path.rpartition(".")[2] in refusal(model, changed(body, path, value))


@pytest.mark.parametrize(("path", "value"), BAD_FOR_NONCES, ids=_id)
def test_bad_requests_for_nonces(path, value):
    body = changed(generate_body([0]), path, value)
    assert path.split(".")[0] in refusal(GenerateRequest, body)
    assert path.rpartition(".")[2] in refusal(GenerateRequest, body)


@pytest.mark.parametrize(("path", "value"), BAD_FOR_A_ROUND, ids=_id)
def test_bad_groups_of_a_round(path, value):
    assert path in refusal(InitGenerateRequest, round_body(**{path: value}))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("url", "ftp://host", "http:// or https://"),
        ("nonces", [2**63], str(MAX_NONCE)),
        ("params.seq_len", 0, "greater than or equal to 1"),
        ("block_hash", "x" * (MAX_TEXT + 1), f"at most {MAX_TEXT}"),
    ],
)
def test_a_refusal_names_the_limit(path, value, says):
    assert says in refusal(GenerateRequest, changed(generate_body([0]), path, value))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"group_id": 4}, "group_id 4 must be less than n_groups 1"),
        ({"node_count": 2**52, "n_groups": 3}, f"node_count times n_groups must be at most {2**53}"),
    ],
)
def test_a_refusal_names_the_limit_of_groups(changes, says):
    assert says in refusal(InitGenerateRequest, round_body(**changes))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (round_body(r_target=1.4), "not both"),
        (changed(round_body(), "params", MISSING), "params"),
    ],
    ids=["both", "neither"],
)
def test_a_round_is_of_one_protocol(body, says):
    assert says in refusal(InitGenerateRequest, body)


@pytest.mark.parametrize("body", [None, [], "x", 1])
def test_a_body_that_is_no_object(body):
    refusal(InitGenerateRequest, body)
    refusal(GenerateRequest, body)


def test_requests_do_not_change():
    request = GenerateRequest.model_validate(generate_body([0]))
    with pytest.raises(ValidationError):
        request.params.model = "other"
    assert request.params.model == MODEL


# --- answers ----------------------------------------------------------------------------------------------------


def test_not_computed_nonces_are_said_only_if_there_are_any():
    answer = ArtifactsAnswer(request_id="1", artifacts=[], encoding=Encoding(k_dim=3))
    plain = {"status": "completed", "request_id": "1", "artifacts": []}
    assert answer.model_dump() == {**plain, "encoding": {"dtype": "f16", "k_dim": 3, "endian": "le"}}
    assert answer.model_copy(update={"not_computed_nonces": [5]}).model_dump()["not_computed_nonces"] == [5]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nonces": list(range(MAX_LISTED + 1))}, "at most 200000 items"),
        ({"validation": {"artifacts": [{"nonce": 0, "vector_b64": ""}] * (MAX_LISTED + 1)}}, "at most 200000 items"),
        ({"validation": {"artifacts": [{"nonce": 0, "vector_b64": "A" * 65_537}]}}, "at most 65536 characters"),
    ],
)
def test_lists_and_vectors_have_a_largest_size(changes, said):
    with pytest.raises(ValidationError, match=said):
        GenerateRequest.model_validate(generate_body(**{"nonces": [0], **changes}))


FIELDS = {f"{i:x}": 0 for i in range(MAX_LISTED)}
TOO_MANY = f"{MAX_LISTED} fields, should have at most {MAX_FIELDS}"


@pytest.mark.parametrize(
    ("model", "body", "where", "says"),
    [
        (InitGenerateRequest, FIELDS, (), TOO_MANY),
        (ThresholdRequest, FIELDS, (), TOO_MANY),
        (ProofBatch, FIELDS, (), TOO_MANY),
        (GenerateRequest, generate_body([0], params=FIELDS), ("params",), TOO_MANY),
        (GenerateRequest, generate_body([0], stat_test=FIELDS), ("stat_test",), TOO_MANY),
        (GenerateRequest, generate_body([0], validation=FIELDS), ("validation",), TOO_MANY),
        (
            GenerateRequest,
            generate_body([0], validation={"artifacts": [FIELDS]}),
            ("validation", "artifacts", 0),
            TOO_MANY,
        ),
        (
            GenerateRequest,
            generate_body([0], validation={"artifacts": [{}] * MAX_LISTED}),
            ("validation", "artifacts", 0, "nonce"),
            "required",
        ),
        (GenerateRequest, generate_body([1, *["x"] * (MAX_LISTED - 1)]), ("nonces", 1), "valid integer"),
        (ProofBatch, {"dist": [0.5, 0.5, *[None] * (MAX_LISTED - 2)]}, ("dist", 2), "valid number"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else getattr(value, "__name__", ""),
)
def test_a_body_with_very_many_errors_is_refused_for_little(model, body, where, says):
    """Chat waits while a body is looked at, and an error of each of its parts would take very much memory."""
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(ValidationError) as error:
        model.model_validate(body)
    errors = error.value.errors()
    seconds, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert any(item["loc"] == where and says in item["msg"] for item in errors)
    assert len(errors) <= MAX_FIELDS
    assert seconds < 1
    assert peak < 2**24


@pytest.mark.parametrize(
    ("spec", "dtype", "shape"),
    [
        (VectorSpec("block", "key", 4, 3, True), "<f2", (3,)),
        *[(DistanceSpec("block", "key", 4, mode.value), "<f4", ()) for mode in Randomization],
    ],
)
def test_a_spec_comes_back_from_its_fields(spec, dtype, shape):
    fields = json.loads(json.dumps(dataclasses.asdict(spec)))
    assert spec_from(fields) == spec
    assert (spec.value_dtype, spec.value_shape) == (np.dtype(dtype), shape)
    with pytest.raises(TypeError):
        spec_from({**fields, "surprise": 1})
