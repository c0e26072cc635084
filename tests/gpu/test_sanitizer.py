"""Calls of every kind under compute-sanitizer. As a script: the calls that it watches."""

from __future__ import annotations

import glob
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # as a script, where the package is not installed

import mod_fused  # noqa: E402

pytestmark = pytest.mark.gpu

CALLS = ("reverse_kl", "forward_kl", "jsd", "alpha:0.5", "jeffrey", "filters", "flat", "log_probs")
_FOUND_SOMETHING = 86  # exit status


def find() -> str | None:
    """Path of compute-sanitizer, if it is anywhere it is usually found."""
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/compute-sanitizer"]
    places += glob.glob("/usr/local/cuda*/bin")
    for package in ("triton", "nvidia"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            places += [str(p.parent) for p in Path(folder).rglob("compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def call(name: str, device: torch.device, batch: int, vocab: int) -> None:
    """One of `CALLS`, on an odd vocabulary."""
    generator = torch.Generator().manual_seed(7)
    if name == "flat" and vocab > 2000:  # else its keys fit registers
        vocab = 9301
    rows = [torch.randn(batch, vocab, generator=generator).bfloat16() for _ in range(3)]
    ref, *policies = (x.to(device) for x in rows)
    arguments = (ref, policies, [0.6, 0.3])
    if name == "log_probs":
        mod_fused.log_probs(*arguments, divergence="jsd", backend="triton")
    elif name == "filters":
        mask = torch.ones(batch, vocab, dtype=torch.bool, device=device)
        filters = {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8, "mask": mask}
        filters["bias"] = torch.zeros(batch, vocab, device=device)
        mod_fused.sample(*arguments, divergence="jsd", seed=2, backend="triton", **filters)
    elif name == "flat":
        mod_fused.sample(*arguments, seed=3, backend="triton", top_k=min(vocab, 6000), top_p=0.9)
    else:
        options = {"divergence": name, "return_model_logprobs": True}
        mod_fused.sample(*arguments, seed=1, backend="triton", **options)


@pytest.mark.parametrize("name", CALLS)
def test_sanitizers_find_nothing(gpu, name):
    call(name, gpu.device, *gpu.pick((3, 2601), (1, 33)))
    gpu.synchronize()
    if gpu.dry:
        return
    tool = find()
    if tool is None:
        pytest.skip("compute-sanitizer is not on this machine")
    # Allocations of their own, not slices of the allocator's blocks: overruns show.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", str(_FOUND_SOMETHING)]
        command += [sys.executable, __file__, name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        output = done.stdout + done.stderr
        summary = next((x for x in output.splitlines()[::-1] if "SUMMARY" in x), "")
        # No permission to watch, or a driver that does not fit. A call that failed counts none.
        if done.returncode not in (0, _FOUND_SOMETHING) and " 0 " not in summary:
            pytest.skip(f"{check} does not work here: {output[-500:]}")
        assert done.returncode == 0, output[-5000:]


if __name__ == "__main__":
    call(sys.argv[1], torch.device("cuda"), 3, 2601)
    torch.cuda.synchronize()
