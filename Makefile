# Everything runs in .venv, which make creates from a bare Python 3.11 or 3.12.
# `make test PYTHON=python3` uses an environment that already has everything and installs nothing.
BASE_PYTHON ?= python3
EXTRAS := notebooks,grading,test

ifdef PYTHON
    RUN := $(PYTHON)
    READY :=
else
    RUN := .venv/bin/python
    READY := .venv/installed
endif

.PHONY: help env demo test gpu grading-bench semester build lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   a class of made-up students, graded from release to feedback"
	@echo "make test   the whole test suite, with every notebook executed (on the CPU where there is no GPU)"
	@echo "make gpu    everything on a CUDA device, and one report in build/gpu; goes on where it was stopped; ONLY=tests"
	@echo "make grading-bench  a class of 200 killed and resumed, 100,000 fuzzed inputs, and the speed beside nbgrader"
	@echo "make semester  60 students, every lab, three learning platforms; killed ten times and gone on with"
	@echo "make build  build labs/ and solutions/*.ipynb from the masters"
	@echo "make lint   ruff, and whether notebooks and pages match masters and specs"
	@echo "make clean  remove build/ and caches"
	@echo "make env    only create .venv"

env: $(READY)

.venv/installed: pyproject.toml constraints.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "$(BASE_PYTHON) is too old: Python 3.11 or newer is needed; name one with BASE_PYTHON=python3.12"; exit 2; }
	@echo "Creating .venv and installing (a few minutes, about 3 GB on a CPU)"
	@$(BASE_PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --no-compile -c constraints.txt \
	    -e '.[$(EXTRAS)]'
	@.venv/bin/python -m compileall -qq -j 0 .venv/lib || true  # pip does it on one core; some files are no Python
	@touch $@

demo: $(READY)
	$(RUN) -m effnlp_lab demo

test: $(READY)
	$(RUN) -m effnlp_lab test

gpu: $(READY)
	$(RUN) -m effnlp_lab gpu $(foreach part,$(ONLY),--only $(part))

grading-bench: $(READY)
	EFFNLP_GRADING_SIZE=200 EFFNLP_FUZZ=100000 $(RUN) -m pytest tests/grading/test_class_scale.py \
	    tests/grading/test_repair.py tests/grading/test_protocol.py --timeout 7200
	EFFNLP_GRADING_SIZE=200 $(RUN) -m effnlp_lab bench grading --device cpu

semester: $(READY)
	EFFNLP_SEMESTER=60 $(RUN) -m pytest tests/grading/test_semester.py --timeout 36000

build: $(READY)
	$(RUN) -m effnlp_lab build

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m effnlp_lab build --check
	$(RUN) -m effnlp_lab docs --check

clean:
	rm -rf build dist *.egg-info grading/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
