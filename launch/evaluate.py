"""Evaluate weights on held-out data.

deepspeed launch/evaluate.py experiment=demo_classification checkpoint=runs/demo_classification
"""

import sys

from swinv2_scale import run

if __name__ == "__main__":
    run.main("evaluate", sys.argv[1:], run.evaluation)
