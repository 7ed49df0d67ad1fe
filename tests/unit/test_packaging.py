"""One wheel carries both packages with their data; conda's file, the pins and pyproject.toml agree."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from effnlp_lab import __version__
from effnlp_lab.cli import app

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA_NAMES = {"torch": "pytorch-gpu", "matplotlib": "matplotlib-base", "playwright": "playwright-python",
               "psycopg2-binary": "psycopg2"}
CONDA_ONLY = {"python", "pip", "bubblewrap", "postgresql"}
NOT_ON_A_CPU = {"flash-attn", "liger-kernel", "nvidia-ml-py"}
PACKAGED = {".py", ".json", ".html", ".css", ".md", ".txt", ".safetensors"}


def requirements() -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def pins() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {_key(name): Version(version) for name, version in (line.split("==") for line in lines)}


def _key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_one_range_for_a_package():
    seen: dict[str, SpecifierSet] = {}
    for line in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]:
        requirement = Requirement(line)
        assert seen.setdefault(requirement.name, requirement.specifier) == requirement.specifier, requirement.name
        assert requirement.specifier, f"{requirement.name} has no range"


def test_core_dependencies_are_ranges():
    for line in PROJECT["dependencies"]:
        assert "==" not in str(Requirement(line).specifier), line
    assert requirements()["torch"].specifier == SpecifierSet(">=2.11,<3")
    assert requirements()["triton"].marker.evaluate({"platform_system": "Linux"})
    assert not requirements()["triton"].marker.evaluate({"platform_system": "Darwin"})


def test_flash_attention_is_never_installed_for_the_cpu():
    makefile = (ROOT / "Makefile").read_text()
    extras = re.search(r"^EXTRAS := (.*)$", makefile, re.MULTILINE).group(1).split(",")
    assert set(extras) == {"notebooks", "grading", "test"}
    assert not any("flash" in line for extra in extras for line in EXTRAS[extra])


@pytest.mark.parametrize("name", sorted(set(requirements()) - NOT_ON_A_CPU))
def test_every_dependency_is_pinned_within_its_range(name):
    assert requirements()[name].specifier.contains(pins()[_key(name)])


def conda() -> dict[str, SpecifierSet]:
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    lines = [one for line in lines for one in (line["pip"] if isinstance(line, dict) else [line])]
    parts = [line.partition(" ") for line in lines]
    return {name: SpecifierSet(ranges) for name, _, ranges in parts}


def test_conda_has_the_same_packages_and_ranges():
    expected = {CONDA_NAMES.get(name, name): requirement.specifier for name, requirement in requirements().items()}
    found = {name: ranges for name, ranges in conda().items() if name not in CONDA_ONLY}
    assert found == expected


def test_conda_python():
    ranges, ours = conda()["python"], SpecifierSet(PROJECT["requires-python"])
    for version in ("3.11.0", "3.12.9"):
        assert ranges.contains(version) and ours.contains(version)
    assert not ranges.contains("3.10.14") and not ours.contains("3.10.14")
    assert yaml.safe_load((ROOT / "environment.yml").read_text())["channels"] == ["conda-forge"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Built from a copy, offline."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.db")
    for name in ("effnlp_lab", "grading"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE", "LICENSE-prose"):
        shutil.copy(ROOT / name, source)
    (source / "grading").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run([*command, "-w", str(folder), str(source)], capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    (archive,) = folder.glob("*.whl")
    assert archive.name.startswith(f"effnlp_lab-{__version__}-py3-none-any")
    return archive


@pytest.fixture(scope="module")
def wheel(archive) -> Path:
    """Unpacked into a folder."""
    zipfile.ZipFile(archive).extractall(archive.parent / "site")
    return archive.parent / "site"


def needed(name: str, seen: set[str]) -> set[str]:
    """A distribution's name and those that it cannot do without here, without extras."""
    if _key(name) not in seen:
        seen.add(_key(name))
        for line in metadata.requires(name) or ():
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate({"extra": ""}):
                needed(one.name, seen)
    return seen


@pytest.fixture(scope="module")
def empty_environment(archive) -> Path:
    """A new environment with the wheel and what it requires (linked, not copied), and nothing else."""
    folder = archive.parent / "venv"
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    seen: set[str] = set()
    for line in PROJECT["dependencies"]:
        one = Requirement(line)
        if one.marker is None or one.marker.evaluate():
            needed(one.name, seen)
    for name in seen:
        for file in metadata.files(name) or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).is_symlink():
                (site / top).symlink_to(metadata.distribution(name).locate_file(top))
    command = [sys.executable, "-m", "pip", "--quiet", "--python", str(folder), "install", "--no-deps", "--no-index"]
    command += ["--ignore-installed", str(archive)]  # a checkout's egg-info in this folder would count as installed
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder / "bin"


def test_wheel_has_every_module_and_its_data(wheel):
    for package, home in (("effnlp_lab", ROOT), ("effnlp_grading", ROOT / "grading")):
        files = [path for path in (home / package).rglob("*") if path.suffix in PACKAGED and path.is_file()]
        missing = [path for path in files if not (wheel / path.relative_to(home)).is_file()]
        assert not missing


def test_wheel_has_nothing_else(wheel):
    tops = {path.name.partition("-")[0] for path in wheel.iterdir()}
    assert tops <= {"effnlp_lab", "effnlp_grading"}
    assert not list(wheel.rglob("*.pyc"))


def test_the_wheel_alone(empty_environment, tmp_path):
    """Without notebooks, grading and peers: the doctor names what is missing, checks work, nothing is a traceback."""
    settings = {**os.environ, "PYTHONPATH": "", "EFFNLP_DEVICE": "cpu", "PATH": f"{empty_environment}:/usr/bin:/bin"}

    def run(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run([str(empty_environment / command[0]), *command[1:]], cwd=tmp_path, env=settings,
                              capture_output=True, text=True, timeout=120)  # fmt: skip

    doctor = run("effnlp", "doctor")
    assert doctor.returncode == 0 and doctor.stdout.endswith("Ready: everything essential is here.\n"), doctor.stdout
    missing = {line.split()[0] for line in doctor.stdout.splitlines() if " missing " in line}
    assert {"jupyterlab", "papermill", "nbval", "jupytext"} <= missing
    assert doctor.stdout.count("pip install 'effnlp-lab[notebooks]'") >= 4 and not doctor.stderr
    code = ("import sys\n"
            "sys.addaudithook(lambda name, _: print(name) if name in ('socket.connect', 'socket.getaddrinfo') else 0)\n"
            "from effnlp_lab import check; import effnlp_lab\n"
            "def merge_pair(word, pair, new_id): raise NotImplementedError\n"
            "print(check('merge_pair', merge_pair), sys.prefix in effnlp_lab.__file__)")
    checked = run("python", "-c", code)
    assert "socket" not in checked.stdout  # no connection is opened
    assert checked.returncode == 0 and checked.stdout.endswith("0.0 True\n"), checked.stdout + checked.stderr
    for verb in (["grade", "01"], ["build"]):
        said = run("effnlp", *verb)
        assert said.returncode == 2 and said.stderr.count("\n") == 1 and "Traceback" not in said.stderr, said.stderr


def test_no_module_of_ours_speaks_to_the_network():
    """The grader's sockets are pairs on this machine; clients of the web are imported nowhere."""
    web = {"requests", "httpx", "aiohttp", "urllib3", "urllib.request", "http.client", "smtplib", "ftplib", "telnetlib"}
    found = []
    for path in [*(ROOT / "effnlp_lab").rglob("*.py"), *(ROOT / "grading").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                found += [f"{path}: {name}" for name in names if name in web or name.partition(".")[0] in web]
            elif isinstance(node, ast.Attribute) and node.attr in ("AF_INET", "AF_INET6", "create_connection"):
                found.append(f"{path}: {node.attr}")
    assert not found


def test_licences():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert "Attribution 4.0" in (ROOT / "LICENSE-prose").read_text()


def test_ci_runs_what_the_readme_gives():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and script.read_text().rstrip().endswith("\nmake test")
    assert "make test" in (ROOT / "README.md").read_text()


def test_the_readme_names_every_verb():
    readme = (ROOT / "README.md").read_text()
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert f"effnlp {name}" in readme, name


def test_workflows_are_valid_yaml_and_use_make():
    for name in ("cpu", "gpu"):
        workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
        steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
        assert any(run in (".ci/run", "make gpu") for run in steps)
