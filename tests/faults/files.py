"""Damage every file of a run in every way; it must be named, and the run must recover.

    python -m tests.faults.files                 # all files x all damages
    python -m tests.faults.files --every 7       # every seventh case

After `warmup.py` and `mine.py` a file of mine/ or of the run is damaged and `distill.py` started.
Allowed: it ends as the unbroken run does; or it ends with one line, "error: ...", and does so after
the script that the line names was run again. A traceback, or another result, is a failure; so is
silence about a damaged file of a save.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.faults import kills, runs


def damages(data: bytes) -> dict:
    """Name -> what is left of a file; None: it is gone."""
    middle = len(data) // 2
    flipped = bytes([data[middle] ^ 16]) if data else b""
    return {
        "deleted": None,
        "emptied": b"",
        "cut in half": data[:middle],
        "a bit flipped": data[:middle] + flipped + data[middle + 1 :],
        "one byte less": data[:-1],
        "another first byte": bytes([data[0] ^ 1]) + data[1:] if data else b"",
        "zeros at the end": data[: -len(data) // 4 or 1] + bytes(len(data) // 4),
        "something appended": data + b"\x00{",
    }


def cases(folder) -> list:
    """(file relative to the run, damage) of what `distill.py` reads of the run."""
    root = folder / "runs" / "r"
    found = []
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        flags = name in ("warmup/config.json", "warmup/manifest.json")
        if path.is_file() and (flags or not name.startswith(("warmup", "mine.old", "lock"))):
            found += [(name, damage) for damage in damages(b"")]
    return found


def try_case(folder, name, damage) -> tuple:
    """(whether the damage was said, "same" or what went wrong).

    What a log has lost is lost: with a damaged log "same" means the weights and the skills.
    """
    logs = name not in ("metrics.jsonl", "episodes.jsonl")
    digest = runs.digest(folder, "distill", logs)
    copy = kills.again(folder, "distill")
    path = copy / "runs" / "r" / name
    content = damages(path.read_bytes())[damage]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    was_said = False
    for _ in range(4):  # distill, the script it asks for, distill, ...
        code = runs.run("distill", copy)
        text = runs.said(copy)
        # a flip in the manifest is said of the file that no longer agrees with it
        was_said |= path.name in text or "the save before it" in text
        if "Traceback" in text:
            return was_said, f"traceback: {text.strip().splitlines()[-1]}"
        if code == 0:
            same = runs.digest(copy, "distill", logs) == digest
            return was_said, "same" if same else "another result"
        line = text.strip().splitlines()[-1]
        asked = re.search(r"python (warmup|mine)\.py", line)
        if code != 2 or not line.startswith("error: "):
            return was_said, f"exit code {code}: {line}"
        if not asked:
            return was_said, f"no way on: {line}"
        code = runs.run(asked[1], copy)
        was_said |= path.name in runs.said(copy)
        if code:
            return was_said, f"{asked[1]}: {runs.said(copy).strip().splitlines()[-1]}"
    return was_said, "went round in circles"


def full_disk(folder, size="3m") -> str:
    """A warm-up on a file system with so much room: it must end with one line, the last save whole.

    -> what it said; "" where this process may not mount one.
    """
    place = folder.with_name("small")
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        return ""
    try:
        copy = kills.before(folder, "warmup")
        shutil.copytree(copy, place, dirs_exist_ok=True)
        code = runs.run("warmup", place)
        line = runs.said(place).strip().splitlines()[-1]
        return f"exit code {code}: {line}"
    finally:
        subprocess.run(["umount", str(place)])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=1, help="take every so many-th case")
    parser.add_argument("--first", type=int, default=0, help="from this one on")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = runs.prepare(Path(name) / "whole")
        kills.unbroken(folder)
        results = {"same": 0}
        chosen = cases(kills.before(folder, "distill"))[args.first :: args.every]
        silent = []
        for file, damage in chosen:
            was_said, result = try_case(folder, file, damage)
            results[result] = results.get(result, 0) + 1
            if result != "same":
                print(f"{file}, {damage}: {result}")
            if not was_said and "/" in file:
                silent.append(f"{file}, {damage}")
        print(f"{len(chosen)} damaged files: {results}")
        print(f"damage in a save that was not said: {len(silent)} {silent}")
        print(f"full disk: {full_disk(folder) or 'not tried: no right to mount'}")
    sys.exit(len(chosen) > results["same"] or bool(silent))


if __name__ == "__main__":
    main()
