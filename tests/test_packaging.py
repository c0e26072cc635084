"""What is installed, and under which names."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mod_fused
from mod_fused import world

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def run_python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    env = dict(os.environ)
    env.pop("PYTHONPATH", None)
    if path is not None:
        env["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def dists(tmp_path_factory) -> Path:
    """The sdist and the wheel made from it, built from a copy so that the tree stays clean."""
    tmp = tmp_path_factory.mktemp("dists")
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, tmp / "tree", ignore=unwanted)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp / "dist", tmp / "tree"],
        env=os.environ | {"MOD_FUSED_NO_EXTENSION": "1"},  # contents only: nothing is compiled
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp / "dist"


def wheel_of(dists: Path) -> zipfile.ZipFile:
    (wheel,) = dists.glob("*.whl")
    return zipfile.ZipFile(wheel)


def sources() -> set[str]:
    """Every Python file of the two source folders, as named inside the wheel."""
    package = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("mod_fused/**/*.py")}
    kernels = {f"mod_fused/triton_kernels/{p.name}" for p in ROOT.glob("triton_kernels/*.py")}
    return package | kernels


def test_wheel_holds_every_module_and_nothing_outside_the_package(dists):
    names = set(wheel_of(dists).namelist())
    assert sources() <= names
    assert "mod_fused/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"mod_fused", "mod_fused-0.1.0.dist-info"}


def test_wheel_holds_the_checkpoints_byte_for_byte(dists):
    wheel = wheel_of(dists)
    folders = [world.checkpoint(name) for name in ("reference", *world.OBJECTIVES)]
    folders += [world.scorer(name) for name in world.OBJECTIVES]
    for folder in folders:
        inside = folder.relative_to(Path(mod_fused.__file__).parents[1]).as_posix()
        for file in CHECKPOINT_FILES:
            assert wheel.read(f"{inside}/{file}") == (folder / file).read_bytes()


def test_wheel_metadata_names_license_dependencies_and_command(dists):
    wheel = wheel_of(dists)
    metadata = wheel.read("mod_fused-0.1.0.dist-info/METADATA").decode()
    assert "License: Apache-2.0" in metadata
    assert "Requires-Dist: torch>=2.10" in metadata
    assert "Requires-Dist: numpy" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert not [line for line in required if "transformers" in line and "extra ==" not in line]
    entry_points = wheel.read("mod_fused-0.1.0.dist-info/entry_points.txt").decode()
    assert "mod-fused = mod_fused.cli:main" in entry_points
    assert [name for name in wheel.namelist() if name.endswith("/LICENSE")]


def test_installed_version_is_that_of_the_package(dists):
    assert f"mod_fused-{mod_fused.__version__}" in wheel_of(dists).filename


def test_sdist_holds_what_building_and_testing_need(dists):
    (sdist,) = dists.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile"} <= names
    assert {"triton_kernels/__init__.py", "csrc/README.md", "tests/test_packaging.py"} <= names
    assert {"bench/run.py", "bench/README.md"} <= names
    assert {f"mod_fused/world/{p.name}" for p in ROOT.glob("mod_fused/world/*.py")} <= names


def test_wheel_imports_away_from_the_repository(dists, tmp_path):
    wheel_of(dists).extractall(tmp_path / "site")
    code = (
        "import sys\n"
        # The editable install would fill in what the wheel lacks.
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import mod_fused, mod_fused.cli, mod_fused.triton_kernels, mod_fused.world as w\n"
        "mod_fused.backends()\n"  # loads the extension, were there one
        "print(w.checkpoint('reference'))\n"
        "for name, module in sys.modules.items():\n"
        "    if name.split('.')[0] == 'mod_fused': print(module.__file__)"
    )
    files = [Path(f) for f in run_python(code, cwd=tmp_path, path=tmp_path / "site").splitlines()]
    assert len(files) > 10
    for file in files:
        assert file.is_relative_to(tmp_path / "site" / "mod_fused")
        assert file.exists()


def test_triton_kernels_are_a_subpackage_in_the_editable_install(tmp_path):
    code = "import mod_fused.triton_kernels as t; print(t.__name__, t.__file__)"
    for cwd in (tmp_path, ROOT):  # from the root, ./mod_fused is found before the installed one
        name, file = run_python(code, cwd=cwd).split()
        assert name == "mod_fused.triton_kernels"
        assert Path(file) == ROOT / "triton_kernels" / "__init__.py"


@pytest.mark.parametrize("name", ["triton_kernels", "somewhere.triton_kernels"])
def test_triton_kernels_refuse_to_be_imported_under_another_name(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "triton_kernels" / "__init__.py")
    with pytest.raises(ImportError, match="mod_fused.triton_kernels"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_bare_name_is_not_installed(tmp_path):
    code = "import importlib.util as u; print(u.find_spec('triton_kernels'))"
    assert run_python(code, cwd=tmp_path) == "None"


def test_import_is_light(tmp_path):
    code = (
        "import sys, mod_fused, mod_fused.cli, mod_fused.world\n"
        "heavy = ('transformers', 'tokenizers', 'safetensors', 'matplotlib', 'rich', 'scipy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert run_python(code, cwd=tmp_path) == "[]"


def test_every_development_requirement_is_pinned():
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in wanted
    assert [line for line in wanted if "==" not in line.split(";")[0]] == []
