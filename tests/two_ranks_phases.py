"""Run by test_parallel.py under torchrun: the scripts one after the other, as a user starts them.

    python tests/two_ranks_phases.py <flags of all scripts>

One start of two processes instead of four.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import distill
import evaluate
import mine
import warmup
from runtime.run import run_script


def main(flags):
    for script in (warmup, mine, distill, evaluate):
        more = ["--eval_items", "6"] if script is evaluate else []
        sys.argv = [f"{script.__name__}.py", *flags, *more]
        run_script(script.main)


if __name__ == "__main__":
    main(sys.argv[1:])
