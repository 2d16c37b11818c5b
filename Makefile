# Targets make .venv themselves and reuse it while pyproject.toml and constraints-cpu.txt stay as they are.
PYTHON ?= python3
RUN := .venv/bin/python -m

.PHONY: demo test test-all lint bench bench-compare bench-workers bench-data bench-cluster bench-metrics clean system-tools

.venv/ready: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e '.[dev]'
	touch $@

demo: .venv/ready  ## eight minutes on two cores: landscapes that did not exist, in runs/demo/report.html
	$(RUN) gradine.pipeline run demo

test: .venv/ready  ## under 12 minutes on two cores
	$(RUN) pytest -q -m "not slow and not fault"

test-all: .venv/ready system-tools  ## the slow and the fault tests
	$(RUN) pytest -q -m "slow or fault or row" -p tests.fault_table

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/mypy

bench: .venv/ready  ## fifteen minutes: steps and what surrounds them; PEER=1 puts pro-gan-pth beside, ten minutes more
	$(RUN) tests.bench.step $(SIZES) $(if $(PEER),--peer)
	$(RUN) tests.bench.overhead

bench-compare: .venv/ready  ## what a change did to the steps: BASE=commit, SIZES="16 32" for some resolutions alone
	$(RUN) tests.bench.step $(SIZES) --base $(BASE)

bench-workers: .venv/ready  ## eight minutes: sums over workers, and two workers of one thread beside one
	$(RUN) tests.bench.scaling

bench-data: .venv/ready  ## six minutes; IMAGES=folder of photographs of at least 1024x1024, else it invents some
	$(RUN) tests.bench.data $(if $(IMAGES),--images $(IMAGES))

bench-cluster: .venv/ready  ## nine minutes: what Ray and Accelerate cost a step, and from submit to the first step
	$(RUN) tests.bench.cluster
	$(RUN) tests.bench.submit

bench-metrics: .venv/ready  ## ten minutes: metrics beside plain numpy, training beside an evaluation; SCIPY=PYTHON that has it
	$(RUN) tests.bench.metrics $(if $(SCIPY),--scipy $(SCIPY))
	$(RUN) tests.bench.evaluation

system-tools:  # what tests inject with and check scripts by; they skip with the reason where this cannot install it
	@for tool in strace ip faketime shellcheck; do command -v $$tool >/dev/null || missing=1; done; \
	[ -d /usr/share/datasets/fashion-mnist ] || missing=1; [ -z "$$missing" ] \
	  || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && apt-get update -qq \
	       && apt-get install -qq -y --no-install-recommends strace iproute2 faketime shellcheck dataset-fashion-mnist; } \
	  || echo "strace, iproute2, faketime, shellcheck or dataset-fashion-mnist missing: install them to run every test"

clean:
	rm -rf .venv .venv-bench build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
