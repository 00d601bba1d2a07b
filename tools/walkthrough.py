"""docs/walkthrough.md: one skill on its way through the three phases, with the numbers of a run.

    python -m tools.walkthrough            # runs/walkthrough/ anew, then the page: a minute or two
    python -m tools.walkthrough --links    # no run: the page's links find their lines again

The scripts run as they are, in the embedded shop. What the functions of KEPT were given and what
they returned is kept on the side, so that the page shows what the run computed. Its text is
tools/walkthrough.md, with a {hole} for each number. A link names how its line of code begins.
"""

import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import replace
from difflib import ndiff
from pathlib import Path
from shutil import rmtree
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch

import common
import distill
import evaluate
import mine
import warmup
from config import PHASES, UserError, read_json, read_text, write_atomically
from runtime.metrics import success_rate
from runtime.run import run_script
from skills import Skill, SkillBank, parse_skill
from tools.study import piped

ROOT = Path(__file__).resolve().parent.parent
PAGE = "docs/walkthrough.md"
FLAGS = (  # an iteration of each phase, with a few tasks, short mini-batches and a KL to show
    "--run walkthrough --data runs/tiny-shop-2 --seed 5 --tasks 4 --minibatch_rows 16",
    "--kl_coef 0.003 --n_req 1 --n_eval 1",
    "--warmup_iterations 1 --mine_iterations 1 --distill_iterations 1",
)
ITEMS = 40  # of an evaluation
KEPT = "rollout update mine choose write_summaries group_deltas internalization_rows".split()
LINK = re.compile(r'\[[\w/.:]*\]\((?:\.\./)?([\w/]+\.py)(?:#L\d+)? "([^"]+)"\)')


# --- The run --------------------------------------------------------------------------------------


def call(script, flags) -> dict[str, list]:
    """Run a script -> function -> (arguments, result) of each of its calls."""
    calls = defaultdict(list)

    def keep(owner, name):
        function = getattr(owner, name)

        def kept(*args, **options):
            result = function(*args, **options)
            calls[name].append((args, result))
            return result

        return patch.object(owner, name, kept)

    with ExitStack() as stack:
        for name in KEPT:
            if hasattr(script, name):
                stack.enter_context(keep(script, name))
        stack.enter_context(keep(common, "objective"))
        stack.enter_context(patch.object(sys, "argv", [f"{script.__name__}.py", *flags.split()]))
        script.main()
    return calls


def run() -> list:
    """The calls of the three phases, and how often the plain prompt succeeds after each."""
    rmtree("runs/walkthrough", ignore_errors=True)
    calls = [call(warmup, " ".join(FLAGS))]
    calls += [call(script, "--run walkthrough") for script in (mine, distill)]
    results = {}
    for phase in PHASES:
        out = f"runs/walkthrough/{phase}.json"
        how = f"--run walkthrough --checkpoint {phase} --eval_items {ITEMS} --out {out}"
        call(evaluate, how)
        results[phase] = read_json(out)["results"]["all"]
    return [*calls, results]


def groups_with(calls, shown) -> list[SimpleNamespace]:
    """The groups whose skill half had this skill."""
    (_, episodes), (_, deltas) = calls["rollout"][0], calls["group_deltas"][0]
    found = []
    for name, delta in deltas.items():
        group = SimpleNamespace(delta=delta, episodes=[e for e in episodes if e.group == name])
        if group.episodes[0].shown == [shown]:
            group.skill = success_rate([e for e in group.episodes if e.skills])
            group.plain = success_rate([e for e in group.episodes if not e.skills])
            found.append(group)
    return found


def follow(mined, distilled) -> dict:
    """Of the skills that were written and became active the one that helped most in phase 2.

    UserError where no skill came so far: FLAGS need another seed.
    """
    ((asked, *_), answers), (_, chosen) = mined["write_summaries"][0], mined["choose"][0]
    bank = SkillBank(mined["update"][0][0][2])
    found = []
    for source, request, answer in zip(chosen, asked, answers, strict=True):
        shown = parse_skill(answer) or ("", "")
        skill = Skill(*shown, source["task_type"])
        helped = max(groups_with(distilled, shown), key=lambda group: group.delta, default=None)
        for tested in groups_with(mined, shown):
            before = replace(skill)
            bank.update(skill, tested.delta)
            if before.status == "candidate" and skill.status == "active" and helped:
                story = {"source": source, "request": request, "answer": answer, "before": before}
                found.append(story | {"after": skill, "tested": tested, "helped": helped})
    best = max(found, key=lambda story: story["helped"].delta, default=None)
    if best is None or best["helped"].delta <= 0:
        raise UserError("no skill was written, proved and distilled: give FLAGS another --seed")
    return best


def trained(calls, prompt_ids, response_ids, **value):
    """A row, and its equals, as `objective` got them: a line of the batch, log-probs, entropies.

    value   advantages=A of an RL row, weights=w of an internalization row
    """
    ids = torch.tensor(prompt_ids + response_ids)
    ((name, wanted),) = value.items()
    for (batch, *tensors, _, _, _, _), _ in calls["objective"]:
        for i, row in enumerate(batch["ids"]):
            if torch.equal(row[: len(ids)], ids) and abs(batch[name][i] - wanted) < 1e-5:
                one = {key: tensor[i : i + 1] for key, tensor in batch.items()}
                yield one, *(tensor[i : i + 1].detach() for tensor in tensors)


# --- What the text has holes for ------------------------------------------------------------------


def code(text) -> str:
    """Text as it is, also in a table."""
    return "`" + text.replace("|", "\\|") + "`"


def table(head, lines) -> str:
    return piped([[str(cell) for cell in cells] for cells in (head, ["---"] * len(head), *lines)])


def played(group) -> str:
    """A line for each episode of a group."""
    lines = []
    for i, e in enumerate(group, 1):
        did = ", ".join(code(step.action) for step in e.steps)
        reward = sum(step.reward for step in e.steps)
        half, solved = "skill" if e.skills else "plain", "yes" if e.success else "no"
        lines.append((i, half, did, len(e.steps), f"{reward:g}", solved))
    return table(("episode i", "half", "actions", "T_i", "reward", "solved"), lines)


def credit(group, config) -> list[SimpleNamespace]:
    """Every row of a group with the parts of its advantage (Eq. 1 to 4)."""
    A = common.episode_advantages(group, config)
    A_E = common.episode_advantages(group, replace(config, step_weight=0.0))
    with patch.object(common, "relative", wraps=common.relative) as relative:
        # as if all steps were taken from one state, so that every return G is compared
        alike = [replace(e, steps=[replace(step, obs="") for step in e.steps]) for e in group]
        common.episode_advantages(alike, config)
    given = [seen.args[0] for seen in relative.call_args_list]
    S = iter(np.concatenate([value for value in given if np.ndim(value)]))
    G = iter([value for value in given if not np.ndim(value)])
    rows = []
    for i, (episode, *parts) in enumerate(zip(group, A, A_E, strict=True), 1):
        for t, (step, a, a_E) in enumerate(zip(episode.steps, *parts, strict=True), 1):
            row = SimpleNamespace(i=i, t=t, step=step, S=next(S), G=next(G), A=a, A_E=a_E)
            row.A_S = (a - a_E) / config.step_weight
            rows.append(row)
    return rows


def fill_credit(s):
    """Step 3: the episode that is to be summarized beside an unsolved one, and an anchor group."""
    own = [x for x in s.rows if x.i == s.i]
    ((most_met, _),) = Counter(x.step.obs for x in own).most_common(1)
    s.row = next(x for x in own if x.step.obs == most_met)
    h = [x for x in s.rows if x.step.obs == most_met]
    unsolved = next(x.i for x in h if x.S < s.row.S)
    lines = []
    for x in s.rows:
        if x.i in (unsolved, s.i):
            numbers = [f"{value:.2f}" for value in (x.G, x.A_E, x.A_S, x.A)]
            lines.append((x.i, x.t, code(x.step.action), f"{x.step.reward:g}", *numbers))
    s.two = table(("episode i", "t", "action", "r_t", "G", "A_E", "A_S", "A"), lines)
    alike = Counter((-x.G, code(x.step.action), f"{x.G:.2f}", f"{x.A_S:.2f}") for x in h)
    lines = [(*cells, count) for (_, *cells), count in sorted(alike.items())]
    s.state = table(("action taken there", "G", "A_S", "rows"), lines)
    S, G = [x.S for x in s.rows], [x.G for x in h]
    s.mean_S, s.std_S, s.size_S = np.mean(S), np.std(S, ddof=1), len(S)
    s.mean_G, s.std_G, s.size_G = np.mean(G), np.std(G, ddof=1), len(G)
    later = enumerate(x.step.reward for x in own[s.row.t - 1 :])
    s.discounted = " + ".join(f"{s.config.gamma}^{n} · {reward:g}" for n, reward in later)
    s.penalty = s.config.invalid_penalty * (not s.row.step.valid)


def fill_loss(s):
    """Step 4: the row of that episode whose ratio has gone farthest the way that A pushes it."""
    found = []
    for x in s.rows:
        if x.i == s.i:
            ids = (x.step.prompt_ids, x.step.response_ids)
            for one, logprobs, entropies in trained(s.warmed, *ids, advantages=x.A):
                log_ratio = (logprobs - one["old_logprobs"]) * one["rl_mask"]  # [1, L]
                found.append((log_ratio * np.sign(x.A), x, one, logprobs, entropies))
    pushed, s.loss, one, logprobs, entropies = max(found, key=lambda item: item[0].max())
    old, ref, mask = (one[name] for name in ("old_logprobs", "ref_logprobs", "rl_mask"))
    terms = common.objective(one, logprobs, entropies, int(mask.sum()), 0, s.config, 0.0)
    s.terms = {name: float(term) for name, (_, term) in terms.items()}
    s.total = float(sum(weight * term for weight, term in terms.values()))
    at = int(pushed.argmax())  # the token that has gone farthest, for Eq. 5 and 6
    alone, A = torch.zeros_like(mask), one["advantages"][:, None]
    alone[0, at] = True
    s.token, s.minus_A = code(s.decode(one["ids"][0, [at]])), -s.loss.A
    s.pi_old, s.pi, s.d = old[0, at].exp(), logprobs[0, at].exp(), (ref - logprobs)[0, at]
    s.ratio = s.pi / s.pi_old
    s.bound = s.ratio.clamp(1 - s.config.clip, 1 + s.config.clip)
    s.term = common.clipped_policy_loss(logprobs, old, A, alone, clip=s.config.clip)
    s.k3 = common.k3_kl(logprobs, ref, alone)
    s.update = s.warmed["update"][0][1]


def fill_gate(s):
    """Step 7: the step of the skill half with the token on which the two prompts differ most."""
    calls, group = s.distilled, s.helped.episodes
    (episodes, advantages, deltas, tokenizer, _), _ = calls["internalization_rows"][0]
    found = []
    for e, A in zip(episodes, advantages, strict=True):
        if e.group == group[0].group and e.skills:
            rows = distill.internalization_rows([e], [A], deltas, tokenizer, s.config)
            for t, (step, row) in enumerate(zip(e.steps, rows, strict=True), 1):
                if row.weight > 0:
                    x = SimpleNamespace(i=group.index(e) + 1, t=t, A=A[t - 1], row=row)
                    ids = (row.prompt_ids, row.response_ids)
                    x.one, x.logprobs, _ = next(trained(calls, *ids, weights=row.weight))
                    x.plain = x.logprobs[x.one["response_mask"]]
                    x.skill = torch.tensor(step.logprobs)
                    found.append(x)
    x = s.taught = max(found, key=lambda x: (x.skill - x.plain).max())
    gate, mask = x.row.gate, x.one["response_mask"]
    texts = [code(s.decode([token])) for token in x.row.response_ids]
    lines = [
        (f"**{text}**" if on else text, int(on), *(f"{float(z.exp()):.4f}" for z in logs))
        for text, on, *logs in zip(texts, gate, x.skill, x.plain, strict=True)
    ]
    s.gate = table(("token", "gate", "π_old given x^s_t", "π_θ given x_t"), lines)
    s.gated, s.response = sum(gate), len(gate)
    s.sigma_A = 1.0 if s.config.normalize_std else common.SUCCESS_REWARD
    s.nll = -float(x.plain[torch.tensor(gate)].sum())
    s.L_int = float(common.internalization_loss(x.logprobs, x.one["weights"], x.one["gate"]))
    s.lambda_k, s.mean = distill.lambda_at(1, s.config), calls["update"][0][1]
    with torch.no_grad():  # the weights as the phase left them
        now, _ = common.token_logprobs(s.policy.model, x.one["ids"], mask, s.config.temperature)
    at = int((x.skill - x.plain).argmax())
    s.decisive = texts[at]
    s.with_skill, s.without, s.now = (float(z[at].exp()) for z in (x.skill, x.plain, now[mask]))


# --- The page -------------------------------------------------------------------------------------


def write(warmed, mined, distilled, results) -> str:
    """What `run` gives -> the page."""
    s = SimpleNamespace(warmed=warmed, mined=mined, distilled=distilled, **follow(mined, distilled))
    (s.policy, _, s.config, _), _ = distilled["update"][0]
    s.decode = s.policy.tokenizer.decode
    episodes = warmed["rollout"][0][1]
    steps = [[[step.obs, step.action] for step in e.steps] for e in episodes]
    first = episodes[steps.index(s.source["steps"])]
    group = [e for e in episodes if e.group == first.group]
    s.i, s.rows = group.index(first) + 1, credit(group, s.config)
    fill_credit(s)
    fill_loss(s)
    fill_gate(s)

    s.flags, s.items, s.success_reward = " \\\n    ".join(FLAGS), ITEMS, common.SUCCESS_REWARD
    x, y = first.steps[0].plain_ids, first.steps[0].response_ids
    s.x, s.x_tokens, s.y, s.y_tokens = s.decode(x).strip(), len(x), s.decode(y), len(y)
    s.played, s.n_succ = played(group), sum(e.success for e in episodes)
    s.outcomes = ", ".join(f"{n} {name}" for name, n in mined["mine"][0][1].items())
    step = s.tested.episodes[0].steps[0]
    prompts = [s.decode(ids).strip().split("\n") for ids in (step.plain_ids, step.prompt_ids)]
    s.prompts, s.halves = "\n".join(ndiff(*prompts)), played(s.tested.episodes)
    s.kept = 1 - s.config.ema
    lines = [
        (f"after `{phase}.py`", f"{r['solved']} of {r['n']}", f"{r['low']:.2f} to {r['high']:.2f}")
        for phase, r in results.items()
    ]
    s.results = table(("checkpoint", "solved", "95% interval of success"), lines)
    return link(read_text(ROOT / "tools/walkthrough.md").format(**vars(s)))


def link(text) -> str:
    """The text, each link to code with the number of the line that begins as the link says.

    UserError where no line does, or more than one.
    """

    def to_line(found) -> str:
        file, start = found.groups()
        lines = read_text(ROOT / file).splitlines()
        numbers = [n for n, line in enumerate(lines, 1) if line.strip().startswith(start)]
        if len(numbers) != 1:
            raise UserError(f"{file}: {len(numbers)} lines begin with {start}; the page needs one")
        return f'[{file}:{numbers[0]}](../{file}#L{numbers[0]} "{start}")'

    return LINK.sub(to_line, text)


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--links", action="store_true", help="only set the line numbers again")
    args = parser.parse_args()
    write_atomically(PAGE, link(read_text(PAGE)) if args.links else write(*run()))
    print(f"{PAGE} is written")


if __name__ == "__main__":
    run_script(main)
