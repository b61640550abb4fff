# make demo    install, make the toy data set, train a small model on it, draw what it detects
# make test    install, run every test but the longest
# make test-full   run the longest
# make zoo     train a small model of every kind, and print what they reach
# make evidence    run all comparisons of experiments/ that need no COCO: hours; see docs/RESULTS.md
# make notebook    run notebooks/tour.ipynb as it is in the repository
# make op      compile deformable attention, for the CPU and for CUDA where its toolkit is
# make gpu     on a machine with a GPU: try and measure there whatever needs one, in nine minutes
# make lint    check formatting, style and types
# make docs    build the documentation into site/
#
# Each creates the virtual environment .venv if necessary and reuses it; make docs uses .venv-docs,
# which needs no torch. make gpu installs nothing: without .venv it uses $(PYTHON).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= dino
DATA := outputs/toy_coco
OUT := outputs/demo
CPU_OP := ops/libms_deform_attn_cpu.so
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal
PIP_OPTIONS := --quiet --disable-pip-version-check

.PHONY: demo zoo evidence test test-full notebook op gpu lint docs clean

$(VENV)/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_OPTIONS) -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/pip install $(PIP_OPTIONS) -r requirements-dev.txt
	touch $@

# Without a compiler this fails, which is no reason to stop: the PyTorch reference is used.
$(CPU_OP): ops/setup.py ops/src/ms_deform_attn_cpu.cpp $(VENV)/.installed
	-MS_DEFORM_ATTN_CPU_ONLY=1 $(BIN)/python ops/setup.py --quiet build_ext --inplace

op: $(VENV)/.installed
	$(BIN)/python ops/setup.py --quiet build_ext --inplace
	$(BIN)/python -m ops

$(DATA)/annotations/instances_val2017.json: | $(VENV)/.installed
	$(BIN)/python -m datasets.toy --root $(DATA) --num_val 200

demo: $(DATA)/annotations/instances_val2017.json $(CPU_OP)
	$(BIN)/python main.py -c configs/toy/$(MODEL).py --coco_path $(DATA) --output_dir $(OUT) --overwrite \
		--draw_images 16
	$(BIN)/python inference.py --resume $(OUT)/checkpoint.pth --coco_path $(DATA) --threshold 0.3 \
		--output_dir $(OUT)/pictures
	$(BIN)/python -m util.visualize $(OUT)/log.txt --output $(OUT)/training.png
	@echo "Pictures: $(OUT)/pictures, loss and AP by epoch: $(OUT)/training.png"

zoo: $(VENV)/.installed $(CPU_OP)
	$(BIN)/python tools/experiment.py zoo

# DATASETS: the directory that contains bccd and cards, see README.
evidence: $(VENV)/.installed-dev $(CPU_OP)
	$(BIN)/python tools/experiment.py --data $(or $(DATASETS),data)

test: $(VENV)/.installed-dev $(CPU_OP)
	$(PYTEST)

test-full: $(VENV)/.installed-dev $(CPU_OP)
	$(PYTEST) -m full

notebook: $(VENV)/.installed-dev $(CPU_OP)
	$(BIN)/python -m pytest --nbmake notebooks

gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Reads signatures and docstrings from the sources; nothing is imported.
docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --quiet

$(VENV)-docs/.installed: requirements-docs.txt
	test -x $(VENV)-docs/bin/python || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install $(PIP_OPTIONS) -r requirements-docs.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-docs site outputs build ops/build *.egg-info ops/*.egg-info ops/*.so
