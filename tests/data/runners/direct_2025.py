"""Shape of 2025: one server, started directly; then `start` waits for it."""
# ruff: noqa: RUF005

import os
import subprocess
from abc import ABC, abstractmethod


class IVLLMRunner(ABC):
    @abstractmethod
    def start(self):
        """Start the server and return once it answers."""


class VLLMRunner(IVLLMRunner):
    VLLM_PYTHON_PATH = "/opt/venv/bin/python3"
    VLLM_PORT = os.getenv("INFERENCE_PORT", "5000")
    VLLM_HOST = "0.0.0.0"

    def __init__(self, model, dtype="auto", additional_args=None):
        self.model = model
        self.dtype = dtype
        self.additional_args = additional_args or []
        self.process = None

    def start(self):
        if self.process:
            raise RuntimeError("one server is enough")

        command = [
            os.getenv("VLLM_PYTHON_PATH", self.VLLM_PYTHON_PATH),
            "-m", "vllm.entrypoints.openai.api_server",
            "--model", self.model,
            "--dtype", self.dtype,
            "--port", str(self.VLLM_PORT),
            "--host", self.VLLM_HOST
        ] + self.additional_args

        env = os.environ.copy()
        env["VLLM_USE_V1"] = "0"

        self.process = subprocess.Popen(
            command,
            env=env,
        )

        if not self.is_running():
            raise RuntimeError("the server ended at once")

    def is_running(self):
        return self.process is not None and self.process.poll() is None
