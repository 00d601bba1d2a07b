"""The embedded household: small games in ALFWorld's format, which stock ALFWorld plays too.

They have the domain and grammar of the `alfworld` package, and are written into `runs/tiny-games`,
in seconds, where they are missing.
"""

import json
import random
from pathlib import Path

from config import UserError, is_whole, read_text, write_atomically
from worlds import alfworld

try:
    from alfworld.gen import constants
    from alfworld.gen.goal_library import gdict
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
except ImportError:
    raise UserError("alfworld is missing: pip install --no-deps alfworld==0.4.2") from None

SPLITS = {"train": 900, "valid_seen": 480}  # games of each split, one task type after the other

FIXED = {"kitchen": "Fridge Microwave SinkBasin", "bathroom": "SinkBasin"}  # it always has them
ROOMS = {  # kind of room: receptacles to draw from
    "kitchen": "CounterTop CounterTop Cabinet Cabinet Drawer Shelf DiningTable GarbageCan "
    "SideTable",
    "livingroom": "Sofa ArmChair CoffeeTable SideTable Shelf Shelf Drawer Cabinet DiningTable "
    "GarbageCan Dresser",
    "bedroom": "Bed Desk Desk Drawer Drawer Dresser Shelf SideTable GarbageCan ArmChair",
    "bathroom": "CounterTop Cabinet Cabinet Drawer Toilet GarbageCan Shelf SideTable",
}
ROOMS_OF = {  # task type: where it can be played
    "pick_and_place_simple": ["kitchen", "livingroom", "bedroom", "bathroom"],
    "look_at_obj_in_light": ["livingroom", "bedroom"],
    "pick_clean_then_place_in_recep": ["kitchen"],
    "pick_heat_then_place_in_recep": ["kitchen"],
    "pick_cool_then_place_in_recep": ["kitchen"],
    "pick_two_obj_and_place": ["kitchen", "livingroom", "bedroom"],
}
OBJECTS = set(  # a small vocabulary for a small policy
    "Apple Bread Cup Egg Lettuce Mug Plate Potato Tomato Bowl Pan Pot Knife Fork Spoon Book CD "
    "CellPhone CreditCard KeyChain Laptop Newspaper Pen Pencil Pillow RemoteControl Watch Vase "
    "Cloth SoapBar SoapBottle SprayBottle ToiletPaper HandTowel Candle".split()
)
HOLDS = {  # receptacle: the objects that may lie in it
    r: sorted(OBJECTS & objects) for r, objects in constants.VAL_RECEPTACLE_OBJECTS.items()
}
NEEDS = {  # task type: the trait its object must have
    "pick_clean_then_place_in_recep": "Cleanable",
    "pick_heat_then_place_in_recep": "Heatable",
    "pick_cool_then_place_in_recep": "Coolable",
}
TRAITS = ("Cleanable", "Heatable", "Coolable", "Sliceable")  # that the games declare


def possible_tasks(task_type, receptacles) -> list:
    """(object, receptacle where it must go), of objects that can also lie elsewhere in the room."""
    fits = constants.VAL_ACTION_OBJECTS.get(NEEDS.get(task_type), OBJECTS)
    return [
        (target, goal)
        for goal in receptacles
        for target in HOLDS[goal]
        if target in fits and any(target in HOLDS[r] for r in receptacles if r != goal)
    ]


def draw_room(task_type, rng) -> tuple:
    """6 to 9 receptacles, zero to three objects in each, and a task that can be solved.

    -> (kind of room, its receptacles, the object of the task, the receptacle where it must go, the
    lamp to look at it or "", [(object, number of its receptacle), ...]), everything by its type
    """
    kind = rng.choice(ROOMS_OF[task_type])
    always, optional = FIXED.get(kind, "").split(), ROOMS[kind].split()
    more = rng.randint(6, 9) - len(always)
    receptacles = always + rng.sample(optional, min(len(optional), more))
    with_lamp = task_type == "look_at_obj_in_light"
    lamp = rng.choice(["DeskLamp", "FloorLamp"]) if with_lamp else ""
    target, goal = rng.choice(possible_tasks(task_type, sorted(set(receptacles))))
    elsewhere = [i for i, r in enumerate(receptacles) if r != goal and target in HOLDS[r]]
    copies = 2 if task_type == "pick_two_obj_and_place" else 1
    placed = [(target, rng.choice(elsewhere)) for _ in range(copies)]
    if lamp:
        placed.append((lamp, rng.randrange(len(receptacles))))
    for i, r in enumerate(receptacles):
        others = [o for o in HOLDS[r] if o != target]
        count = rng.randint(0, 3)
        if others:
            placed += [(rng.choice(others), i) for _ in range(count)]
    return kind, receptacles, target, goal, lamp, placed


def identify(kind, rng) -> str:
    """An ALFRED-style id, `Mug|+01.23|-00.45|+02.10` as PDDL writes it."""
    signs = rng.choices(["plus", "minus"], k=3)
    where = ""
    for sign in signs:
        where += f"_bar__{sign}_{rng.randint(0, 3):02d}_dot_{rng.randint(0, 99):02d}"
    return kind.removesuffix("Basin") + where + (f"_bar_{kind}" if kind.endswith("Basin") else "")


def write_problem(receptacles, target, lamp, placed, rng, number) -> str:
    """The room as a PDDL problem, up to its goal."""
    r_ids = [identify(r, rng) for r in receptacles]
    o_ids = [identify(o, rng) for o, _ in placed]
    spots = [
        f"loc_bar_{i}_bar_{rng.randint(1, 9)}_bar_{rng.randint(0, 3)}_bar_60"
        for i in range(len(r_ids))
    ]
    start = "loc_bar_0_bar_0_bar_0_bar_30"
    r_kinds = sorted(set(receptacles))
    o_kinds = sorted({target, *(o for o, _ in placed)})

    facts = [f"(atLocation agent1 {start})"]
    for r, r_id, spot in zip(receptacles, r_ids, spots, strict=True):
        facts.append(f"(receptacleType {r_id} {r}Type)")
        facts.append(f"(receptacleAtLocation {r_id} {spot})")
        if r in constants.OPENABLE_CLASS_LIST:
            facts.append(f"(openable {r_id})")
    for (o, i), o_id in zip(placed, o_ids, strict=True):
        facts.append(f"(objectType {o_id} {o}Type)")
        facts.append(f"(inReceptacle {o_id} {r_ids[i]})")
        facts.append(f"(objectAtLocation {o_id} {spots[i]})")
        facts.append(f"(toggleable {o_id})" if o == lamp else f"(pickupable {o_id})")
        traits = [t for t in TRAITS if o in constants.VAL_ACTION_OBJECTS[t]]
        facts += [f"({trait.lower()} {o_id})" for trait in traits]
    for r in r_kinds:
        facts += [f"(canContain {r}Type {o}Type)" for o in o_kinds if o in HOLDS[r]]

    objects = {
        "agent": ["agent1"],
        "location": [start, *spots],
        "receptacle": r_ids,
        "object": o_ids,
        "rtype": [f"{r}Type" for r in sorted({*r_kinds, "SinkBasin", "Microwave", "Fridge"})],
        "otype": [f"{o}Type" for o in sorted({*o_kinds, "Knife", "ButterKnife"})],
    }
    lines = [f"(define (problem tiny_{number})", "(:domain alfred)", "(:objects"]
    for kind, names in objects.items():
        lines += [f"    {name} - {kind}" for name in names]
    lines += [")", "(:init", *(f"    {fact}" for fact in facts), ")"]
    return "\n".join(lines)


def make_game(task_type: str, rng: random.Random, number: int) -> tuple:
    """One random solvable game -> (its folder under a split, game.tw-pddl, traj_data.json)."""
    kind, receptacles, target, goal, lamp, placed = draw_room(task_type, rng)
    problem = write_problem(receptacles, target, lamp, placed, rng, number)
    names = {"obj": target, "recep": goal, "toggle": lamp}
    wish = gdict[task_type]["pddl"].format(**names).replace("#", "-")
    spoken = {name: word.lower() for name, word in names.items()}
    task = rng.choice(gdict[task_type]["templates"]).format(**spoken)
    end = lamp or goal
    folder = f"{task_type}-{target}-None-{end}-{number}/trial_T{number:08d}"
    data = {
        "pddl_domain": read_text(ALFRED_PDDL_PATH),
        "grammar": read_text(ALFRED_TWL2_PATH).replace("UNKNOWN GOAL", task),
        "pddl_problem": f"{problem}\n{wish}",
        "solvable": True,
    }
    data["walkthrough"] = solve(alfworld.parse_game(data, f"{folder}/game.tw-pddl"))
    trajectory = {
        "task_type": task_type,
        "task_id": folder,
        "scene": {"floor_plan": kind},
        "pddl_params": {
            "object_target": target,
            "parent_target": "" if lamp else goal,
            "toggle_target": lamp,
            "mrecep_target": "",
            "object_sliced": False,
        },
        "turk_annotations": {"anns": [{"task_desc": task}]},
    }
    return folder, data, trajectory


def solve(game: alfworld.Game) -> list:
    """The natural solution, by someone who sees into every receptacle; proved by playing it."""
    env = alfworld.AlfWorld(game)
    obs = env.reset()
    kind = game.goal[0]
    name = game.name
    plan = []

    def do(*actions):
        nonlocal obs
        for action in actions:
            if action in obs.admissible:  # else it stands there already, or that is open
                plan.append(action)
                obs = env.step(action)[0]

    place_of = {o: r for r, objects in game.inside.items() for o in objects}
    wanted = sorted(o for o in game.targets if place_of[o] not in game.places)
    for o in wanted[: 2 if kind == "pick2" else 1]:
        source = name[place_of[o]]
        do(f"go to {source}", f"open {source}", f"take {name[o]} from {source}")
        if kind == "look":
            lamp = min(game.places)
            spot = name[place_of[lamp]]
            do(f"go to {spot}", f"open {spot}", f"use {name[lamp]}")
            break
        if kind in game.appliances:
            appliance = name[min(r for r in game.rtype if game.rtype[r] & game.appliances[kind])]
            do(f"go to {appliance}", f"{kind} {name[o]} with {appliance}")
        goal = name[min(game.places)]
        do(f"go to {goal}", f"open {goal}", f"move {name[o]} to {goal}")
    assert env.won, f"{game.path}: the walkthrough does not win"
    return plan


def make(root: Path, splits=SPLITS, seed: int = 0) -> Path:
    """Write the splits, {name: number of games}, that are not whole; `seed` decides all."""
    for split, count in splits.items():
        folder = root / "json_2.1.1" / split
        if sum(map(is_whole, folder.glob("*/*/game.tw-pddl"))) >= count:
            continue
        rng = random.Random(f"{seed} {split}")
        types = list(ROOMS_OF)
        for i in range(count):
            number = i + 100_000 * list(SPLITS).index(split)
            name, data, trajectory = make_game(types[i % len(types)], rng, number)
            (folder / name).mkdir(parents=True, exist_ok=True)
            write_atomically(folder / name / "traj_data.json", json.dumps(trajectory))
            write_atomically(folder / name / "game.tw-pddl", json.dumps(data))
    return root
