"""Run by test_parallel.py under torchrun: all scripts in one start of two processes.

python tests/two_ranks_phases.py <flags of all scripts>
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill
import evaluate
import mine
import warmup
from runtime import parallel


def main(flags):
    for script in (warmup, mine, distill, evaluate):
        more = ["--eval_items", "6"] if script is evaluate else []
        sys.argv = [f"{script.__name__}.py", *flags, *more]
        script.main()
    parallel.destroy()


if __name__ == "__main__":
    main(sys.argv[1:])
