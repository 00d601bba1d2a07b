"""A run: how a phase starts, where it goes on, its folder and its log.

| runs/<name>/     | holds                                                                       |
|------------------|-----------------------------------------------------------------------------|
| metrics.jsonl    | a line for each iteration of each phase                                     |
| episodes.jsonl   | readable transcripts, a few of each iteration                               |
| warmup/ mine/    | a phase's last save: model/ in Hugging Face format, state.pt, config.json   |
| distill/         | with its flags, and skills.jsonl, every skill with its life                 |
| lock             | which process has the run: a second one is refused                          |

The later phases take the flags of the run's first phase as their defaults (runtime/flags.py). A
save knows its phase, its tasks with all that is in them, and the initial policy: where one of them
is another now, the run does not go on.
"""

import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from pickle import UnpicklingError

try:
    import resource
except ImportError:  # Windows
    resource = None

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import set_seed

import envs
from config import PHASES, Config, UserError, has, read_jsonl, remedy_of, write_atomically
from runtime import guard, memory, parallel, saves
from runtime.flags import known_flags, other_value
from runtime.metrics import warnings
from runtime.policy import Policy, digest_policy, load_policy, load_reference, make_optimizer
from skills import group_deltas


class Terminated(BaseException):
    """SIGTERM ends the run. It comes at any line, so it is no error that a line might handle."""


def run_script(main):
    """Run a script's main. A UserError becomes one line and exit code 2, Ctrl-C one and 130,
    SIGTERM one and 143.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal cannot show is escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        print(end="", flush=True)  # else a full disk or a closed pipe is met after the end
        parallel.destroy()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved", file=sys.stderr)
        sys.exit(130)
    except Terminated as end:  # a signal handler must not print: the signal may come in a print
        print(f"SIGTERM: {end}; the same command goes on", file=sys.stderr, flush=True)
        sys.exit(143)
    except (UserError, OSError, SafetensorError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not guard.is_out_of_memory(error):
            raise
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        try:
            print(end="", flush=True)
        except OSError:  # Python would try again, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)


def in_one_line(error) -> str:
    """What went wrong, and what to do where that is known."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if guard.is_out_of_memory(error):
        remedy = "lower --micro_tokens (update) or --generation_rows (rollout); --dry_run explains"
        return f"out of memory ({lines[0]}); {remedy}"
    text = " ".join(lines)
    return text if isinstance(error, UserError) else text + remedy_of(error)


def set_up(config: Config) -> torch.device:
    """Seed everything and join the other processes -> the device. With --dry_run print and end."""
    if config.dry_run:
        if os.environ.get("RANK", "0") == "0":
            print(memory.table(config))
        sys.exit()
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: choose cpu, cuda or cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: this machine has no CUDA device; use --device cpu")
    device = parallel.init(device)
    ranks = parallel.world_size()
    if ranks > config.tasks:
        raise UserError(f"{ranks} processes share --tasks {config.tasks}: start fewer, or raise it")
    if config.offload and ranks > 1:
        raise UserError("--offload is for one GPU; several shard the state")
    set_seed(config.seed)
    return device


def list_items(config: Config, split: str) -> list[str]:
    """Every item of a split; embedded data may have to be made."""
    return parallel.by_one(lambda: envs.list_items(config.env, split, config.data, config.engine))


def load_state(folder, needed=()) -> dict:
    """state.pt of a save: no code runs; the optimizer's part stays in the file until used.
    UserError where it is none, or has not the names that are `needed`.
    """
    path = folder / "state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, KeyError, RuntimeError, UnpicklingError):
        state = None
    if not has(state, needed):
        remedy = f"delete {folder}, and the save before it is used, if there is one"
        raise UserError(f"{path}: damaged or of another version; {remedy}")
    return state


class Run:
    """One phase of a run: its tasks, the save it starts from, what it writes.

        run = Run(config, "mine", after="warmup")
        for k in run.iterations():
            ... run.policy ... run.draw_tasks(k) ... run.seed(k) ...
            run.log(k, metrics, episodes, advantages, line)
            run.end_iteration(k, finished, bank, successes=successes)

    It goes on from where this phase was saved last (`resumed`), else from the end of phase `after`,
    of this run or of --fork, else from the initial policy with the state `first`. `source` is the
    folder it came from. UserError where `after` has not finished.
    """

    def __init__(self, config: Config, phase: str, after=None, **first):
        self.config = config
        self.phase = phase
        self.root = Path("runs") / config.run
        self.folder = self.root / phase
        self.last = getattr(config, f"{phase}_iterations")
        self.device = set_up(config)
        self.items = list_items(config, config.split)
        self.kept = {}  # phase -> the iteration from which this one goes on: the log ends there
        before = None
        if after and not parallel.by_one(self.root.exists):
            before = self.find_before(after)  # a mistyped --run or --fork leaves no folder
        parallel.by_one(lambda: saves.own(self.root))
        self.source = parallel.by_one(lambda: saves.find(self.root, phase, set_aside=True))
        self.resumed = self.source is not None
        if self.resumed:
            self.check_flags()
        elif after:
            self.source = before or self.find_before(after)
            if self.source.parent != self.root:
                self.take_log(self.source.parent)
        needed = ["iteration", "finished", "data", "model", *first]
        self.state = load_state(self.source, needed) if self.source else first
        self.digests = {}  # of what the run is made of, alike in all phases
        data = parallel.by_one(lambda: envs.digest(config.env, self.items))
        self.keep("data", data, f"the tasks in {envs.data_root(config.env, config.data)}")
        if self.resumed:  # a raised flag may give a finished phase more to do
            enough = phase == "warmup" and len(self.state["successes"]) >= config.n_req
            self.state["finished"] &= enough or self.state["iteration"] >= self.last
        else:
            self.state |= {"iteration": 0, "finished": False}
        self.spent = {"episodes": 0, "sampled_tokens": 0}  # by the run so far
        self.kept[phase] = self.state["iteration"]
        self.drop_lines()

        path = self.source / "model" if self.source else config.model
        model, tokenizer = load_policy(path, config, self.device)
        reference = load_reference(config, self.device)  # pi_ref, the same in all phases
        initial = reference or (None if self.source else model)  # None: it was not loaded
        weights = digest_policy(initial) if initial else None
        self.keep("model", weights, f"the weights of --model {config.model}")
        saved = self.state.pop("optimizer", None)
        optimizer = make_optimizer(model, config.lr, offload=config.offload, saved=saved)
        self.policy = Policy(model, tokenizer, reference, optimizer)

        if parallel.rank() == 0:
            where = f"{config.split} in {envs.data_root(config.env, config.data)} ({data[:12]})"
            size = f"{model.num_parameters():,} parameters on {self.device}"
            print(f"{phase}: {len(self.items)} tasks of {where}, {size}")

        self.clock = self.saved_at = time.time()  # of the last line of the log, the last save
        self.save_seconds = None
        self.flat = 0  # iterations in a row that had mostly groups without contrast
        self.boundary = None  # what a save of the last iteration's end holds; None once it is saved
        self.steps = 0  # policy.steps there: while it is equal, no weight has moved
        self.saving = False
        self.terminated = False  # SIGTERM came
        signal.signal(signal.SIGTERM, self.on_sigterm)

    # ---- where it starts

    def find_before(self, after) -> Path:
        """The last save of phase `after`, of this run or of --fork. UserError if unfinished."""
        own = saves.folders(self.root, after)
        root = Path("runs") / self.config.fork if self.config.fork and not own else self.root
        folder = parallel.by_one(lambda: saves.find(root, after))
        command = f"`python {after}.py --run {root.name}`"
        if folder is None:
            raise UserError(f"{root / after}/model is missing: run {command} first")
        state = load_state(folder, ["finished", "iteration"])
        if not state["finished"]:
            raise UserError(f"{folder} is not finished: {command} goes on with it")
        self.kept[after] = state["iteration"]
        return folder

    def take_log(self, fork):
        """Begin the log with what the run `fork` has of the earlier phases."""
        path = fork / "metrics.jsonl"
        if path.exists() and parallel.rank() == 0:
            earlier = PHASES[: PHASES.index(self.phase)]
            lines = [json.dumps(x) for x in read_jsonl(path, ["phase"]) if x["phase"] in earlier]
            write_atomically(self.root / "metrics.jsonl", "".join(line + "\n" for line in lines))

    def keep(self, name, digest, what):
        """Keep a digest in the saves; None is the one of the save that it starts from. UserError
        where that has another.
        """
        known = self.state.pop(name, digest)
        if digest not in (None, known):
            remedy = "bring those back, or begin a new --run"
            raise UserError(f"{what} are not those that {self.source} was made with: {remedy}")
        self.digests[name] = known

    def check_flags(self):
        """UserError where this phase was begun with another value of a flag that is not free."""
        saved = known_flags(self.source / "config.json")
        for f in fields(self.config):
            value = getattr(self.config, f.name)
            if not f.metadata["free"] and saved[f.name] != value:
                raise other_value(self.source, f.name, saved[f.name], value)

    # ---- iterations

    def iterations(self) -> range:
        """The iterations that are left to do."""
        done = self.state["iteration"]
        if self.state["finished"]:
            return range(0)
        if done >= self.last:
            flag = f"--{self.phase}_iterations"
            raise UserError(f"{self.folder} is at iteration {done}, unfinished: raise {flag}")
        return range(done + 1, self.last + 1)

    def draw_tasks(self, k) -> list[str]:
        """The items of iteration k, without repetition; a function of seed, phase and k."""
        rng = random.Random(f"{self.config.seed} {self.phase} {k}")
        return rng.sample(self.items, min(self.config.tasks, len(self.items)))

    def seed(self, k) -> int:
        """Of sampling and shuffling in iteration k."""
        rng = random.Random(f"{self.config.seed} {self.phase} {k} sampling")
        return rng.randrange(2**31)

    # ---- saving

    def end_iteration(self, iteration, finished, bank=None, **state):
        """Save at the end of the phase, every --save_minutes, and when SIGTERM came."""
        state = {name: list(value) for name, value in state.items()}  # copies: the phase goes on
        state |= {"iteration": iteration, "finished": finished}
        self.boundary = {"state": state, "skills": bank.dump() if bank else None}
        self.steps = self.policy.steps  # last: until here an earlier boundary counted
        late = time.time() - self.saved_at >= 60 * self.config.save_minutes
        terminated, late = parallel.all_gather([(self.terminated, late)])[0]
        if finished or terminated or late:
            self.save()
        if terminated or (self.terminated and parallel.world_size() == 1):
            self.end_by_sigterm()

    def on_sigterm(self, *_):
        """In a rollout the weights are those of the last iteration's end: they are saved at once,
        since the machine may go in 30 seconds. In an update, and with several processes, the
        iteration is finished first; killed before that, the run goes on from the save before.
        """
        self.terminated = True
        moved = self.policy.steps != self.steps
        if not (self.saving or moved or parallel.world_size() > 1):
            self.end_by_sigterm()

    def end_by_sigterm(self):
        if self.boundary:
            self.save()
        raise Terminated("saved up to the last finished iteration")

    def save(self):
        """Save the boundary as one folder, swapped in whole: see runtime/saves.py. UserError if a
        weight is not finite or the disk refuses it; the last good save stays.
        """
        start = time.time()
        self.saving = True
        weights = parallel.full_tensors(self.policy.model.state_dict())
        moments = parallel.full_tensors(self.policy.optimizer.state_dict())
        if parallel.rank() == 0:
            require_finite(weights, self.folder)
            part = self.root / f"{self.phase}.part"
            shutil.rmtree(part, ignore_errors=True)
            try:
                self.policy.model.save_pretrained(part / "model", state_dict=weights)
                self.policy.tokenizer.save_pretrained(part / "model")
                state = {"optimizer": moments, **self.digests, **self.boundary["state"]}
                saves.write_tensors(state, part / "state.pt")
                write_atomically(part / "config.json", json.dumps(asdict(self.config), indent=2))
                if self.boundary["skills"] is not None:
                    write_atomically(part / "skills.jsonl", self.boundary["skills"])
                saves.put(part, self.folder)
            except (OSError, RuntimeError, SafetensorError) as error:
                shutil.rmtree(part, ignore_errors=True)
                reason = str(error).strip().split("\n")[0]
                what = f"{self.folder} could not be saved ({reason}); the last save stays"
                raise UserError(what + remedy_of(error)) from None
        self.boundary = None
        self.saving = False
        self.saved_at = time.time()
        self.save_seconds = self.saved_at - start

    # ---- the log

    def log(self, iteration, metrics, episodes, advantages, line):
        """One line of metrics, a few readable episodes of one group, one line on the screen."""
        if parallel.rank() > 0:
            return
        where = {"phase": self.phase, "iteration": iteration}
        record = {**where, "seconds": round(time.time() - self.clock, 2), **metrics}
        self.clock = time.time()
        for name in self.spent:
            self.spent[name] += metrics[name]
            record[f"{name}_so_far"] = self.spent[name]
        record["peak_memory"] = peak_memory()
        if self.save_seconds is not None:
            record["save_seconds"] = round(self.save_seconds, 3)  # of the save before this line
            self.save_seconds = None
        append(self.root / "metrics.jsonl", [record])
        deltas = group_deltas(episodes)
        shown = choose_shown(episodes, iteration)
        transcripts = [where | readable(episodes[i], advantages[i], deltas) for i in shown]
        append(self.root / "episodes.jsonl", transcripts)
        tqdm.write(f"{self.phase} {iteration:>3}  {line}")
        self.flat = self.flat + 1 if metrics["no_contrast"] > 0.5 else 0
        first = iteration == self.state["iteration"] + 1
        if first and iteration < self.last:
            left = self.last - iteration
            minutes = math.ceil(record["seconds"] * left / 60)
            tqdm.write(f"iterations left: {left}, about {minutes} min")
        for warning in warnings(metrics, self.config, self.flat, first):
            tqdm.write(f"note: {warning}")

    def finish(self, **more):
        """The end of a phase as lines `name: value`, to be read and to be searched."""
        if parallel.rank() > 0:
            return
        path = self.root / "metrics.jsonl"
        log = [x for x in read_jsonl(path) if x["phase"] == self.phase] if path.exists() else []
        lines = {"phase": self.phase}
        if log:
            tokens = sum(x["sampled_tokens"] for x in log)
            lost = sum(x["sampled_tokens"] * x.get("taught_nothing", 0) for x in log)
            last = {"success": math.nan, "episodes_so_far": 0} | log[-1]
            lines |= {"iteration": last["iteration"], "success": f"{last['success']:.3f}"}
            lines |= {"episodes_so_far": last["episodes_so_far"]}
            lines |= {"sampled_tokens_so_far": self.spent["sampled_tokens"]}
            lines |= {"taught_nothing": f"{lost / max(1, tokens):.3f}"}
        after = dict(zip(PHASES, (*PHASES[1:], "evaluate"), strict=True))[self.phase]
        lines |= more | {"model": f"{self.folder}/model"}
        lines |= {"next": f"python {after}.py --run {self.config.run}"}
        print("\n".join(f"{name}: {value}" for name, value in lines.items()))

    def drop_lines(self):
        """Drop from the logs what was done after the iterations `kept`, and count the rest. Lines
        that are no whole record (the disk was full, the process was killed) go too.
        """
        if parallel.rank() > 0:
            return
        for name, counts in {"metrics.jsonl": self.spent, "episodes.jsonl": {}}.items():
            path = self.root / name
            lines = path.read_text("utf-8", "replace").split("\n") if path.exists() else []
            kept_lines = []
            damaged = []  # their numbers
            for number, line in enumerate(lines, 1):
                record = read_record(line, counts)
                if record is None:
                    damaged += [number] if line else []
                elif record["iteration"] <= self.kept.get(record["phase"], math.inf):
                    kept_lines.append(line + "\n")
                    for count in counts:
                        counts[count] += record[count]
            if damaged:
                print(f"{path}: lines {damaged} were damaged and are dropped")
            if (done := self.kept[self.phase]) and not kept_lines:
                print(f"{path}: what was logged up to iteration {done} of {self.phase} is lost")
            write_atomically(path, "".join(kept_lines))


def append(path, records):
    """Add records to a log, a JSON object a line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def read_record(line, needed=()) -> dict | None:
    """A line of a log, or None where it is not whole: no phase, or no count `needed`."""
    try:
        record = json.loads(line)
        whole = record["phase"] in PHASES and record["iteration"] > 0
        return record if whole and all(record[name] >= 0 for name in needed) else None
    except (ValueError, KeyError, TypeError):
        return None


def require_finite(weights, folder):
    """UserError if a weight is NaN or infinite: it must not replace a good save."""
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise UserError(f"{name} is not finite: not saved; the last save of {folder} stays")


def peak_memory() -> int:
    """Bytes: of the GPU since the last call, else of this process since its start; 0: unknown."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else 0


def choose_shown(episodes, seed) -> list[int]:
    """The indices of two episodes of one random group: one of each half, where a group has two."""
    rng = random.Random(seed)
    halves = {(e.group, bool(e.skills)) for e in episodes}
    paired = [e.group for e in episodes if {(e.group, True), (e.group, False)} <= halves]
    group = rng.choice(paired or [e.group for e in episodes])
    members = [i for i, e in enumerate(episodes) if e.group == group]
    rng.shuffle(members)
    skill_half = [i for i in members if episodes[i].skills]
    plain_half = [i for i in members if not episodes[i].skills]
    return skill_half[:1] + plain_half[:1] if paired else members[:2]


def readable(episode, advantages, deltas) -> dict:
    """A transcript for episodes.jsonl; tools/report.py shows it."""
    steps = []
    for step, advantage in zip(episode.steps, advantages, strict=True):
        shown = {"saw": step.obs, "said": step.response, "did": step.action}
        shown |= {"reward": step.reward, "advantage": round(float(advantage), 4)}
        steps.append(shown | step.distilled)
    about = {"item": episode.item, "group": episode.group, "task": episode.task}
    about |= {"success": episode.success, "delta": deltas.get(episode.group)}
    skills = [f"when {condition}: {strategy}" for condition, strategy in episode.shown]
    skills = skills or ["(nothing is shown)"] * bool(episode.skills)  # --show nothing
    return about | {"skills": skills, "steps": steps}
