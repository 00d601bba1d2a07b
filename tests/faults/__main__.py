"""The whole fault harness -> runs/faults.md.

python -m tests.faults                 # about an hour on two cores
python -m tests.faults --short         # a few of each, minutes
"""

import argparse
import os
import platform
import subprocess
import sys
import time

from config import write_atomically

PARTS = {  # command: its arguments, and those of --short
    "tests.faults.kills": (
        "--count 20 --times 30 --terms 20 --ranks 4",
        "--count 2 --times 2 --terms 2",
    ),
    "tests.faults.files": ("", "--every 9"),
    "tests.faults.hostile": ("--count 10000", "--count 500"),
    "tests.faults.damaged_worlds": ("--count 600", "--count 60"),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    text = f"# Reliability, measured\n\n`python -m tests.faults` on {platform.machine()}, "
    text += f"{os.cpu_count()} cores. What each part does is in the docstring of its file.\n"
    failed = 0
    for module, flags in PARTS.items():
        words = flags[args.short].split()
        start = time.time()
        done = subprocess.run(
            [sys.executable, "-m", module, *words], capture_output=True, text=True
        )
        failed += done.returncode != 0
        said = done.stdout.strip() or done.stderr.strip().splitlines()[-1]
        command = " ".join(["python -m", module, *words])
        text += f"\n`{command}`, {time.time() - start:.0f} s:\n\n```\n{said}\n```\n"
        print(f"{command}\n{said}\n", flush=True)
    if not args.short:
        write_atomically("runs/faults.md", text)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
