"""Fine-tune for classification, or for segmentation with task=segmentation.

deepspeed launch/finetune.py experiment=demo_classification checkpoint=runs/demo_simmim
deepspeed launch/finetune.py experiment=demo_segmentation
"""

import sys

from swinv2_scale import run

if __name__ == "__main__":
    run.main("finetune", sys.argv[1:], run.training)
