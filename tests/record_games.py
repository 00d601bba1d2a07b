"""Record games as the stock engine plays them: tests/data/household_games.json.gz.

    python -m tests.record_games

Needs the stock engine. `tests/test_alfworld.py` replays the recording on ours, which needs nothing.
Two games of each task type, furnished with what generated games lack, are played with the solution
mixed with random, malformed and inadmissible actions, and on beyond the end.
"""

import gzip
import json
import random
import re
import tempfile
from collections import defaultdict
from pathlib import Path

from tests.certify_alfworld import MALFORMED
from worlds import alfworld, household

FILE = Path(__file__).parent / "data" / "household_games.json.gz"
STEPS = 100  # of each game
DULL = ("look", "inventory")  # verbs, drawn less often
# things beyond those of generated games: id -> what holds for it
EXTRAS = {
    "Knife_bar_1": "pickupable cleanable",
    "ButterKnife_bar_1": "pickupable",
    "Bread_bar_1": "pickupable sliceable heatable coolable",
    "Bread_bar_2": "pickupable sliceable isSliced",
    "Tomato_bar_1": "pickupable sliceable cleanable heatable coolable isHot isClean isSliced",
    "Tomato_bar_2": "pickupable sliceable cleanable heatable coolable isCool",
    "Bowl_bar_1": "pickupable cleanable isReceptacleObject isClean",
    "Bowl_bar_2": "pickupable isReceptacleObject",
    "Candle_bar_1": "pickupable toggleable isToggled",
    "Candle_bar_2": "pickupable toggleable",
    "statue": "pickupable",  # an id without _bar_
    "Safe_bar_1": "",
}


def furnish(data: dict, rng: random.Random) -> dict:
    """A generated game with the EXTRAS, two receptacles at one spot, and one open at the start.

    A thing of the goal's kind that cannot be treated lies hot, cool and clean where it must go.
    """
    head, init, goal = re.split(r"\(:init|\(:goal", data["pddl_problem"])
    spots = dict(re.findall(r"\(receptacleAtLocation (\S+) (\S+)\)", init))
    types = dict(re.findall(r"\(receptacleType (\S+) (\S+)\)", init))
    receptacles = sorted(spots)
    one, two = rng.sample(receptacles, 2)
    init = init.replace(spots[two], spots[one])
    spots[two] = spots[one]
    openable = sorted(re.findall(r"\(openable (\S+)\)", init))
    facts = [f"(opened {r})" for r in openable[:1]]
    declared = head[: head.rindex(")")].split("\n")
    target = re.findall(r"objectType \?\w+ (\w+)\)", goal)[-1]
    place = re.findall(r"receptacleType \?\w+ (\w+)\)", goal)
    extras = {o: traits for o, traits in EXTRAS.items() if not target.startswith(o.split("_")[0])}
    if place:
        extras[f"{target}_bar_0"] = "isHot isCool isClean"
    for o, traits in extras.items():
        own = o == f"{target}_bar_0" and re.search("isHot|isCool|isClean", goal)
        there = [r for r in receptacles if types[r] in place] if own else receptacles[2:]
        r = rng.choice(there)
        kind = target if o == f"{target}_bar_0" else f"{o.split('_')[0]}Type"
        facts += [f"(objectType {o} {kind})", f"(inReceptacle {o} {r})"]
        facts += [f"(objectAtLocation {o} {spots[r]})"] * (o != "Candle_bar_2")
        facts += [f"({trait} {o})" for trait in traits.split()]
        declared += [f"{o} - object", f"{kind} - otype"]
        few = rng.sample(sorted(set(types.values())), 4)
        facts += [f"(canContain {rtype} {kind})" for rtype in few]
    facts.append(f"(objectAtLocation Safe_bar_1 {spots[one]})")  # in two places
    if "Bowl_bar_1" in extras:
        facts += [f"(inReceptacleObject {o} Bowl_bar_1)" for o in ("statue", "Safe_bar_1")]
    init = init[: init.rindex(")")] + "\n".join(dict.fromkeys(facts)) + "\n)\n"
    head = "\n".join(dict.fromkeys(line.strip() for line in declared)) + "\n)\n"
    return data | {"pddl_problem": f"{head}(:init{init}(:goal{goal}"}


def draw_action(obs, rng) -> str:
    """A random action of a random verb, so that rare ones come often; sometimes one that fails."""
    by_verb = defaultdict(list)
    for action in obs.admissible:
        by_verb[action.split()[0]].append(action)
    verb = rng.choice([verb for verb in by_verb for _ in range(1 if verb in DULL else 4)])
    near = [a for a in by_verb[verb] if re.search("go to (sink|micro|frid)|with|candle", a)]
    near = near if rng.random() < 0.7 else []
    return rng.choice(MALFORMED if rng.random() < 0.05 else near or by_verb[verb])


def play(game, walkthrough, rng, length) -> list:
    """[action or None for the start, observation, admissible actions, reward, done] of each step:
    the solution and what may be seen on the way, then random actions.
    """
    obs = game.reset()
    steps = [[None, obs.text, obs.admissible, 0.0, False]]
    plan = []
    for action in walkthrough:
        plan += rng.choices(["look", "inventory", "help", "examine"], k=1) + [action]
    while len(steps) <= length:
        action = plan.pop(0) if plan else draw_action(obs, rng)
        if action == "examine":
            examined = [a for a in obs.admissible if a.startswith("examine")]
            action = rng.choice(examined or MALFORMED)
        obs, reward, done, _ = game.step(action)
        steps.append([action, obs.text, obs.admissible, reward, done])
        treated = re.match("(take|heat|cool|clean) (.*) (from|with) ", action)
        if treated and not plan and rng.random() < 0.6:
            plan = [f"examine {treated[2]}"]
    return steps


def record(number: int, length: int = STEPS) -> dict:
    """One of the games, played on the stock engine -> its path, file, task and steps."""
    rng = random.Random(number)
    types = list(household.ROOMS_OF)
    while True:  # until its furniture leaves it to be solved
        name, data, _ = household.make_game(types[number % 6], rng, number)
        data = furnish(data, rng)
        path = f"{name}/game.tw-pddl"
        try:
            data["walkthrough"] = household.solve(alfworld.parse_game(data, path))
            break
        except (alfworld.UserError, AssertionError, KeyError):
            continue
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(data))
        game = alfworld.open_item(str(file), "textworld")
        steps = play(game, data["walkthrough"], rng, length)
    return {"path": path, "file": data, "task": game.task, "steps": steps}


def main():
    games = [record(number) for number in range(12)]
    FILE.write_bytes(gzip.compress(json.dumps(games).encode(), mtime=0))
    won = sum(any(done for *_, done in game["steps"]) for game in games)
    print(f"{len(games)} games, {won} won, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
