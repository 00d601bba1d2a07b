"""A phase's saves: written aside, flushed, hashed, swapped in whole; the last two are kept.

| runs/<run>/       | holds                                                                      |
|-------------------|----------------------------------------------------------------------------|
| <phase>/          | the last save                                                              |
| <phase>.old/      | the one before                                                             |
| <phase>.part/     | one that was being written when the process ended; overwritten by the next |
| <phase>.damaged/  | one that failed its check, kept for a look                                 |
| lock              | which process has the run                                                  |

A save's manifest.json has the phase, and the size and the SHA-256 of every other file; `find`
checks them, so a torn file or a flipped bit is named and the save before it is used.
"""

import json
import os
import shutil
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: a run is not locked there
    fcntl = None

import torch

from config import PHASES, UserError, sha256

MANIFEST = "manifest.json"


def own(root: Path):
    """Make the folder of a run this process's, until that ends. UserError if another one has it."""
    root.mkdir(parents=True, exist_ok=True)
    handle = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o666)  # never closed, or it is free
    try:
        if fcntl:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = os.read(handle, 500).decode(errors="replace") or "another process"
        raise UserError(f"{root} is in use by {owner}: end that, or use another --run") from None
    except OSError:  # a file system without locks
        pass
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())


def names_in(folder: Path) -> list[str]:
    """Relative paths of every file of a save, but its manifest and what a system hides there."""
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    return [name for name in names if name != MANIFEST and "/." not in f"/{name}"]


def files_of(folder: Path) -> dict[str, list]:
    """Relative path -> [size, SHA-256] of every file of a save."""
    paths = {name: folder / name for name in names_in(folder)}
    return {name: [path.stat().st_size, sha256(path)] for name, path in paths.items()}


def seal(part: Path, phase: str):
    """Write the manifest of what is now in a folder."""
    content = {"phase": phase, "files": files_of(part)}
    (part / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_tensors(value, path):
    """torch.save. Where the disk refuses it an OSError says why; torch's own error does not."""
    with open(path, "wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            raise error.__context__ or error from None


def flush(path):
    """Wait until a file or a folder is on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if not path.is_dir():  # not every file system flushes folders
            raise


def put(part: Path, folder: Path):
    """Make the written `part` the save `folder`; what was there becomes `folder`.old. Stopped
    anywhere, a whole save stays: `folder`, or `folder`.old between the two renames.
    """
    seal(part, folder.name)
    for path in [*part.rglob("*"), part]:
        flush(path)
    old = folder.with_name(folder.name + ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    part.rename(folder)
    flush(folder.parent)


def problem(folder: Path, phase="", only="") -> str:
    """What is wrong with a save, or with its file `only`; "" where all is as it was written.
    UserError where it is the save of another phase than `phase`.
    """
    manifest = folder / MANIFEST
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        made_by, recorded = content["phase"], content["files"]
        if made_by in PHASES and phase not in ("", made_by):  # else a bit of its name was flipped
            raise UserError(f"{folder} is a save of {made_by}: give the folders back their names")
        for name in [only] if only else sorted({*recorded, *names_in(folder)}):
            path = folder / name
            if name not in recorded:
                return f"{manifest} does not know {name}"
            size, digest = recorded[name]
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size:,} bytes, {size:,} were written"
            if sha256(path) != digest:
                return f"{path} is not what was written: {MANIFEST} has another SHA-256"
        return ""
    except UserError:
        raise
    except FileNotFoundError:
        return f"{manifest} is missing"
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return f"{manifest} is damaged or of another version"


def folders(root: Path, phase: str) -> list[Path]:
    """The saves of a phase that are there, good or not, the last one first."""
    return [f for f in (root / phase, root / f"{phase}.old") if f.exists()]


def find(root: Path, phase: str, set_aside=False) -> Path | None:
    """The newest whole save of a phase, or None where it was never saved. UserError if all that
    there are are damaged. With set_aside a damaged one is moved to <phase>.damaged, so that the
    next save does not replace the good one before it.
    """
    newest, before = root / phase, root / f"{phase}.old"
    problems = []
    for folder in folders(root, phase):
        if reason := problem(folder, phase):
            problems.append(reason)
            continue
        if folder == before:
            reason = problems[0] if problems else f"{newest} is missing"
            print(f"{reason}; the save before it, {before}, is used")
            if problems and set_aside:
                damaged = root / f"{phase}.damaged"
                shutil.rmtree(damaged, ignore_errors=True)
                newest.rename(damaged)
        return folder
    if problems:
        remedy = f"delete {newest} and {before} to begin the phase anew"
        raise UserError(f"{'; '.join(problems)}: no whole save of {phase} is left; {remedy}")
    return None
