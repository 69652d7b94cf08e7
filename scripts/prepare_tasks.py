"""Write the tasks' train, test and holdout files: `meteora prepare`, with the same arguments.

    pip download bigbench==1.0.0 --no-deps --no-binary :all:
    python scripts/prepare_tasks.py bigbench-1.0.0.tar.gz runs/tasks
    python scripts/prepare_tasks.py hub runs/tasks

Status 1 when the source was refused, or when a question of the `--verify` file is not reproduced.
"""

import sys

from meteora_jax.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
