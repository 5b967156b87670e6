"""Submit a training, or several that follow each other, to a cluster. conf/submit.yaml says what can be set.

python launch/submit.py cluster=slurm nodes=4 cluster.accelerators=8 cluster.time=1-00:00:00 \
    pretrain experiment=simmim_b --then finetune experiment=simmim_b_finetune checkpoint=runs/simmim_b
python launch/submit.py --dry-run …                 print the batch scripts, submit nothing
"""

import sys
from pathlib import Path

from swinv2_scale import submit


def main(argv: list[str]) -> int:
    """Print scripts or job ids. A ValueError is the user's to solve: one paragraph and exit code 2."""
    if {"-h", "--help"} & set(argv):
        print(__doc__, submit.help_text(), sep="\n")
        return 0
    try:
        jobs = submit.jobs([argument for argument in argv if argument != "--dry-run"], Path(__file__).parent)
        if "--dry-run" in argv:
            print("\n".join(job.script for job in jobs), end="")
        else:
            for job, number in zip(jobs, submit.submit(jobs), strict=True):
                print(f"{number}  {job.name}  {job.log(number)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
