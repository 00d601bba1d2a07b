"""A phase's saves: written aside, flushed, hashed, swapped in whole; the last two are kept.

| runs/<run>/       | holds                                                                      |
|-------------------|----------------------------------------------------------------------------|
| <phase>/          | the last save                                                              |
| <phase>.old/      | the one before                                                             |
| <phase>.part/     | one that was being written when the process ended; overwritten by the next |
| <phase>.damaged/  | one that failed its check, kept for a look                                 |

A save's manifest.json has the size and the SHA-256 of every other file in it; `find` checks them,
so a torn file or a flipped bit is named and the save before it is used.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from config import UserError

MANIFEST = "manifest.json"


def sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(folder) -> dict:
    """Relative path -> (size, SHA-256) of every file of a save but its manifest."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST]
    return {str(p.relative_to(folder)): [p.stat().st_size, sha256(p)] for p in paths}


def flush(path):
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def put(part: Path, folder: Path):
    """Make the written folder `part` the save `folder`; what was there becomes `folder`.old.

    Interrupted anywhere, a whole save stays: `folder`, or `folder`.old between the two renames.
    """
    (part / MANIFEST).write_text(json.dumps(files_of(part), indent=1))
    for path in [*part.rglob("*"), part]:
        flush(path)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    part.rename(folder)
    flush(folder.parent)


def problem(folder: Path) -> str:
    """What is wrong with a save, naming the file; "" if every file is as it was written."""
    try:
        recorded = json.loads((folder / MANIFEST).read_text())
        for name, (size, digest) in recorded.items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size:,} bytes, {size:,} were written"
            if sha256(path) != digest:
                return f"{path} is not what was written (SHA-256 differs)"
    except FileNotFoundError:
        return f"{folder / MANIFEST} is missing"
    except (OSError, ValueError, TypeError, AttributeError):
        return f"{folder / MANIFEST} is damaged"
    return ""


def find(root: Path, phase: str, set_aside=False):
    """The newest whole save of a phase -> its folder, or None where it was never saved.

    set_aside   move a damaged one to <phase>.damaged, so that the next save does not replace the
                good one before it

    UserError when there are saves, and all are damaged. One without a manifest, from before there
    were any, is used where there is no other.
    """
    newest = root / phase
    before = root / f"{phase}.old"
    problems = [problem(newest)] if newest.exists() else []
    if problems == [""]:
        return newest
    if before.exists():
        problems.append(problem(before))
        if not problems[-1]:
            reason = problems[0] if newest.exists() else f"{newest} is missing"
            print(f"{reason}; the save before it, {before}, is used")
            if newest.exists() and set_aside:
                damaged = root / f"{phase}.damaged"
                shutil.rmtree(damaged, ignore_errors=True)
                newest.rename(damaged)
            return before
    if (newest / "state.pt").exists() and not (newest / MANIFEST).exists():
        print(f"{newest} has no {MANIFEST} and cannot be checked; it is used as it is")
        return newest
    if problems:
        remedy = f"delete {newest} and {before} to begin the phase anew"
        raise UserError(f"{'; '.join(problems)}: no whole save of {phase} is left; {remedy}")
    return None
