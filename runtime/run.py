"""A run: how a phase starts, where it goes on, its folder and its log.

| runs/<name>/     | holds                                                                       |
|------------------|-----------------------------------------------------------------------------|
| config.json      | the flags of phase 0, which the later phases take as their defaults         |
| metrics.jsonl    | a line for each iteration of each phase                                     |
| episodes.jsonl   | readable transcripts, a few of each iteration                               |
| warmup/ mine/    | a phase's last save: model/ in Hugging Face format, state.pt, config.json,  |
| distill/         | and skills.jsonl, every skill with its life                                 |
"""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from copy import deepcopy
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

import envs
from config import (
    FREE,
    PHASES,
    PRESETS,
    UserError,
    copies_of_flags,
    other_config,
    read_json,
    read_jsonl,
    write_atomically,
)
from runtime import memory, parallel, saves
from runtime.policy import Policy, dtype_of, load_policy, load_reference, make_optimizer
from skills import group_deltas, shown_in_prompt


def set_up(config) -> torch.device:
    """Seed everything, make the embedded games or products where they are meant -> the device."""
    if config.dry_run:
        if os.environ.get("RANK", "0") == "0":
            print(memory.table(config))
        sys.exit()
    dtype_of(config)  # a wrong one ends here, before anything is made
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: choose cpu, cuda or cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this machine has no CUDA device; use --device cpu")
    device = parallel.start(device)
    if parallel.world() > config.tasks:
        raise UserError(
            f"{parallel.world()} processes share --tasks {config.tasks}: start fewer, or raise it"
        )
    if (config.ref_offload or config.optimizer_offload) and parallel.world() > 1:
        raise UserError(
            "--ref_offload and --optimizer_offload are for one GPU; several split the state"
        )
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    if parallel.rank() == 0:
        write_embedded_data(config.data)
    parallel.wait()
    return device


def write_embedded_data(folder):
    """Make the games or the products of the tiny presets, if `folder` is theirs."""
    from tiny import household, shop  # here: real data need neither

    if folder == PRESETS["tiny"]["data"]:
        household.write_games(Path(folder))
    elif Path(folder) in shop.SHOPS:
        shop.write_catalogue(Path(folder), shop.SHOPS[Path(folder)])


def run_script(main):
    """Run a script's main; a UserError becomes one line and exit code 2, Ctrl-C one and 130."""
    try:
        main()
        parallel.stop()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        remedy = "lower --micro_tokens (update) or --generation_rows (rollout); --dry_run explains"
        print(f"error: out of memory ({str(error).splitlines()[0]}); {remedy}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "; free some disk, then the same command goes on" if full else ""
        print(f"error: {error}{remedy}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last save", file=sys.stderr)
        sys.exit(130)


def find_save(root, phase, set_aside=False):
    """`saves.find`, by one process for all: it reads every byte."""
    found = saves.find(root, phase, set_aside) if parallel.rank() == 0 else None
    return parallel.gather([found])[0]


def load_state(folder) -> dict:
    """state.pt of a phase: no code runs; the optimizer's part stays in the file until used."""
    return torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=True)


def list_items(config, split) -> list:
    """Every item of a split of the config's world."""
    return envs.list_items(config.env, split, config.data, **goal_rules(config))


def goal_rules(config) -> dict:
    return {"human_goals": config.human_goals, "split_rule": config.split_rule}


class Run:
    """One phase of a run: its tasks, the save it starts from, what it writes.

    run = Run(config, "mine")
    policy, state = run.start(after="warmup")
    for k in run.iterations(config.mine_iterations):
        ... run.draw_tasks(k) ... run.seed(k) ...
        run.log(k, metrics, episodes, advantages, line)
        run.save_when_due(policy, k, finished, bank, successes=successes)
    """

    def __init__(self, config, phase):
        self.config = config
        self.phase = phase
        self.root = Path("runs") / config.run
        self.folder = self.root / phase
        self.device = set_up(config)
        self.items = list_items(config, config.split)
        self.clock = time.time()  # of the last line of the log
        self.spent = {"episodes": 0, "sampled_tokens": 0}  # by the run so far
        self.stop = False  # SIGTERM came
        self.saving = False
        self.boundary = None  # the state after the last iteration, see `stop_soon`
        self.saved_at = time.time()
        self.saved_iteration = 0
        self.save_seconds = None

    def start(self, after=None, **first) -> tuple:
        """(policy, state): where this phase was saved last, else at the end of phase `after`, or
        with the initial policy and the state `first`. `self.source` is the folder it came from.

        UserError unless `after` has finished.
        """
        before = self.find_before(after) if after else None
        if parallel.rank() == 0:
            self.begin()
        parallel.wait()
        state = self.resume()
        self.resumed = state is not None
        if state:
            self.source = self.resumed_from
        elif before:
            self.source = before
            state = load_state(self.source) | {"iteration": 0, "finished": False}
        else:
            self.source = None
            state = first | {"iteration": 0, "finished": False}
        self.state = state
        path = self.source / "model" if self.source else self.config.model
        model, tokenizer = load_policy(path, self.config, self.device)
        reference = load_reference(self.config, self.device)  # pi_ref, the same in all phases
        optimizer = make_optimizer(model, self.config, state.pop("optimizer", None))
        self.policy = Policy(model, tokenizer, reference, optimizer)
        signal.signal(signal.SIGTERM, self.stop_soon)
        return self.policy, state

    def find_before(self, after) -> Path:
        """The last whole save of phase `after`, of this run or of --fork. UserError unless that
        phase has finished.
        """
        root = self.root
        if self.config.fork and not list(root.glob(f"{after}*")):
            root = Path("runs") / self.config.fork
        folder = find_save(root, after)
        command = f"`python {after}.py --run {root.name}`"
        if folder is None:
            raise UserError(f"{root / after}/model is missing: run {command} first")
        if not load_state(folder)["finished"]:
            raise UserError(f"{folder} is not finished: {command} goes on with it")
        return folder

    def begin(self):
        """Write the run's config.json where this is its first phase; a fork takes over what the
        phases before have logged.
        """
        path = self.root / "config.json"
        copies = copies_of_flags(self.root)
        if not copies:
            write_atomically(path, json.dumps(asdict(self.config), indent=2))
        elif not path.exists():
            shutil.copy(copies[0], path)
        theirs = Path("runs") / self.config.fork / "metrics.jsonl"
        ours = self.root / "metrics.jsonl"
        if self.config.fork and theirs.exists() and not ours.exists():
            earlier = PHASES[: PHASES.index(self.phase)]
            lines = [x for x in read_jsonl(theirs) if x["phase"] in earlier]
            write_atomically(ours, "".join(json.dumps(x) + "\n" for x in lines))

    def iterations(self, last) -> range:
        """The iterations that are left to do, up to `last`."""
        done = self.state["iteration"]
        if self.state["finished"]:
            return range(0)
        if done >= last:
            flag = f"--{self.phase}_iterations"
            raise UserError(f"{self.folder} is at iteration {done}, unfinished: raise {flag}")
        return range(done + 1, last + 1)

    def draw_tasks(self, k) -> list:
        """The items of iteration k, without repetition; a function of seed, phase and k."""
        rng = random.Random(f"{self.config.seed} {self.phase} {k}")
        return rng.sample(self.items, min(self.config.tasks, len(self.items)))

    def seed(self, k) -> int:
        """Of sampling and shuffling in iteration k."""
        rng = random.Random(f"{self.config.seed} {self.phase} {k} sampling")
        return rng.randrange(2**31)

    def save_when_due(self, policy, iteration, finished, bank=None, **state):
        """Called at the end of every iteration: save when it is the turn, or SIGTERM came."""
        minutes = (time.time() - self.saved_at) / 60
        stop, late = parallel.gather([(self.stop, minutes >= self.config.save_minutes)])[0]
        if finished or stop or late or iteration % self.config.save_every == 0:
            self.save(policy, bank, iteration=iteration, finished=finished, **state)
        if stop:
            end_by_sigterm(f"saved after iteration {iteration}")
        # what a SIGTERM in the next rollout has to save
        copies = {name: list(value) for name, value in state.items()}
        self.boundary = {"iteration": iteration, "finished": finished} | copies
        self.boundary_bank = deepcopy(bank)
        policy.moved = False  # only now: until here the boundary was the one before
        if self.stop and not finished:  # it came since the question above
            self.stop_soon()

    def stop_soon(self, *_):
        """SIGTERM: someone takes the machine away, often in 30 seconds. In a rollout the weights
        are those of the last iteration's end: they are saved at once. In an update the iteration is
        finished first; killed before that, the run goes on from the save before.
        """
        self.stop = True
        if self.saving or self.policy.moved or parallel.world() > 1:
            return
        if self.boundary and self.boundary["iteration"] > self.saved_iteration:
            self.save(self.policy, self.boundary_bank, **self.boundary)
        end_by_sigterm("what was done is saved" if self.boundary else "no iteration was finished")

    def save(self, policy, bank=None, **state):
        """Save the phase as one folder, swapped in whole: see runtime/saves.py.

        UserError if a weight is not finite or the disk is full; the last good save stays.
        """
        start = time.time()
        self.saving = True
        weights = parallel.join(policy.model.state_dict())
        moments = parallel.join(policy.optimizer.state_dict())
        if parallel.rank() == 0:
            require_finite(weights, self.folder)
            part = self.root / f"{self.phase}.part"
            shutil.rmtree(part, ignore_errors=True)
            try:
                policy.model.save_pretrained(part / "model", state_dict=weights)
                policy.tokenizer.save_pretrained(part / "model")
                torch.save({"optimizer": moments, **state}, part / "state.pt")
                write_atomically(part / "config.json", json.dumps(asdict(self.config), indent=2))
                if bank:
                    bank.save(part / "skills.jsonl")
                saves.put(part, self.folder)
            except (OSError, RuntimeError, SafetensorError) as error:
                shutil.rmtree(part, ignore_errors=True)
                raise cannot_save(self.folder, error) from None
        self.saving = False
        self.saved_at = time.time()
        self.saved_iteration = state["iteration"]
        self.save_seconds = self.saved_at - start

    def resume(self):
        """The saved state of this phase, or None. Drops what was logged after that save.

        UserError if the phase was begun with another config.
        """
        folder = find_save(self.root, self.phase, set_aside=True)
        state = None
        if folder:
            saved = read_json(folder / "config.json")
            for name, value in asdict(self.config).items():
                if name not in FREE and name in saved and saved[name] != value:
                    raise other_config(folder, name, saved[name], value)
            state = load_state(folder)
            state["finished"] &= not self.is_extended(state)
            self.saved_iteration = state["iteration"]
        self.resumed_from = folder
        if parallel.rank() > 0:
            return state
        self.drop_lines_after(state["iteration"] if state else 0)
        return state

    def is_extended(self, state) -> bool:
        """Whether a raised flag gives a finished phase more to do."""
        more = state["iteration"] < getattr(self.config, f"{self.phase}_iterations")
        if self.phase == "warmup":
            more = more and len(state["successes"]) < self.config.n_req
        return more

    def drop_lines_after(self, kept):
        """Take out of the logs what this phase did after iteration `kept`, and count the rest.

        Lines that are no whole record (the disk was full, the process was killed) go too.
        """
        for path in (self.root / "metrics.jsonl", self.root / "episodes.jsonl"):
            text = path.read_text(errors="replace") if path.exists() else ""
            kept_lines = []
            damaged = []  # numbers of lines
            for number, line in enumerate(text.split("\n"), 1):
                needed = self.spent if path.name == "metrics.jsonl" else ()
                record = read_record(line, needed)
                if record is None:
                    damaged += [number] if line else []
                elif record["phase"] != self.phase or record["iteration"] <= kept:
                    kept_lines.append(line)
                    if path.name == "metrics.jsonl":
                        for name in self.spent:
                            self.spent[name] += record[name]
            if damaged:
                print(f"{path}: lines {damaged} were damaged and are dropped")
            if not kept_lines and kept and (path.name == "metrics.jsonl" or self.config.samples):
                print(f"{path}: what was logged up to iteration {kept} of {self.phase} is lost")
            write_atomically(path, "".join(line + "\n" for line in kept_lines))

    def log(self, iteration, metrics, episodes, advantages, line):
        """One line of metrics, a few readable episodes of one group, one line on the screen."""
        if parallel.rank() > 0:
            return
        now = time.time()
        where = {"phase": self.phase, "iteration": iteration}
        record = {**where, "seconds": round(now - self.clock, 2), **metrics}
        for name in self.spent:
            self.spent[name] += metrics[name]
            record[f"{name}_so_far"] = self.spent[name]
        record["peak_memory"] = peak_memory()
        if self.save_seconds is not None:
            record["save_seconds"] = round(self.save_seconds, 3)  # of the save before this line
            self.save_seconds = None
        self.clock = now
        with open(self.root / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        deltas = group_deltas(episodes)
        with open(self.root / "episodes.jsonl", "a") as file:
            for i in choose_shown(episodes, self.config.samples, iteration):
                transcript = readable(episodes[i], advantages[i], deltas, self.config)
                file.write(json.dumps(where | transcript) + "\n")
        tqdm.write(f"{self.phase} {iteration:>3}  {line}")


def require_finite(weights, folder):
    """UserError if a weight is NaN or infinite: it must not replace a good save."""
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise UserError(f"{name} is not finite: not saved; the last save of {folder} stays")


def cannot_save(folder, error) -> UserError:
    """What kept a save from being written: nearly always a full disk."""
    reason = str(error).strip().split("\n")[0]
    free = shutil.disk_usage(folder.parent).free / 1e9
    return UserError(
        f"{folder} could not be saved ({reason}; {free:.2f} GB free); the last save stays. "
        "Free some disk, then the same command goes on"
    )


def end_by_sigterm(what):
    print(f"SIGTERM: {what}; the same command goes on", file=sys.stderr, flush=True)
    sys.exit(143)


def peak_memory() -> int:
    """Bytes: of the GPU since the last call, else of this process since its start."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def read_record(line, needed=()):
    """A line of a log as a dict, or None where it is not whole: no phase, or no count `needed`."""
    try:
        record = json.loads(line)
        whole = record["phase"] in PHASES and record["iteration"] > 0
        return record if whole and all(record[name] >= 0 for name in needed) else None
    except (ValueError, KeyError, TypeError):
        return None


def choose_shown(episodes, count, seed) -> list:
    """The indices of `count` episodes of one random group, in turns from its two arms."""
    rng = random.Random(seed)
    group = rng.choice(episodes).group
    members = [i for i, e in enumerate(episodes) if e.group == group]
    rng.shuffle(members)
    skilled = [i for i in members if episodes[i].skills]
    plain = [i for i in members if not episodes[i].skills]
    turns = [i for pair in zip_longest(skilled, plain) for i in pair if i is not None]
    return turns[:count]


def readable(episode, advantages, deltas, config) -> dict:
    """A transcript for episodes.jsonl; tools/report.py shows it."""
    steps = []
    for step, advantage in zip(episode.steps, advantages, strict=True):
        shown = {"saw": step.obs, "said": step.response, "did": step.action}
        steps.append(shown | {"reward": step.reward, "advantage": round(float(advantage), 4)})
    return {
        "item": episode.item,
        "group": episode.group,
        "task": episode.task,
        "success": episode.success,
        "delta": deltas.get(episode.group),
        "skills": ["when {}: {}".format(*shown_in_prompt(s, config)) for s in episode.skills],
        "steps": steps,
    }
