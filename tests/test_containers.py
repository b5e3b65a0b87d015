"""docker/ and systemd/, as far as they can be checked without a registry, a GPU and root."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gonka_poc.config import Settings

ROOT = Path(__file__).parent.parent
DOCKER, UNIT = ROOT / "docker", ROOT / "systemd" / "gonka-poc-vllm.service"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yml").read_text(encoding="utf-8"))
SETTINGS = {f"POC_{name.upper()}" for name in Settings.model_fields}


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their arguments."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1].strip()) for line in lines]


def test_what_the_image_copies_is_there_and_sent_to_the_build():
    sources = [source for name, text in instructions("Dockerfile") if name == "COPY" for source in text.split()[:-1]]
    copied = [source for source in sources if not source.startswith("--")]
    sent = [line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert sorted(copied) == sorted(sent)
    assert all((ROOT / source).exists() for source in copied)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for file in re.findall(r'^(?:readme|license-files) = \[?"([^"]+)"', project, flags=re.MULTILINE):
        assert file in copied  # setuptools reads it


def test_the_image_keeps_its_outbox_where_compose_has_a_volume():
    (path,) = [text.partition("=")[2] for name, text in instructions("Dockerfile") if name == "ENV"]
    (volume,) = [text for name, text in instructions("Dockerfile") if name == "VOLUME"]
    server = COMPOSE["services"]["server"]
    assert Path(path).parent == Path(volume)
    assert f"outbox:{volume}" in server["volumes"]
    assert "outbox" in COMPOSE["volumes"]
    (check,) = [text for name, text in instructions("Dockerfile") if name == "HEALTHCHECK"]
    assert ["CMD", *json.loads(check.partition(" CMD ")[2])] == server["healthcheck"]["test"]


def test_compose_passes_settings_that_there_are_and_waits_for_an_orderly_end():
    server = COMPOSE["services"]["server"]
    assert set(server["environment"]) <= SETTINGS
    assert server["build"] == {"context": "..", "dockerfile": "docker/Dockerfile"}
    assert int(server["stop_grace_period"].removesuffix("s")) >= 90
    assert server["ports"] == ["${LISTEN:-127.0.0.1:8000}:8000"]  # not open to the world by default


def test_the_mlnode_image_uses_options_of_the_installer():
    (run,) = [text for name, text in instructions("mlnode.Dockerfile") if name == "RUN"]
    shown = subprocess.run(["bash", "install.sh", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    options = re.findall(r"--[a-z-]+", run)
    assert options == ["--yes", "--keep-vllm", "--gpus", "--wheels"]
    assert all(option in shown for option in options)
    assert dict(text.split("=") for name, text in instructions("mlnode.Dockerfile") if "=" in text and name == "ARG")[
        "GPUS"
    ]


@pytest.mark.parametrize("token", ["secret", "", None], ids=["a token", "an empty file", "no file"])
def test_the_entry_point_reads_the_token_from_the_secret(tmp_path, token):
    """An empty file gives an empty token, which the server refuses: what was meant to be closed is not open."""
    assert f"/run/secrets/{COMPOSE['services']['server']['secrets'][0]}" in (DOCKER / "entrypoint.sh").read_text()
    if token is not None:
        (tmp_path / "token").write_text(f"{token}\n")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "${POC_API_TOKEN-none}" "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "TOKEN_FILE": str(tmp_path / "token"), "PYTHON": str(python)}
    command = [str(DOCKER / "entrypoint.sh"), "a model", "--max-model-len", "8"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    expected = "none" if token is None else token
    assert shown == [expected, "-m", "gonka_poc.serve", "a model", "--max-model-len", "8", "--enable-poc"]


def test_the_unit(tmp_path):
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    service = parser["Service"]
    assert service["Environment"].partition("=")[0] in SETTINGS
    assert f"%S/{service['StateDirectory']}/" in service["Environment"]
    assert int(service["TimeoutStopSec"]) >= 90
    assert service["KillMode"] == "mixed"  # else the engine is asked to end before its last batch is stored
    assert "-m gonka_poc.serve ${MODEL} --enable-poc" in service["ExecStart"]
    if shutil.which("systemd-analyze"):
        copy = tmp_path / UNIT.name
        copy.write_text(UNIT.read_text().replace("/opt/gonka-poc/bin/python", sys.executable))
        run = subprocess.run(["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True)
        assert (run.returncode, run.stderr) == (0, "")


def test_the_document_names_what_there_is():
    document = (ROOT / "docs" / "containers.md").read_text(encoding="utf-8")
    used = set(re.findall(r"\$\{(\w+)", (DOCKER / "compose.yml").read_text(encoding="utf-8")))
    told = {
        name
        for row in re.findall(r"^\| (`[A-Z_`, ]+) \|", document, flags=re.MULTILINE)
        for name in re.findall(r"\w+", row)
    }
    assert told == used
    assert COMPOSE["volumes"]["outbox"]["name"] in document
    for file in re.findall(r"`((?:docker|systemd)/[\w.-]+)`", document):
        assert (ROOT / file).is_file()
