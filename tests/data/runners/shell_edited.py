"""Late 2025 after an operator's own edits: more options in the list, V1 switched on, `shlex.join` in one line."""
# ruff: noqa: RUF005

import os
import shlex
from subprocess import Popen


class VLLMRunner:
    VLLM_HOST = "0.0.0.0"

    def __init__(self, model, dtype="auto", additional_args=None):
        self.model = model
        self.dtype = dtype
        self.additional_args = additional_args or []
        forced = [("--max-num-seqs", "16"), ("--worker-extension-cls", "gonka_poc.worker.PoCWorkerExtension")]
        for option, value in forced:
            if option not in self.additional_args:
                self.additional_args.extend([option, value])
        self.processes = []

    def start(self):
        for i in range(2):
            command = [
                "/usr/bin/python3.12",
                "-m", os.getenv("MLNODE_VLLM_MODULE", "vllm.entrypoints.openai.api_server"),
                "--model", self.model,
                "--dtype", self.dtype,
                "--port", str(5001 + i),
                "--host", self.VLLM_HOST,
                "--max-num-batched-tokens", "32768",
                "--enforce-eager",
            ] + self.additional_args
            if i:
                command += ["--disable-log-requests"]
            command = ["sh", "-c", f"sleep {5 * i} && exec {shlex.join(command)}"]

            env = os.environ.copy()
            env["VLLM_USE_V1"] = "1"
            env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
            try:
                self.processes.append(Popen(args=command, env=env))
            except OSError as error:
                raise RuntimeError("no shell") from error
