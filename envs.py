"""What the agent meets: worlds and their items, the prompts x_t and xs_t, the action in a response.

    env = make_env("alfworld", ".../valid_seen/<task>/<trial>/game.tw-pddl")
    obs = env.reset()                                   # Observation(text, task, task_type, ...)
    obs, reward, done, info = env.step("go to desk 1")  # 1.0 and done at the goal

Each world is a file of `worlds/` with the same few names, and a line of the table below. No torch.
"""

import hashlib
import importlib
import json
import os
import re
from pathlib import Path

from config import UserError, sha256
from worlds import Observation

WORLDS = {  # --env: the file that plays it
    "alfworld": "worlds.alfworld",
    "webshop": "worlds.webshop",
}
EMBEDDED = {  # data folder that is made where it is missing: the file that makes it
    "runs/tiny-games": "worlds.household",
    "runs/tiny-shop": "worlds.shop",
} | {f"runs/tiny-shop-{n}": "worlds.shop" for n in range(1, 6)}


def world(name: str):
    """The module of a world, imported when it is first asked for."""
    if name not in WORLDS:
        raise UserError(f"--env {name}: not a world of this project; choose {' or '.join(WORLDS)}")
    return importlib.import_module(WORLDS[name])


def make_env(name: str, item, engine: str = "fast"):
    """Open one item, which always starts the same -> a game with `reset()` and `step(action)`.

    item   as `list_items` gives it

    UserError for an item that is damaged or missing: what is opened can be played to its end.
    """
    return world(name).open_item(item, engine)


def data_root(name: str, data=None) -> Path:
    """The data folder: `data`, else $ALFWORLD_DATA or $WEBSHOP_DATA, else the world's default."""
    root = data or os.environ.get(f"{name.upper()}_DATA") or world(name).DATA
    if not root:
        raise UserError(f"--env {name}: set {name.upper()}_DATA or --data to the original's files")
    return Path(os.path.expanduser(root))  # Path.expanduser raises for an unknown ~user


def list_items(name: str, split: str, data=None, engine: str = "fast") -> list[str]:
    """Every item of a split, in a fixed order: what `make_env` opens. UserError where there are
    none, or `engine` is not installed.

    split   of the world: "train", "valid_seen", ...; of WebShop also "train:human", "train:verl"
    data    the folder of the original's files; an embedded one is made where it is missing
    """
    root = data_root(name, data)
    if str(root) in EMBEDDED:
        importlib.import_module(EMBEDDED[str(root)]).make(root)
    return world(name).list_items(root, split, engine)


def digest(name: str, items) -> str:
    """SHA-256 of the items' names and of all files behind them, wherever the data folder lies."""
    parts = [world(name).item_name(item) for item in items]
    parts += map(sha256, world(name).files(items))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# --- Prompts --------------------------------------------------------------------------------------

INSTRUCTION = (
    "Reason first, inside <think> </think>. Then choose one of the admissible actions and give it "
    "inside <action> </action>."
)
SKILL_FORM = {"condition": "when it applies", "strategy": "what to do"}  # of a summary


def build_prompts(obs: Observation, history=(), skills=(), keep: int = 2) -> tuple[str, str]:
    """The user messages of one step -> (x_t, xs_t): plain, and with the skills; equal without any.

    Both repeat the same steps. A world whose prompts can get too long (WebShop's above 13,000
    characters, as in verl-agent) drops the history of both as soon as one is longer.
    """
    for steps in (keep, 0):
        shown = build_prompt(obs, history, skills, steps)  # never the shorter one
        if len(shown) <= world(obs.world).LONGEST_PROMPT:
            break
    return build_prompt(obs, history, (), steps), shown


def build_prompt(obs: Observation, history=(), skills=(), keep: int = 2) -> str:
    """The user message of one step: x_t, or xs_t where there are skills.

    | field              | first step                     | later steps                            |
    |--------------------|--------------------------------|----------------------------------------|
    | role, task         | ALFWorld: role only (the task  | both                                   |
    |                    | is in obs); WebShop: both      |                                        |
    | skill block        | when there are skills          | when there are skills                  |
    | history            | -                              | steps taken, last `keep` (obs, action) |
    | observation        | current                        | step number, current                   |
    | admissible actions | quoted, one a line             | same                                   |
    | instruction        | think, then act                | same                                   |

    history   [(observation text, action), ...] of this episode, oldest first
    skills    [(condition, strategy), ...]; empty for the plain prompt
    """
    module = world(obs.world)
    parts = [module.ROLE]
    if history or not module.TASK_IN_FIRST_OBSERVATION:
        parts[0] += f" Your task is to: {obs.task}."
    if skills:
        parts.append("Experience that may help:")
        parts += [f"- When {condition}: {strategy}" for condition, strategy in skills]
    text = module.shown(obs.text, obs.task)
    if history:
        taken = len(history)
        parts.append(f"Steps taken so far: {taken}. The latest observations and your actions:")
        for n in range(max(0, taken - keep), taken):
            seen, action = history[n]
            seen = module.shown(seen, obs.task)
            parts.append(f"[Observation {n + 1}: '{seen}', Action {n + 1}: '{action}']")
        parts.append(f"Now at step {taken + 1}, you observe: {text}")
    else:
        parts.append(f"You observe: {text}")
    actions = "\n".join(f"'{action}'" for action in obs.admissible)
    parts += [f"Admissible actions: [{actions}]", INSTRUCTION]
    return "\n".join(parts)


def build_mining_prompt(task, task_type, steps, known, obs_chars, env) -> str:
    """The user message that asks the policy for a skill from an episode it solved.

    steps      [(observation text, action), ...] of the episode; texts are cut to `obs_chars`
    known      conditions of the skills this bucket already has, not to be repeated
    """
    module = world(env)
    lines = [
        f"You solved a task of the kind '{task_type}' in the {module.NAME}. "
        "Extract one reusable skill from it.",
        f"Task: {task}.",
        "What you saw and did:",
    ]
    for n, (text, action) in enumerate(steps, 1):
        seen = module.shown(text, task).split("\n")[0][:obs_chars]
        lines.append(f"{n}. saw: {seen} did: {action}")
    if known:
        conditions = "; ".join(f"when {condition}" for condition in known)
        lines.append(f"Known skills, do not repeat them: {conditions}")
    lines.append(
        "Write a general rule without object numbers, in at most two sentences. "
        f"Answer with JSON only: {json.dumps(SKILL_FORM)}"
    )
    return "\n".join(lines)


# --- Actions --------------------------------------------------------------------------------------

CJK = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]")


def action_span(text: str) -> tuple[int, int] | None:
    """Where the text of the first <action>...</action> begins and ends, or None."""
    start = re.search("<action>", text, re.I)
    stop = start and re.compile("</action>", re.I).search(text, start.end())
    return (start.end(), stop.start()) if stop else None


def parse_action(text: str, fallback_chars: int = 30) -> tuple[str, bool]:
    """A response -> (action in lower case, valid).

    Valid is a matter of format: <action>...</action>, <think> and </think>, no CJK character. A
    well-formed action that the world does not list is valid, and rarely does anything. Without an
    action the last `fallback_chars` characters are sent to the world (a world's FALLBACK_CHARS;
    verl-agent's rules).
    """
    span = action_span(text)
    if span is None:
        return text[-fallback_chars:].lower(), False
    start, stop = span
    valid = "<think>" in text and "</think>" in text and not CJK.search(text)
    return text[start:stop].strip().lower(), valid
