# make demo    install, make the toy data set, train a small model on it, draw what it detects
# make test    install, run every test
# make lint    check formatting and style
#
# Each makes the virtual environment .venv when there is none and reuses it when there is.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= dn_dab_detr
DATA := outputs/toy_coco
OUT := outputs/demo

.PHONY: demo test lint clean

$(VENV)/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m datasets.toy --root $(DATA) --num_val 200
	$(BIN)/python main.py -c configs/toy/$(MODEL).py --coco_path $(DATA) --output_dir $(OUT)
	$(BIN)/python inference.py --resume $(OUT)/checkpoint.pth --coco_path $(DATA) --threshold 0.2 \
		--output_dir $(OUT)/pictures
	$(BIN)/python -m util.visualize $(OUT)/log.txt --output $(OUT)/training.png
	@echo "Pictures: $(OUT)/pictures, loss and AP by epoch: $(OUT)/training.png"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) outputs
