# What people do every day. `make demo` and `make test` work on a fresh machine with Python 3.11 and make.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 0 2>/dev/null && echo $$p && break; done)
BIN = .venv/bin
KODAK ?= ../shared/data/kodak
BENCH ?= --two 1.2,1.6,2,2.4,2.8 --three 2.4,2.8,3.2,3.6,4
OLD ?= models/lean
RUN ?= runs/new
BASELINES ?= runs/baselines
STEPS ?= 5000
DATA ?= $(wildcard ../shared/data/train-*.tar)
CURVES ?= ../shared/anchors/kodak_single_layer_rd.json

.PHONY: demo test check format install tables speed effort layers quality weights-check train train-paper baselines fuzz golden wasm screenshots clean

demo: install  ## encode a photograph in three sizes, decode all three, print the table
	@mkdir -p out
	@cp "$$($(BIN)/python -c 'import matplotlib; print(matplotlib.get_data_path())')/sample_data/grace_hopper.jpg" out/
	$(BIN)/compass encode out/grace_hopper.jpg --scales 1,2.0,3.2 --force --verify
	$(BIN)/compass info out/grace_hopper.cmps
	$(BIN)/compass decode out/grace_hopper.cmps --all --force

test: check  ## everything that must pass before a change lands
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs --durations=10 -n auto --maxprocesses 4 --dist loadfile

check: install  ## formatting, lint and types
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy

format: install
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

install: .venv/installed

.venv/installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

tables: install  ## COMPASS next to other codecs on the Kodak pictures; writes docs/results.md
	$(BIN)/compass bench --images $(KODAK) --out out/bench $(patsubst %,--curves %,$(wildcard ../shared/anchors/*_rd.json)) $(BENCH)
	cp out/bench/results.md out/bench/*.png docs/

speed: install  ## where time and memory go: docs/performance.md (LARGE=--large: large pictures instead, ten minutes)
	$(BIN)/python -W ignore -m compass_codec.measure.speed $(LARGE)

effort: install  ## what --effort brings and costs
	OMP_NUM_THREADS=1 $(BIN)/python -m compass_codec.measure.effort --images $(KODAK) --quick 6 --effort 3

quality: install  ## what the numbers of the quality scale mean, next to other formats; writes docs/quality.md
	@mkdir -p out
	$(BIN)/python -W ignore -m compass_codec.measure.quality --images $(KODAK) --quick 4 > out/quality.md
	cp out/quality.md docs/

layers: install  ## what several qualities of one size cost
	OMP_NUM_THREADS=1 $(BIN)/python -m compass_codec.measure.layers --images $(KODAK) --quick 6 --side 256

weights-check: install  ## make weights-check NEW=runs/a/weights: may these replace the weights in models/?
	$(BIN)/python -m compass_codec.measure.ratchet $(OLD) $(NEW) --images $(KODAK) --curves $(CURVES) $(QUICK)

# Stages in turn, within half an hour of one GPU, from the weights in models/ (or START='--weights ...'). DATA: tars or folders.
train: START ?= --weights models/lean
train-paper: START ?= --weights models/paper
PHOTOS = $(DATA:%=--data %)
GOES_ON = --resume $(RUN) --weights $(RUN)/weights

train: install  ## train lean
	$(BIN)/compass train lean-context $(PHOTOS) --minutes 14 --batch 64,32 --side 128,256 --lr 8e-4 --compile --resume $(RUN) $(START)
	$(BIN)/compass train lean-layers $(PHOTOS) --minutes 12 --batch 32 --side 192 --lr 6e-4 $(GOES_ON)
	$(BIN)/python -m compass_codec.training.tables $(RUN)/weights $(PHOTOS)

train-paper: install  ## train the networks of the paper
	$(BIN)/compass train base $(PHOTOS) --minutes 10 --batch 64,32 --side 128,256 --lr 4e-4 --resume $(RUN) $(START)
	$(BIN)/compass train liff $(PHOTOS) --minutes 3 --batch 64 --side 128 --lr 6e-4 $(GOES_ON)
	$(BIN)/compass train residual $(PHOTOS) --minutes 7 --batch 64,32 --side 128,256 --lr 4e-4 $(GOES_ON)
	$(BIN)/compass train joint $(PHOTOS) --minutes 3 --batch 32 --side 192 --lr 1e-4 $(GOES_ON)
	$(BIN)/python -m compass_codec.training.tables $(RUN)/weights $(PHOTOS)

baselines: install  ## train the systems of the papers for STEPS steps each; docs/baselines.md
	$(BIN)/python -m compass_codec.training.baselines $(BASELINES) $(PHOTOS) --steps $(STEPS) $(if $(START),--weights $(START))

fuzz: install  ## 100,000 broken files, 20,000 damaged pictures, then the coverage-guided fuzzer on the container
	$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris==3.0.0
	cd tests && ../$(BIN)/python -W ignore mutate.py 100000
	cd tests && ../$(BIN)/python -W ignore fuzz_pictures.py 20000
	cd tests && ../$(BIN)/python fuzz_container.py -runs=1000000 -max_total_time=120

golden: install  ## new golden files, after new weights
	cd tests && ../$(BIN)/python -W ignore make_golden.py

screenshots: install  ## the pictures of docs/serving.md; needs Chromium and chromedriver
	cd tests && ../$(BIN)/python make_screenshots.py

wasm:  ## the decoder's WebAssembly module for browsers, after a change of kernels.ts; needs npx
	cd src/compass_codec/web && npx --yes --package=assemblyscript@0.28.20 asc kernels.ts -o kernels.wasm -O3 \
		--runtime stub --importMemory --initialMemory 1 --enable simd --noAssert

clean:
	rm -rf out build .mypy_cache .pytest_cache .ruff_cache
