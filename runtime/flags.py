"""The command line of a script -> Config: flag, else the run's own value, else preset, default."""

import difflib
import re
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from dataclasses import asdict, fields
from pathlib import Path

from config import PHASES, PRESETS, Config, UserError, check, read_json
from runtime import saves

KEPT = ("tiny-games", "tiny-shop", "webshop-cache")  # in runs/
KEPT += ("smollm2-base", "smollm2-taught", "smollm2-alfworld-taught")
OLD = {  # what a run may have been begun with: what it is now
    "human_goals": "--split train:human",
    "internalize_gate": "--without gate",
    "internalize_tokens": "--without action_mask",
    "internalize_weight": "--without weight",
    "miner_model": "--miner URL#MODEL",
    "optimizer_offload": "--offload",
    "placebo": "--show neutral",
    "ref_offload": "--offload",
    "save_every": "--save_minutes",
    "skill_share": "--without skills",
    "split_rule": "--split train:verl",
    "trust_games": "--engine textworld-trusted",
    "validate": "--without validation",
}


def parse_config(phase: str, doc: str, extra=None):
    """The flags of a script -> Config, or (Config, an `extra` dataclass of flags).

    All but the warm-up take the run's flags as defaults, or those of --fork. UserError for an
    unknown flag, a value out of its limits, and a fixed flag that the run was not made with.
    """
    given = read_command_line([Config, extra] if extra else [Config], doc)
    name = given.get("preset", Config.preset)
    if name not in PRESETS:
        raise UserError(f"--preset {name}: choose one of {', '.join(PRESETS)}")
    preset = asdict(Config()) | PRESETS[name]
    run = given.get("run", preset["run"])
    fork = given.get("fork", "")
    check_name("run", run)
    check_name("fork", fork or run)
    before = PHASES[: PHASES.index(phase)] if phase in PHASES else ()
    if fork and (not before or run == fork):
        raise UserError(f"--fork {fork}: for mine.py and distill.py, with another --run")
    own = [earlier for earlier in before if saves.folders(Path("runs") / run, earlier)]
    if fork and own:
        raise UserError(f"--fork {fork}: {run} has its own {own[-1]}; use another --run")
    saved = saved_flags(Path("runs") / run) if phase != "warmup" else {}
    if fork and not saved:
        saved = saved_flags(Path("runs") / fork)
    more = {name: given.pop(name) for name in given.keys() - preset.keys()}
    config = Config(**preset | saved | given | {"run": run})
    for f in fields(Config):
        value = getattr(config, f.name)
        if f.metadata["fixed"] and saved.get(f.name, value) != value:
            raise other_value(f"the run {run}", f.name, saved[f.name], value)
    check(config)
    if config.group_size < 2 and "skills" not in config.without:
        raise UserError("--group_size 1: must be at least 2, for two halves, or --without skills")
    if phase == "mine" and "warmup" in config.without and (fork or own):
        what = f"--fork {fork}" if fork else f"the warm-up of {run}"
        raise UserError(f"--without warmup has no use for {what}: give a new --run alone")
    if extra:
        check(extra(**more))
    return (config, extra(**more)) if extra else config


def read_command_line(kinds, doc) -> dict:
    """Name -> value of the flags on the command line. --help shows the preset's values."""
    options = {"allow_abbrev": False, "argument_default": SUPPRESS}
    first = ArgumentParser(add_help=False, **options)
    first.add_argument("--preset", default=Config.preset)
    first.error = refuse
    preset = PRESETS.get(first.parse_known_args()[0].preset, {})
    options["formatter_class"] = RawDescriptionHelpFormatter
    parser = ArgumentParser(description=doc, **options)
    parser.error = refuse
    group = parser
    for kind in kinds:
        for f in fields(kind):
            if f.metadata["group"]:
                group = parser.add_argument_group(f.metadata["group"])
            add_flag(group, f, (asdict(kind()) | preset)[f.name])
    given, unknown = parser.parse_known_args()
    if unknown:
        word = unknown[0]
        name = word.split("=")[0].lstrip("-")
        known = [f.name for kind in kinds for f in fields(kind)]
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean --{close[0]}?" if close else "see --help"
        raise UserError(f"unknown flag {word}: {OLD.get(name) or hint}")
    return vars(given)


def add_flag(group, f, default):
    """Add a field to a group of the parser."""
    shown = ",".join(map(str, default)) if isinstance(default, list) else default
    text = f.metadata["help"] + (f" ({shown})" if shown != "" else "")
    if f.type is not str and f.metadata["choices"]:
        text = f"{', '.join(map(str, f.metadata['choices']))}; {text}"
    word = {int: "N", float: "X", bool: "false", str: "TEXT"}.get(f.type, "A,B")
    options = {"help": text.replace("%", "%%"), "type": f.type, "metavar": word}
    if f.type is bool:
        options |= {"type": true_or_false, "nargs": "?", "const": True}
    elif isinstance(default, list):
        (kind,) = f.type.__args__
        options["type"] = lambda text: sorted({kind(word) for word in text.split(",") if word})
    group.add_argument(f"--{f.name}", **options)


def true_or_false(text) -> bool:
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise ArgumentTypeError(f"{text!r} is not true or false")
    return text.lower() in ("true", "1", "yes")


def refuse(message):
    """What argparse found wrong, as one line."""
    raise UserError(f"{message}; see --help")


def check_name(flag_name, run):
    """UserError for a name that would write outside runs/, or over what else is kept there."""
    plain = re.fullmatch(r"[\w.-]+", run, re.ASCII) and run.strip(".")
    if not plain or re.fullmatch(rf"({'|'.join(KEPT)})(-\d)?", run):
        taken = ", ".join(KEPT)
        raise UserError(f"--{flag_name} {run!r}: use letters, digits, . _ and -, and not {taken}")


def saved_flags(root) -> dict:
    """The flags of a run: those of its first phase, from a save's config.json that is as it was
    written. {} for a run without a save. UserError where all are damaged, or of another version.
    """
    problems = []
    for phase in PHASES:
        for folder in saves.folders(root, phase):
            problem = saves.problem(folder, phase, "config.json")
            if not problem:
                if problems:
                    print(f"{'; '.join(problems)}; the flags are those of {folder}")
                return known_flags(folder / "config.json")
            problems.append(problem)
    if problems:
        raise UserError(f"{'; '.join(problems)}: the flags of {root} are lost; delete that folder")
    return {}


def known_flags(path) -> dict:
    """The flags of a file. UserError for one that this version does not have, or lacks."""
    flags = read_json(path)
    names = {f.name for f in fields(Config)}
    for name in sorted(set(flags) ^ names):
        known = OLD.get(name, "not a flag here")
        what = f"--{name} is {known}" if name in flags else f"no --{name}"
        raise UserError(f"{path}: {what}; it is of another version, begin a new --run")
    return flags


def other_value(where, name, old, new) -> UserError:
    remedy = "repeat that value, choose another --run, or delete the folder (and its .old)"
    return UserError(f"{where} was made with --{name} {old}, not {new}; {remedy}")
