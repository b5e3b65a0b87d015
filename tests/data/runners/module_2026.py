"""Shape of 2026: the module comes from the environment, and the class brings the worker extension itself."""
# ruff: noqa: RUF005

import os
import shlex
import subprocess

GPU_COUNT = 2


class VLLMRunner:
    VLLM_PYTHON_PATH = "/usr/bin/python3.12"
    VLLM_PORT = int(os.getenv("INFERENCE_PORT", "5000"))
    VLLM_HOST = "0.0.0.0"
    WORKER_EXTENSION_CLASS = "gonka_poc.worker.PoCWorkerExtension"

    def __init__(self, model, dtype="auto", additional_args=None):
        self.vllm_python_path = os.getenv("VLLM_PYTHON_PATH", self.VLLM_PYTHON_PATH)
        self.model = model
        self.dtype = dtype
        self.additional_args = list(additional_args or [])
        if "--worker-extension-cls" not in self.additional_args:
            self.additional_args += ["--worker-extension-cls", self.WORKER_EXTENSION_CLASS]
        self.processes = []

    def start(self):
        if self.processes:
            raise RuntimeError("already started")

        vllm_module = os.getenv(
            "MLNODE_VLLM_MODULE", "vllm.entrypoints.openai.api_server"
        )
        for i in range(GPU_COUNT):
            vllm_command = [
                self.vllm_python_path,
                "-m", vllm_module,
                "--model", self.model,
                "--dtype", self.dtype,
                "--port", str(self.VLLM_PORT + i + 1),
                "--host", self.VLLM_HOST
            ] + self.additional_args

            vllm_command_str = " ".join(shlex.quote(arg) for arg in vllm_command)

            command = ["sh", "-c", f"sleep {5 * i} && exec {vllm_command_str}"]

            env = os.environ.copy()
            # no telemetry
            env["VLLM_NO_USAGE_STATS"] = "1"
            env["CUDA_VISIBLE_DEVICES"] = str(i)

            process = subprocess.Popen(
                command,
                env=env,
                start_new_session=True,
            )
            self.processes.append(process)
