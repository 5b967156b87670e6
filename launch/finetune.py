"""Fine-tune for classification, or with task=segmentation, task=detection, task=video for what these say.

deepspeed launch/finetune.py experiment=demo_classification checkpoint=runs/demo_simmim
deepspeed launch/finetune.py experiment=demo_segmentation
deepspeed launch/finetune.py experiment=demo_video checkpoint=runs/of_images
"""

import sys

from swinv2_scale import run

if __name__ == "__main__":
    run.main("finetune", sys.argv[1:], run.training)
