"""Kill a run wherever it can be killed; what it ends with must be what the unbroken run ends with.

python -m tests.faults.kills --count 60     # of each phase, at file operations all over it
python -m tests.faults.kills --times 20     # at random times
python -m tests.faults.kills --terms 20     # SIGTERM at random times
python -m tests.faults.kills --ranks 3      # one of two processes of torchrun
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import runs

ROOT = Path(__file__).resolve().parent.parent.parent


def unbroken(folder) -> dict:
    """Run the three phases -> phase: (digest, seconds, file operations). The folder as it was
    before each is kept in folder.before-<phase>.
    """
    result = {}
    for phase in runs.SCRIPTS:
        shutil.copytree(folder, before(folder, phase))
        start = time.time()
        code = runs.run(phase, folder, count_to=folder / "operations")
        assert code == 0, runs.said(folder)
        steps = [line["optimizer_steps"] for line in runs.log(folder, phase)]
        assert sum(steps), f"{phase}: without a step there is little to lose"
        operations = int((folder / "operations").read_text())
        result[phase] = (runs.digest(folder, phase), time.time() - start, operations)
    return result


def before(folder, phase) -> Path:
    return folder.with_name(f"{folder.name}.before-{phase}")


def again(folder, phase) -> Path:
    """A fresh copy of the folder as it was before a phase."""
    copy = folder.with_name("hurt")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(before(folder, phase), copy)
    return copy


def verdict(copy, phase, digest) -> str:
    """Run the same command to its end -> "same", or what went wrong."""
    code = runs.run(phase, copy)
    if code:
        return f"exit code {code}: {runs.said(copy).strip().splitlines()[-1]}"
    return "same" if runs.digest(copy, phase) == digest else "another result"


def at_operations(folder, good, count, first=0.0) -> list:
    """Kill each phase at `count` file operations spread over it -> verdicts.

    first   share of the operations before the first kill
    """
    verdicts = []
    for phase, (digest, _, operations) in good.items():
        for number in range(count):
            at = 1 + int((first + (1 - first) * number / count) * operations)
            copy = again(folder, phase)
            code = runs.run(phase, copy, die_at=at)
            assert code == 137, f"the child was to die at operation {at}: {code}"
            verdicts.append((f"{phase} at operation {at}", verdict(copy, phase, digest)))
    return verdicts


def at_times(folder, good, count, number=signal.SIGKILL) -> list:
    """Send a signal at random times -> verdicts. A phase may have ended before."""
    rng = random.Random(0)
    verdicts = []
    for n in range(count):
        phase = list(good)[n % len(good)]
        digest, seconds, _ = good[phase]
        copy = again(folder, phase)
        late = "--save_minutes 99" if number == signal.SIGTERM else ""  # only the signal saves
        child = runs.start(phase, copy, flags=late)
        time.sleep(rng.random() * seconds)
        os.kill(child, number)
        code = runs.wait(child)
        name = f"{phase}, {signal.Signals(number).name}, exit code {code}"
        if number == signal.SIGTERM and code not in (0, 143, -signal.SIGTERM):
            verdicts.append((name, runs.said(copy).strip().splitlines()[-1]))
            continue
        verdicts.append((name, verdict(copy, phase, digest)))
    return verdicts


def of_ranks(folder, count) -> list:
    """Kill one of two processes of torchrun in a warm-up, then start it again -> verdicts."""
    flags = f"{runs.FLAGS} --data shop --device cpu"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", "2", "--", str(ROOT / "warmup.py"), *flags.split()]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def torchrun(cwd):
        return subprocess.Popen(launch, cwd=cwd, env=environment, **quiet)

    whole = again(folder, "warmup")
    start = time.time()
    assert torchrun(whole).wait() == 0
    seconds = time.time() - start
    digest = runs.digest(whole, "warmup")
    rng = random.Random(1)
    verdicts = []
    for n in range(count):
        copy = again(folder, "warmup")
        process = torchrun(copy)
        time.sleep((0.4 + 0.55 * rng.random()) * seconds)
        workers = children(process.pid)
        if workers:
            os.kill(workers[n % len(workers)], signal.SIGKILL)
        process.wait()
        code = torchrun(copy).wait()
        same = code == 0 and runs.digest(copy, "warmup") == digest
        verdicts.append((f"rank killed, {len(workers)} alive", "same" if same else f"code {code}"))
    return verdicts


def children(pid) -> list:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def summary(name, verdicts) -> str:
    same = sum(result == "same" for _, result in verdicts)
    lines = [f"{name}: {same} of {len(verdicts)} ended as the unbroken run"]
    lines += [f"  {where}: {result}" for where, result in verdicts if result != "same"]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=0, help="kills of each phase, by operation")
    parser.add_argument("--times", type=int, default=0, help="kills at random times")
    parser.add_argument("--terms", type=int, default=0, help="SIGTERMs at random times")
    parser.add_argument("--ranks", type=int, default=0, help="kills of one of two ranks")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder_name:
        folder = runs.prepare(Path(folder_name) / "whole")
        good = unbroken(folder)
        for phase, (_, seconds, operations) in good.items():
            print(f"{phase}: {seconds:.1f} s, {operations} file operations")
        verdicts = {
            "kills at file operations": at_operations(folder, good, args.count),
            "kills at random times": at_times(folder, good, args.times),
            "SIGTERM at random times": at_times(folder, good, args.terms, signal.SIGTERM),
            "one of two ranks": of_ranks(folder, args.ranks) if args.ranks else [],
        }
    for name, results in verdicts.items():
        if results:
            print(summary(name, results))
    sys.exit(any(result != "same" for results in verdicts.values() for _, result in results))


if __name__ == "__main__":
    main()
