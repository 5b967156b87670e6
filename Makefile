# make demo       install, pack real images, pretrain, fine-tune, evaluate, report: the main job, on a fresh machine
# make demo-video the same for videos: photographs and digits in motion, fine-tuned and evaluated over several views
# make demo-dense the same for objects: photographs with digits on them, a detector with masks, then every pixel's class
# make test       install, lint, types, tests (under 20 minutes on two cores)
# make test-long  the whole demo and longer sweeps
# make bench      steps of this project and of other libraries side by side; hours on two cores

PYTHON ?= python3
VENV   ?= .venv
RANKS  ?= 2
BIN    := $(abspath $(VENV))/bin
# The demo runs on CPU ranks everywhere, so that it shows the same on every machine.
DEMO   := PATH="$(BIN):$$PATH" DS_ACCELERATOR=cpu $(BIN)/deepspeed --num_accelerators $(RANKS)
# Two processes, a file of tests to each at a time: most of a test is one process that computes or waits.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
SHARDS := photographs/train photographs/validation digits/train digits/validation

.PHONY: demo demo-dense demo-video test test-long bench lint pack clean

demo: $(VENV)/.demo pack
	rm -rf runs/demo_simmim runs/demo_classification runs/demo_evaluation
	$(DEMO) launch/pretrain.py experiment=demo_simmim
	$(DEMO) launch/finetune.py experiment=demo_classification checkpoint=runs/demo_simmim
	$(DEMO) launch/evaluate.py experiment=demo_classification checkpoint=runs/demo_classification name=demo_evaluation
	@echo
	@$(BIN)/swinv2-scale report runs/demo_simmim runs/demo_classification
	@echo
	@echo "Your own images:  $(VENV)/bin/swinv2-scale data pack IMAGES/train shards/train    (IMAGES/train/CLASS/*.jpg)"
	@echo "                  $(VENV)/bin/deepspeed launch/pretrain.py model=t name=mine data.train=shards/train epochs=100 global_batch=256"
	@echo "Your own cluster: the same command under torchrun or srun, one process per accelerator; see README.md"

demo-video: $(VENV)/.video
	@test -e data/motions/validation.csv || { rm -rf data/motions; $(BIN)/swinv2-scale data motions data/motions; }
	@for split in training validation; do $(BIN)/swinv2-scale data pack data/motions/$$split.csv data/motions_$$split --format kinetics || exit 1; done
	rm -rf runs/demo_video runs/demo_video_test
	$(DEMO) launch/finetune.py experiment=demo_video
	$(DEMO) launch/evaluate.py experiment=demo_video name=demo_video_test checkpoint=runs/demo_video \
	    task.evaluation_transform.views=4 task.evaluation_transform.crops=3 task.evaluation_transform.resize=1.25
	@$(BIN)/swinv2-scale report runs/demo_video

demo-dense: $(VENV)/.demo
	rm -rf data/scenes runs/demo_detection runs/demo_evaluation_detection runs/demo_segmentation runs/demo_evaluation_segmentation \
	    data/objects_training data/objects_validation data/scenes_training data/scenes_validation
	$(BIN)/swinv2-scale data scenes data/scenes
	@for split in training validation; do \
		$(BIN)/swinv2-scale data pack data/scenes/images/instances_$$split.json data/objects_$$split --format coco || exit 1; \
		$(BIN)/swinv2-scale data pack data/scenes/images/$$split data/scenes_$$split --format ade20k || exit 1; \
	done
	$(DEMO) launch/finetune.py experiment=demo_detection
	$(DEMO) launch/evaluate.py experiment=demo_detection checkpoint=runs/demo_detection name=demo_evaluation_detection
	$(DEMO) launch/finetune.py experiment=demo_segmentation
	$(DEMO) launch/evaluate.py experiment=demo_segmentation checkpoint=runs/demo_segmentation name=demo_evaluation_segmentation
	@echo
	@$(BIN)/swinv2-scale report runs/demo_detection
	@$(BIN)/swinv2-scale report runs/demo_segmentation

pack: $(VENV)/.demo
	@for shards in $(SHARDS); do $(BIN)/swinv2-scale data pack $$shards data/$$shards --format demo || exit 1; done

test: lint
	$(BIN)/python -m pytest -m "not long" $(PARALLEL)

test-long: $(VENV)/.test
	$(BIN)/python -m pytest $(PARALLEL)

bench: $(VENV)/.test
	$(BIN)/python docs/benchmarks/training_step.py --modes training inference simmim --compile

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# PyTorch comes first: the kernels are compiled against it while the package is installed, again when they change.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q 'torch>=2.10'
	@touch $@

$(VENV)/.demo: $(VENV)/.torch setup.py pyproject.toml $(wildcard kernels/*.*)
	$(BIN)/python -m pip install -q -e '.[demo,detection]'
	@touch $@

$(VENV)/.video: $(VENV)/.demo
	$(BIN)/python -m pip install -q -e '.[demo,video]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch setup.py pyproject.toml $(wildcard kernels/*.*)
	$(BIN)/python -m pip install -q -e '.[demo,test]'
	@touch $@

clean:
	rm -rf build *.egg-info
