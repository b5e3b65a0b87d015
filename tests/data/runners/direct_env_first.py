"""Shape of early 2025: one server; the environment is made before the command."""
# ruff: noqa: RUF005

import os
import subprocess


class VLLMRunner:
    VLLM_PYTHON_PATH = "/opt/venv/bin/python3"
    VLLM_PORT = 5000
    VLLM_HOST = "0.0.0.0"

    def __init__(self, model, dtype="auto", additional_args=None):
        self.model = model
        self.dtype = dtype
        self.additional_args = additional_args or []
        self.process = None

    def start(self):
        if self.process is not None:
            raise RuntimeError("one server is enough")

        env = os.environ.copy()
        env["VLLM_USE_V1"] = "0"

        command = [
            os.getenv("VLLM_PYTHON_PATH", self.VLLM_PYTHON_PATH),
            "-m", "vllm.entrypoints.openai.api_server",
            "--model", self.model,
            "--dtype", self.dtype,
            "--port", str(self.VLLM_PORT),
            "--host", self.VLLM_HOST
        ] + self.additional_args

        self.process = subprocess.Popen(
            command,
            env=env,
        )

    def stop(self):
        self.process.terminate()
        self.process = None
