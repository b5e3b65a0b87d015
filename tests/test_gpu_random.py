"""gpu_random against the golden numbers, and against slow versions that are obviously right."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gonka_poc import gpu_random as gr

GOLDEN = json.loads((Path(__file__).parent / "data" / "primitives.json").read_text())
TOKEN_IDS = json.loads((Path(__file__).parent / "data" / "token_ids.json").read_text())
TOLERANCE = 1e-6


def cases(name: str) -> pytest.MarkDecorator:
    """One test for each golden case of that name."""
    found = GOLDEN[name]
    return pytest.mark.parametrize("case", found if isinstance(found, list) else [found])


def assert_close(computed: torch.Tensor, golden: list) -> None:
    torch.testing.assert_close(computed, torch.tensor(golden, dtype=computed.dtype), rtol=0, atol=TOLERANCE)


def keys_of(case: dict) -> gr.NonceKeys:
    return gr.NonceKeys(case["block_hash"], case["public_key"], [case["nonce"]])


def murmur3_by_hand(key: int, seed: int) -> int:
    """One 4-byte block of MurmurHash3_x86_32, without the length XOR, in plain integers."""
    k = key * 0xCC9E2D51 % 2**32
    k = (k * 2**15 + k // 2**17) % 2**32
    k = k * 0x1B873593 % 2**32
    h = seed ^ k
    h = (h * 2**13 + h // 2**19) % 2**32
    h = (h * 5 + 0xE6546B64) % 2**32
    h ^= h >> 16
    h = h * 0x85EBCA6B % 2**32
    h ^= h >> 13
    h = h * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


# --- golden numbers ---------------------------------------------------------------------------------------------


def test_every_kind_of_golden_number_has_a_test():
    tested = "seed_from_string murmur3_32 uniform normal inputs layer_householder pick haar sign_flips"
    tested += " nonce_reflections target random_projection permutation encode"  # encode: test_data.py
    assert set(GOLDEN) == set(tested.split())


@pytest.mark.parametrize(("text", "seed"), GOLDEN["seed_from_string"].items())
def test_golden_seed(text, seed):
    assert gr.seed_from_string(text) == seed


@cases("murmur3_32")
def test_golden_murmur3(case):
    assert gr.murmur3_32(torch.tensor(case["keys"]), case["seed"]).tolist() == case["hashes"]


@cases("uniform")
def test_golden_uniform(case):
    assert_close(gr.uniform([case["seed"]], case["n"])[0], case["values"])


@cases("normal")
def test_golden_normal(case):
    assert_close(gr.normal([case["seed"]], case["n"])[0], case["values"])


@cases("inputs")
def test_golden_inputs(case):
    dtype = getattr(torch, case["dtype"])
    inputs = gr.nonce_inputs(keys_of(case), case["seq_len"], case["dim"], dtype, stronger_rng=case["poc_stronger_rng"])
    assert inputs.dtype == dtype
    assert_close(inputs[0], case["values"])


@cases("layer_householder")
def test_golden_layer_reflection(case):
    assert_close(gr.layer_reflection(case["block_hash"], case["layer"], case["dim"]), case["values"])


@cases("pick")
def test_golden_pick(case):
    assert gr.pick_indices(keys_of(case), case["dim"], case["k"])[0].tolist() == case["indices"]


@cases("haar")
def test_golden_rotation(case):
    """Relative to the vector's norm: with the norm of 25 that one case has, float32 rounding alone is 3e-6."""
    x = torch.tensor(case["x"])
    rotated = gr.rotate(x.unsqueeze(0), gr.Rotations(keys_of(case), len(x)))[0]
    assert_close(rotated / x.norm(), [y / float(x.norm()) for y in case["y"]])


@cases("sign_flips")
def test_golden_sign_flips(case):
    assert gr.sign_flips(keys_of(case), case["dim"])[0].tolist() == case["values"]


@cases("nonce_reflections")
def test_golden_nonce_reflections(case):
    reflections = torch.cat(list(gr.nonce_reflections(keys_of(case), case["dim"])))
    assert reflections.shape[0] == case["count"]
    assert_close(reflections, case["values"])


@cases("target")
def test_golden_target(case):
    assert_close(gr.target(case["block_hash"], case["dim"])[:8], case["first8"])


@cases("random_projection")
def test_golden_random_projection(case):
    projection = gr.random_projection(case["block_hash"], case["hidden_size"])
    assert projection.shape == (case["output_dim"], case["hidden_size"])
    assert_close(projection[0], case["row0"])


@cases("permutation")
def test_golden_permutation(case):
    assert gr.permutations(keys_of(case), case["vocab_size"])[0].tolist() == case["indices"]


# --- hashes and normals -----------------------------------------------------------------------------------------

_EDGES = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
_WORDS = _EDGES + random.Random(1).choices(range(2**32), k=95)


def test_murmur3_is_the_one_written_by_hand():
    hashes = gr.murmur3_32(torch.tensor(_WORDS), torch.tensor(_WORDS).unsqueeze(-1))
    expected = [[murmur3_by_hand(key, seed) for key in _WORDS] for seed in _WORDS]
    assert hashes.tolist() == expected
    assert gr.murmur3_32(torch.tensor(_WORDS), 2**32 - 1).tolist() == expected[_EDGES.index(2**32 - 1)]


def test_sub_seeds_are_the_whole_digest():
    seeds = gr.sub_seeds_from_string("abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # SHA-256 of abc, FIPS 180-2
    assert "".join(f"{seed:08x}" for seed in seeds) == digest
    assert seeds[0] == gr.seed_from_string("abc")


@pytest.mark.parametrize("n", [1, 2, 7, 8, 33])
def test_normal_is_all_cosines_then_all_sines(n):
    half = math.ceil(n / 2)
    u = [murmur3_by_hand(i, 99) / 2**32 for i in range(2 * half)]
    pairs = [(math.sqrt(-2 * math.log(max(u[i], 1e-10))), 2 * math.pi * u[half + i]) for i in range(half)]
    expected = [r * math.cos(a) for r, a in pairs] + [r * math.sin(a) for r, a in pairs]
    values = gr.normal([99], n)
    assert values.shape == (1, n)
    np.testing.assert_allclose(values[0], expected[:n], rtol=0, atol=5e-6)


def test_normal_of_a_hash_of_zero_is_finite(monkeypatch):
    monkeypatch.setattr(gr, "uniform", lambda seeds, n, device=None: torch.zeros(len(seeds), n))
    assert gr.normal([0], 4)[0].tolist() == pytest.approx([math.sqrt(-2 * math.log(1e-10))] * 2 + [0.0, 0.0])


# --- inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seq_len", "hidden_size"),
    [(1, 3), (3, 3), (5, 7), (4, 16)],
    ids=["fewer than 8", "9 of 8 x 2", "not divisible by 8", "divisible by 8"],
)
def test_stronger_rng_is_eight_segments(seq_len, hidden_size):
    n = seq_len * hidden_size
    length = math.ceil(n / 8)
    expected: list[float] = []
    for seed in gr.sub_seeds_from_string("b_k_nonce5"):
        expected += gr.normal([seed], min(length, n - len(expected)))[0].tolist() if len(expected) < n else []
    inputs = gr.nonce_inputs(gr.NonceKeys("b", "k", [5]), seq_len, hidden_size, torch.float32, stronger_rng=True)
    assert inputs.shape == (1, seq_len, hidden_size)
    assert inputs.flatten().tolist() == expected


@pytest.mark.parametrize("stronger_rng", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_are_cast_last(dtype, stronger_rng):
    keys = gr.NonceKeys("b", "k", [1, 2])
    exact, cast = (gr.nonce_inputs(keys, 3, 33, d, None, stronger_rng) for d in (torch.float32, dtype))
    assert cast.dtype == dtype
    assert torch.equal(cast, exact.to(dtype))


# --- the artifact vector ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden_size", "k_dim"), [(64, 1), (64, 2), (64, 12), (64, 64), (1000, 31)])
def test_picked_are_all_but_the_last_in_order_of_index(hidden_size, k_dim):
    picked = gr.pick_indices(gr.NonceKeys("b", "k", range(20)), hidden_size, k_dim).tolist()
    for nonce, indices in enumerate(picked):
        seed = gr.seed_from_string(f"b_k_nonce_{nonce}_pick_{k_dim}")
        by_score = sorted(range(hidden_size), key=lambda j: murmur3_by_hand(j, seed))
        assert indices == [*sorted(by_score[: k_dim - 1]), by_score[k_dim - 1]]


def artifact_vectors(block_hash, public_key, nonces, hidden, k_dim):
    projection = gr.nonce_projection(gr.NonceKeys(block_hash, public_key, nonces), hidden.shape[-1], k_dim)
    return gr.artifact_vectors(hidden, projection)


@pytest.mark.parametrize("k_dim", [1, 2, 12])
def test_artifact_vector_step_by_step(k_dim):
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    for nonce, vector in enumerate(artifact_vectors("b", "k", range(3), hidden, k_dim)):
        x = hidden[nonce].double().numpy()
        x = x / (np.linalg.norm(x) + 1e-8)
        y = x[gr.pick_indices(gr.NonceKeys("b", "k", [nonce]), 64, k_dim)[0].numpy()]
        for j in range(k_dim - 1):
            seed = gr.seed_from_string(f"b_k_nonce_{nonce}_haar_hh_{k_dim}_{j}")
            v = gr.normal([seed], k_dim)[0].double().numpy()
            v = v / (np.linalg.norm(v) + 1e-30)
            y = y - 2 * (y @ v) * v
        y = y / (np.linalg.norm(y) + 1e-8)
        np.testing.assert_allclose(vector, y, rtol=0, atol=5e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_spoils_its_row_and_no_other(bad):
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    good = artifact_vectors("b", "k", [0, 1, 2], hidden, 4)
    not_picked = next(j for j in range(64) if j not in gr.pick_indices(gr.NonceKeys("b", "k", [1]), 64, 4)[0])
    hidden[1, not_picked] = bad
    vectors = artifact_vectors("b", "k", [0, 1, 2], hidden, 4)
    assert vectors[1].isnan().all()
    assert torch.equal(vectors[[0, 2]], good[[0, 2]])


def _artifact_rows(nonces: list[int]) -> torch.Tensor:
    hidden = [torch.randn(64, generator=torch.Generator().manual_seed(nonce)) for nonce in nonces]
    return artifact_vectors("b", "k", nonces, torch.stack(hidden), 12)


@pytest.mark.parametrize(
    "rows",
    [
        lambda nonces: gr.uniform(nonces, 33),
        lambda nonces: gr.normal(nonces, 33),
        lambda nonces: gr.nonce_inputs(gr.NonceKeys("b", "k", nonces), 3, 11, torch.float32),
        lambda nonces: gr.nonce_inputs(gr.NonceKeys("b", "k", nonces), 3, 11, torch.float32, stronger_rng=True),
        lambda nonces: gr.pick_indices(gr.NonceKeys("b", "k", nonces), 64, 12),
        lambda nonces: gr.nonce_token_ids(gr.NonceKeys("b", "k", nonces), 33, 97),
        _artifact_rows,
    ],
    ids=["uniform", "normal", "inputs", "inputs, stronger", "pick", "token ids", "artifact"],
)
def test_a_row_does_not_depend_on_its_batch(rows):
    alone = {nonce: rows([nonce])[0] for nonce in range(8)}
    for order in itertools.islice(itertools.permutations(range(8)), 0, None, 9973):
        for nonce, row in zip(order, rows(list(order)), strict=True):
            torch.testing.assert_close(row, alone[nonce], rtol=0, atol=TOLERANCE)


# --- pseudo token ids (section 2) -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TOKEN_IDS, ids=lambda case: "{block_hash}-{nonce}-{vocab_size}".format(**case))
def test_token_ids_are_the_golden_ones(case):
    """The digest is that of all ids as int64, little-endian."""
    ids = gr.nonce_token_ids(keys_of(case), case["seq_len"], case["vocab_size"])
    assert (ids.dtype, tuple(ids.shape)) == (torch.int32, (1, case["seq_len"]))
    row = ids[0].tolist()
    assert (row[: len(case["first"])], row[-len(case["last"]) :]) == (case["first"], case["last"])
    assert hashlib.sha256(np.array(row, dtype="<i8").tobytes()).hexdigest() == case["sha256"]


def test_there_are_36_golden_cases_of_token_ids():
    assert len(TOKEN_IDS) == len({case["sha256"] for case in TOKEN_IDS}) == 36


def test_token_ids_by_hand():
    seed = gr.seed_from_string("b_k_nonce3_input_ids")
    expected = [murmur3_by_hand(position, seed) % 97 for position in range(40)]
    assert gr.nonce_token_ids(gr.NonceKeys("b", "k", [8, 3]), 40, 97)[1].tolist() == expected


def test_a_triton_whose_parts_have_moved_leaves_plain_torch():
    code = "import sys; sys.modules['triton.language.extra'] = None\nimport gonka_poc.kernels\n"
    code += "print(gonka_poc.kernels.HAS_TRITON)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    assert importlib.util.find_spec("triton") is None or "PoC goes on with plain torch" in done.stderr


# --- pieces -----------------------------------------------------------------------------------------------------


def whole_vectors(keys, hidden, k_dim):
    """Artifact vectors whose rotations are all made at once."""
    indices, _ = gr.nonce_projection(keys, hidden.shape[-1], k_dim)
    seeds = keys.seeds(*(f"haar_hh_{k_dim}_{j}" for j in range(k_dim - 1)))
    rotations = gr.unit(gr._normal_rows(seeds, k_dim, None), 1e-30).view(len(keys), k_dim - 1, k_dim)
    return gr.artifact_vectors(hidden, (indices, [rotations]))


@pytest.mark.parametrize(("n", "hidden_size", "k_dim"), [(7, 96, 33), (16, 64, 64), (1, 512, 512), (40, 64, 2)])
@pytest.mark.parametrize("piece", [64, 1000, 2**18])
def test_vectors_are_the_same_whatever_the_size_of_the_pieces(n, hidden_size, k_dim, piece, monkeypatch):
    hidden = torch.randn(n, hidden_size, generator=torch.Generator().manual_seed(1))
    keys = gr.NonceKeys("b", "k", range(n))
    expected = whole_vectors(keys, hidden, k_dim)
    monkeypatch.setattr(gr, "PIECE", piece)
    projection = gr.nonce_projection(keys, hidden_size, k_dim)
    for _ in range(2):  # a projection can be used again
        assert torch.equal(gr.artifact_vectors(hidden, projection), expected)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 127, 128, 129, 1000])
def test_a_long_draw_is_the_same_in_pieces(n, monkeypatch):
    expected = gr._normal_rows([3, 4], n, None)
    monkeypatch.setattr(gr, "PIECE", 64)
    assert torch.equal(gr.normal([3, 4], n), expected)
    assert torch.equal(
        gr.nonce_inputs(gr.NonceKeys("b", "k", [1]), n, 1, torch.float32).flatten().isfinite().sum(), torch.tensor(n)
    )


def test_a_rotation_takes_no_more_memory_than_a_piece():
    """The draws of 4 nonces with vectors of 1024 values would be 4 million values at once."""
    sizes = [piece.numel() for piece in gr.Rotations(gr.NonceKeys("b", "k", range(4)), 1024)]
    assert max(sizes) <= gr.PIECE
    assert sum(sizes) == 4 * 1023 * 1024
