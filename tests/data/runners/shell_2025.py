"""Shape of late 2025: one server for each group of GPUs, started one after the other through `sh -c`."""
# ruff: noqa: RUF005

import os
import shlex
import subprocess

GPU_COUNT = 4


class VLLMRunner:
    VLLM_PYTHON_PATH = "/usr/bin/python3.12"
    VLLM_PORT = int(os.getenv("INFERENCE_PORT", "5000"))
    VLLM_HOST = "0.0.0.0"

    MAX_INSTANCES = 2

    def __init__(self, model, dtype="auto", additional_args=None):
        self.vllm_python_path = os.getenv("VLLM_PYTHON_PATH", self.VLLM_PYTHON_PATH)
        self.model = model
        self.dtype = dtype
        self.additional_args = additional_args or []
        self.processes = []

    def start(self):
        if self.processes:
            raise RuntimeError("already started")
        gpus_each = GPU_COUNT // self.MAX_INSTANCES

        for i in range(self.MAX_INSTANCES):
            sleep_time = 5 * i
            port = self.VLLM_PORT + i + 1
            vllm_command = [
                self.vllm_python_path,
                "-m", "vllm.entrypoints.openai.api_server",
                "--model", self.model,
                "--dtype", self.dtype,
                "--port", str(port),
                "--host", self.VLLM_HOST
            ] + self.additional_args

            vllm_command_str = " ".join(shlex.quote(arg) for arg in vllm_command)

            command = ["sh", "-c", f"sleep {sleep_time} && exec {vllm_command_str}"]

            env = os.environ.copy()
            env["VLLM_USE_V1"] = "0"
            # no telemetry
            env["VLLM_NO_USAGE_STATS"] = "1"

            first = i * gpus_each
            if GPU_COUNT > 0:
                env["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu) for gpu in range(first, first + gpus_each))

            print("starting server", i, "on port", port)
            process = subprocess.Popen(
                command,
                env=env,
                start_new_session=True,
            )
            self.processes.append(process)

    def stop(self):
        for process in self.processes:
            process.terminate()
        self.processes = []
