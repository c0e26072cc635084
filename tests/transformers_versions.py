"""The decoder's tests under other versions of transformers, each in a folder under build/.

    python tests/transformers_versions.py 5.5.0 5.19.0 5.24.0

pip puts transformers and what it needs (huggingface_hub, tokenizers) into the folder, which comes
before the environment's packages; torch and all else are the environment's. Options for pytest:
PYTEST_ADDOPTS.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = (
    *("decoding/test_architectures.py", "decoding/test_ensemble.py", "decoding/test_generate.py"),
    *("decoding/test_generation_config.py", "decoding/test_masks.py", "decoding/test_scores.py"),
    *("decoding/test_adapter_loading.py", "decoding/test_stacked_adapters.py"),
    *("decoding/test_one_head.py", "decoding/test_one_head_families.py"),
    "decoding/test_one_head_refusals.py",
    *("decoding/test_stopping.py", "serving/test_transformers.py"),
)


def _installed(version: str) -> Path:
    """The folder of a version, filled once."""
    folder = ROOT / "build" / f"transformers-{version}"
    ready = folder / ".ready"
    if not ready.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        to = ["--target", str(folder), "--upgrade"]
        subprocess.run([*pip, *to, "--no-deps", f"transformers=={version}"], check=True)
        subprocess.run([*pip, *to, *_needed(folder, version)], check=True)
        ready.touch()
    return folder


def _needed(folder: Path, version: str) -> list[str]:
    """The requirements whose ranges move with transformers."""
    text = (folder / f"transformers-{version}.dist-info" / "METADATA").read_text()
    lines = [
        x.partition(":")[2].strip() for x in text.splitlines() if x.startswith("Requires-Dist")
    ]
    names = ("huggingface-hub", "tokenizers")
    return [line for line in lines if line.startswith(names) and "extra" not in line]


def main() -> int:
    """Exit status 1 if a version fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="+")
    arguments = parser.parse_args()
    failed = []
    for version in arguments.versions:
        path = os.pathsep.join([str(_installed(version)), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        run = [sys.executable, "-m", "pytest", "-q"]
        tests = [f"tests/{name}" for name in TESTS]
        print(f"transformers {version}", flush=True)
        found = "import transformers; print(transformers.__version__)"
        done = subprocess.run(
            [sys.executable, "-c", found], env=environment, capture_output=True, text=True
        )
        if done.stdout.strip() != version:
            raise RuntimeError(f"{version} was not imported: {done.stdout}{done.stderr}")
        if subprocess.run([*run, *tests], env=environment, cwd=ROOT).returncode:
            failed.append(version)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
