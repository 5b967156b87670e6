"""Pretrain a backbone.

deepspeed launch/pretrain.py experiment=demo_simmim
torchrun --nproc-per-node 8 launch/pretrain.py model=b data.train=/shards/train name=b epochs=100 global_batch=2048
python launch/pretrain.py …                         one rank
"""

import sys

from swinv2_scale import run

if __name__ == "__main__":
    run.main("pretrain", sys.argv[1:], run.training)
