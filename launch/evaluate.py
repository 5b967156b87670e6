"""Evaluate weights on held-out data: shards, or a plain folder CLASS/picture.jpg.

deepspeed launch/evaluate.py checkpoint=runs/mine data.validation=/data/imagenet/val
torchrun --nproc-per-node 8 launch/evaluate.py checkpoint=runs/mine data.validation=/data/imagenetv2
deepspeed launch/evaluate.py task=video checkpoint=runs/clips data.validation=SHARDS task.evaluation_transform.views=4
"""

import sys
from functools import partial

from swinv2_scale import evaluation, run

if __name__ == "__main__":
    run.main("evaluate", sys.argv[1:], partial(evaluation.evaluation, argv=sys.argv[1:]))
