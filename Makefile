# Every target makes its own .venv on first use; a second run reuses it.
# System packages needed: Python 3.11 or 3.12 with venv, a C compiler.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
# Where this is set, every worker process would compile all it imports again: 7 s each.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help install demo ablate readme test slow lint bench bench-check manifests clean

VENV := .venv
PY := $(VENV)/bin/python
# A change of the pins, of the project file or of the folder's place asks for another (quick) installation.
STAMP := $(VENV)/.installed-$(shell { cat constraints.txt pyproject.toml; echo '$(CURDIR)'; } | cksum | cut -d' ' -f1)
PIP := $(PY) -m pip --disable-pip-version-check --no-input -qq install --no-compile --progress-bar off
# pip compiles 20,000 files, a run imports 5,000: importing them once takes half the time.
WARM := torch, torch.distributed, transformers, peft, ray.train.torch, ray.data, ray.serve, ray.job_submission, deepspeed, \
	pyarrow.parquet, matplotlib.pyplot, av, soundfile, onnx, rich.progress, rich.live, pytest, hypothesis

help:
	@echo "make demo   train, evaluate and report the mini model: runs/mini"
	echo "make ablate  every arm of the ablations over 3 seeds (ARGS=--dry-run: the plan, ARGS=--report: what is there so far): runs/ablate"
	echo "make readme  the ablations' figures in README, out of benchmarks/results"
	echo "make test   the quick tests (make slow: the slow ones, resumable)"
	echo "make lint   ruff check and format check"
	echo "make bench  the benchmarks at small sizes: benchmarks/RESULTS.md (make bench-check: their ratios beside the committed ones)"
	echo "make manifests  render k8s/ again, after a change of the configuration or of unimoe_ray/kuberay"
	echo "make clean  remove the environment and caches (runs/ stays)"

install: $(STAMP)

$(STAMP):
	@fail() { echo "unimoe: $$*" >&2; exit 1; }
	python= reason="no Python 3.11 or 3.12 found: install the system package python3.11 (with python3.11-venv)"
	for p in $${PYTHON:-python3.11 python3.12 python3}; do
	  "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1 || continue
	  if "$$p" -c 'import venv, ensurepip' >/dev/null 2>&1; then python=$$p; break; fi
	  reason="$$p has no venv module: install the system package $$("$$p" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
	done
	[ -n "$$python" ] || fail "$$reason"
	command -v cc gcc clang >/dev/null || fail "no C compiler found: install the system package gcc (or build-essential)"
	free_gb=$$(( $$(df -Pk . | awk 'NR == 2 {print $$4}') / 1048576 ))
	[ -x $(PY) ] || [ $$free_gb -ge 4 ] || fail "$$free_gb GiB of disk free in $(CURDIR): the installation needs 4 GiB (more with CUDA)"
	start=$$SECONDS
	echo "unimoe: installing into $(VENV) with $$("$$python" -V); about two minutes the first time"
	[ -x $(PY) ] && $(PY) -c 'import pip' 2>/dev/null || "$$python" -m venv --clear $(VENV)
	# torch goes first and alone: pip then takes a CPU build where one is offered, and nothing later replaces it.
	$(PIP) torch==2.13.0 -c constraints.txt
	$(PIP) -e '.[dev]' -c constraints.txt
	$(PY) -c 'import $(WARM); from transformers import LlamaForCausalLM, PreTrainedTokenizerFast' >/dev/null 2>&1 || \
	  fail "the installed packages cannot be imported: run $(PY) -c 'import torch, ray, deepspeed' to see why"
	rm -f $(VENV)/.installed-*
	touch $@
	echo "unimoe: installed in $$(( SECONDS - start )) s"

demo: $(STAMP)
	@$(PY) -m jobs.pipeline --config mini

ablate: $(STAMP)
	@$(PY) -m jobs.ablate --split test --results benchmarks/results $(ARGS)

readme: $(STAMP)
	@$(PY) -m unimoe_ray.experiments.readme README.md

test: $(STAMP)
	@$(PY) -m pytest -m "not slow" -n 2 --dist loadgroup

slow: $(STAMP)
	@$(PY) tests/run_slow.py $(SLOW)

lint: $(STAMP)
	@$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(STAMP)
	@$(PY) benchmarks/run.py $(ARGS)

bench-check: $(STAMP)
	@$(PY) benchmarks/run.py --check $(ARGS)

manifests: $(STAMP)
	@for made in cpu-mini:mini gpu:uni-moe-7b-4e gpu-spot:uni-moe-7b-4e kueue:uni-moe-7b-4e; do
	  $(PY) -m unimoe_ray.cli k8s render --config "$${made#*:}" --overlay "$${made%:*}"
	done

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .slow
	find unimoe_ray jobs serve tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
