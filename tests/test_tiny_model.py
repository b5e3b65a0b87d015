"""The tiny model: the same from the same seed, and one that transformers reads."""

from __future__ import annotations

import hashlib

import pytest
import torch

from gonka_poc.cli import tiny_model
from gonka_poc.cli.tiny_model import make_tiny_model


def digests(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_a_seed_gives_the_same_model(tmp_path):
    one, two = make_tiny_model(tmp_path / "one"), make_tiny_model(tmp_path / "two")
    assert digests(one) == digests(two)
    other = make_tiny_model(tmp_path / "one", seed=1)
    assert digests(other)["model.safetensors"] != digests(two)["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_model_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    before = digests(make_tiny_model(tmp_path / "model"))

    def fail(folder):
        raise OSError("disk full")

    monkeypatch.setattr(tiny_model, "_write_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        make_tiny_model(tmp_path / "model", seed=1)
    assert digests(tmp_path / "model") == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_transformers_reads_every_weight(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_tiny_model(tmp_path / "model")
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Grüße, 世界! <|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < model.config.vocab_size
    assert tokenizer.decode(ids) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).startswith(
        "<|im_start|>user\na"
    )
