"""Would the tests notice? One-line bugs, each put into a copy of the project and tested there.

    python -m tools.mutants                 # all of them: a few minutes on 2 cores
    python -m tools.mutants --only kl-sign,delta-sign

A mutant is an exact string of a file and what stands in its place; the string must occur exactly
once, else the mutant is stale and has to be written anew. Only the tests that belong to it run.
It is killed when one of them fails. Exit code 1 when one survives that EQUIVALENT does not excuse,
when one is stale, or when the tests fail without any mutant.
"""

import argparse
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the mutants run side by side
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.dont_write_bytecode = True  # a mutant must never be read from a cache

import pytest
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "results", "__pycache__")
TIMEOUT = 300  # seconds; a mutant that takes longer hangs, which a test would show

EQUIVALENT = {  # mutants that no test can notice: name -> why
    "retired-returns": "only candidates are promoted; just the count `below` would go on",
}


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    tests: str  # what pytest is given
    old: str
    new: str


# "@ file: tests", then for each mutant its name, "- " what the file has, "+ " what it gets instead
MUTANTS = r"""
@ common.py: tests/test_gigpo.py
std-biased
- ddof=1
+ ddof=0
return-undiscounted
- reward + gamma * tail
+ reward + tail
return-forwards
- backwards[::-1]
+ backwards
return-without-penalty
- np.array(backwards[::-1]) - penalty
+ np.array(backwards[::-1])
score-without-penalty
- scores.append(sum(episode_rewards) - penalty)
+ scores.append(sum(episode_rewards) - 0 * penalty)
step-weight-ignored
- += step_weight * step_advantage
+ += step_advantage
lone-step-mean
- lone_mean=values[0])
+ lone_mean=0.0)
lone-group-mean
- lone_mean=0.0)
+ lone_mean=values[0])
normalize-std-inverted
- if normalize_std else value - mean
+ if not normalize_std else value - mean
baseline-inverted
- if baseline == "steps"
+ if baseline != "steps"
penalty-on-valid-rows
- (not s.valid) for s in e.steps]
+ s.valid for s in e.steps]
anchor-is-the-prompt
- [[s.obs for s in e.steps]
+ [[tuple([s.obs, bool(e.skills)]) for s in e.steps]
arms-always-apart
- if config.arm_baselines:
+ if True:
gamma-not-passed
- gamma=config.gamma
+ gamma=0.95

@ common.py: tests/test_losses.py
policy-sign
- torch.maximum(-advantages * ratio, -advantages * ratio.clamp
+ torch.maximum(advantages * ratio, advantages * ratio.clamp
clip-wrong-side
- loss = torch.maximum(
+ loss = torch.minimum(
clip-too-wide
- ratio.clamp(1 - clip, 1 + clip)
+ ratio.clamp(1 - clip, 1 + 2 * clip)
no-dual-clip
- torch.minimum(loss, -advantages * dual_clip)
+ loss
dual-clip-everywhere
- torch.where(advantages < 0, torch
+ torch.where(advantages < 9, torch
ratio-inverted
- ratio = (logprobs - old_logprobs).exp()
+ ratio = (old_logprobs - logprobs).exp()
kl-direction
- d = (ref_logprobs - logprobs)
+ d = (logprobs - ref_logprobs)
kl-sign
- terms["kl"] = (config.kl_coef, kl)
+ terms["kl"] = (-config.kl_coef, kl)
entropy-sign
- "entropy": (-config.entropy_coef
+ "entropy": (config.entropy_coef
lambda-sign
- "internalization": (lambda_,
+ "internalization": (-lambda_,
lambda-ignored
- "internalization": (lambda_,
+ "internalization": (1.0,
internalization-sign
- return -token_mean(weight * logprobs
+ return token_mean(weight * logprobs
weight-unclipped
- advantages.detach().clamp(0, clip)
+ advantages.detach().clamp(0)
weight-negative
- advantages.detach().clamp(0, clip)
+ advantages.detach().clamp(-clip, clip)
weight-with-gradient
- advantages.detach().clamp
+ advantages.clamp
gate-without-delta
- (used_skill & (utility > 0))
+ (used_skill | (utility > 0))
gate-open-at-zero
- (utility > 0))[:, None]
+ (utility >= 0))[:, None]
gate-whole-response
- t["action_mask"],
+ t["response_mask"],
rl-on-internalization-rows
- rl_mask = t["response_mask"] & ~t["internalize"][:, None]
+ rl_mask = t["response_mask"]
rl-tokens-of-all-rows
- for row in rows if not row.internalize)
-     gated
+ for row in rows)
+     gated
mean-of-each-micro-batch
- (tokens or mask.sum().clamp(min=1))
+ mask.sum().clamp(min=1)

@ common.py: tests/test_rows_and_update.py
worthless-rows-uncounted
- for row in rows if row.internalize and row.delta > 0)
+ for row in rows if row.internalize and row.advantage > 0)
worthless-rows-forwarded
- if not row.internalize or lambda_ * row.advantage > 0]
+ if True]

@ common.py: tests/test_losses.py
advantage-clip-not-passed
- clip=config.advantage_clip,
training-without-temperature
- responses, config.temperature)
+ responses)

@ common.py: tests/test_rows_and_update.py
scoring-without-temperature
- t["response_mask"], config.temperature, entropy
+ t["response_mask"], 1.0, entropy

@ runtime/logprobs.py: tests/test_rows_and_update.py
logprobs-unshifted
- response_mask.roll(-1, 1)
+ response_mask
entropy-negative
- spread = -(log_p.exp()
+ spread = (log_p.exp()
temperature-multiplied
- logits.float() / temperature
+ logits.float() * temperature

@ runtime/batches.py: tests/test_rows_and_update.py
eos-not-trained
- span = slice(len(row.prompt_ids), len(row))
+ span = slice(len(row.prompt_ids), len(row) - 1)
prompt-trained
- batch["response_mask"][i, span] = True
+ batch["response_mask"][i, 1 : len(row)] = True
steps-follow-all-rows
- round(len(kinds[0]) / config
+ round(len(rows) / config
rows-lost-between-batches
- (n + 1) * len(kind) // count
+ (n + 1) * (len(kind) - 1) // count
micro-batches-without-a-limit
- (len(batches[-1]) + 1) * len(row) > max_tokens
+ len(row) > max_tokens

@ common.py: tests/test_rows_and_update.py
rl-rows-under-the-plain-prompt
- Row(step.prompt_ids, step.response_ids
+ Row(step.plain_ids, step.response_ids
only-good-rows
- abs(row.advantage) > 1e-8
+ row.advantage > 1e-8
closing-tag-left-out
- span[1] + len("</action>")
+ span[1]
thoughts-in-the-gate
- first <= i <= last
+ i <= last
half-a-tag-left-out
- first <= i <= last
+ first < i <= last
no-zero-grad
- policy.optimizer.zero_grad(set_to_none=True)
+ pass
no-gradient-clipping
- clip_grad_norm_(model.parameters(), config.grad_clip)
+ clip_grad_norm_(model.parameters(), 1e9)
no-step
- policy.optimizer.step()
+ pass
eval-mode
-     model.train()  # gradient
+     # gradient
old-logprobs-of-the-sampler
-     if config.recompute_old:
-         score_rows
+     if False:
+         score_rows
reference-is-the-policy
- score_rows(policy.reference, rows, "ref
+ score_rows(model, rows, "ref
gradients-left-behind
- model.zero_grad(set_to_none=True)
-     products
+ products

@ runtime/policy.py: tests/test_policy.py
optimizer-forgets-its-state
- if not saved:
+ if True:

@ runtime/policy.py: tests/test_rows_and_update.py
reference-trains
- load_policy(config.model, config, device, trainable=False)
+ load_policy(config.model, config, device)

@ common.py: tests/test_rollout.py
everybody-carries-skills
- plain = [Episode(item, group) for
+ plain = [Episode(item, group, skills) for
one-episode-too-many
- range(members - skilled)]
+ range(members)]
equal-items-are-one-group
- group = f"{number}:{item}"
+ group = f"{item}"

@ common.py: tests/test_skills.py
statuses-ignored
- config.top_k, statuses, training)
+ config.top_k, training=training)

@ envs.py: tests/test_envs.py
plain-prompt-with-skills
- plain = build_prompt(obs, history, (), keep)
+ plain = build_prompt(obs, history, skills, keep)
skills-never-shown
- skilled = build_prompt(obs, history, skills, keep)
+ skilled = build_prompt(obs, history, (), keep)
no-skills-on-the-first-step
-     if skills:
-         parts
+     if skills and history:
+         parts
oldest-history
- range(max(0, taken - keep), taken)
+ range(min(keep, taken))
history-kept-in-long-prompts
- return build_prompts(obs, history, skills, keep=0)
+ pass
any-thought-is-valid
- "<think>" in text and "</think>" in text and

@ common.py: tests/test_rollout.py
plain-twin-fits-alone
- if max(map(len, fitted[i])) > config.max_prompt_tokens:
+ if len(fitted[i][0]) > config.max_prompt_tokens:
seen-after-acting
- obs=seen,
+ obs=observations[i].text,

@ common.py: tests/test_rollout.py
policy-sees-the-plain-prompt
- [prompt_ids for _, prompt_ids in prompts],
+ [plain_ids for plain_ids, _ in prompts],

@ common.py: tests/test_rollout.py
reward-unscaled
- reward=reward * config.success_reward
+ reward=reward
finished-games-go-on
- if not done:
+ if True:
same-seed-every-turn
- own_seed(1000 * seed + t)
+ own_seed(1000 * seed)
same-seed-every-iteration
- own_seed(1000 * seed + t)
+ own_seed(t)

@ runtime/generation.py: tests/test_generation.py
sampling-without-temperature
- (logits.float() / (temperature or 1.0))
+ logits.float()
sample-the-next-token-up
- (cumulated <= uniform
+ (cumulated < uniform
cut-before-eos
- is_end.int().argmax(1) + 1
+ is_end.int().argmax(1)

@ skills.py: tests/test_skills.py
delta-sign
- float(np.mean(s) - np.mean(p))
+ float(np.mean(p) - np.mean(s))
delta-of-unpaired-groups
- if s and p}
+ if s or p}
mining-from-the-skill-arm
- if e.success and not e.skills
+ if e.success
mining-from-failures
- if e.success and not e.skills
+ if not e.skills
ema-inverted
- self.config.ema * (delta - skill.utility)
+ (1 - self.config.ema) * (delta - skill.utility)
promoted-at-once
- unproven = skill.n < self.config.n_eval
+ unproven = False
one-evaluation-more
- skill.n < self.config.n_eval
+ skill.n <= self.config.n_eval
retired-after-one
- skill.below >= 2
+ skill.below >= 1
below-never-forgotten
- if skill.utility < 0 else 0
+ if skill.utility < 0 else skill.below
promoted-at-the-threshold
- skill.utility > self.config.active_above
+ skill.utility >= self.config.active_above
retired-returns
- if unproven or skill.status == "retired" or
+ if unproven or
credited-in-every-group
- for skill in skills[group]:
+ for skill in self.skills:
candidate-beside-others
- if candidates and self.config.candidate_alone:
+ if False:
candidates-take-no-turns
- candidates.sort(key=lambda s: s.retrieved)
+ pass
bucket-ignored
- if s.bucket == bucket and s.status in statuses
+ if s.status in statuses
evaluation-counts-as-a-try
- if training:
+ if True:
worst-skill-first
- key=score, reverse=True
+ key=score
no-bonus
- skill.utility + 0.1 * math
+ skill.utility + 0.0 * math
instances-admitted
- if INSTANCE.search(text):
+ if False:
duplicates-across-buckets
- peers = [s for s in self.skills if s.bucket == bucket]
+ peers = self.skills
best-skill-makes-room
- min(living, key=self.value)
+ max(living, key=self.value)

@ distill.py: tests/test_phases.py -k 'pairs_the_plain or useless or without_merit or in_units_of'
internalization-under-the-skill
- prompt_ids=step.plain_ids
+ prompt_ids=step.prompt_ids
sigma-always-1
- 1.0 if config.normalize_std else config.success_reward
+ 1.0
sigma-inverted
- 1.0 if config.normalize_std else
+ 1.0 if not config.normalize_std else
plain-arm-internalized
- if not episode.skills or delta <= 0:
+ if delta <= 0:
harmful-skills-internalized
- if not episode.skills or delta <= 0:
+ if not episode.skills:
internalized-as-rl
- internalize=True,
+ internalize=False,
unpaired-internalized
- deltas.get(episode.group, 0.0)
+ deltas.get(episode.group, 1.0)

@ distill.py: tests/test_phases.py -k 'candidates_are_tried'
phase-2-tries-candidates
- statuses=("active",)
+ statuses=("candidate", "active")

@ distill.py: tests/test_phases.py -k 'end_to_end_and_their_files'
lambda-without-ramp
- min(1.0, k / config.lambda_iterations)
+ 1.0

@ mine.py: tests/test_phases.py -k 'control_asks'
control-mines
- if config.skill_share and (k - 1)
+ if (k - 1)

@ common.py: tests/test_skills.py -k 'share_is'
half-whatever-the-share
- config.skill_share * members + 0.5
+ 0.5 * members + 0.5
a-small-share-is-nobody
- max(skilled, 1 if config.skill_share else 0)
+ skilled

@ mine.py: tests/test_phases.py -k 'unparsable or mined_skill or request_for or take_turns'
oldest-successes
- reversed(successes)
+ successes
candidates-are-known
-  and s.status == "active"]
+ ]
skill-in-one-bucket
- bank.add(*skill, episode["task_type"], k)
+ bank.add(*skill, "pick", k)

@ evaluate.py: tests/test_phases.py -k 'count_as_a_try'
evaluation-counts
- training=False,
evaluation-with-candidates
- statuses=("active",)
+ statuses=("candidate", "active")

@ evaluate.py: tests/test_phases.py -k 'wilson'
wilson-too-narrow
- z = 1.96
+ z = 1.64

@ runtime/run.py: tests/test_phases.py -k 'functions_of_seed'
same-tasks-every-iteration
- f"{self.config.seed} {self.phase} {k}")
+ f"{self.config.seed} {self.phase}")
same-sampling-in-every-phase
- f"{self.config.seed} {self.phase} {k} sampling"
+ f"{self.config.seed} {k} sampling"

@ runtime/run.py: tests/test_phases.py::test_an_interrupted_phase_goes_on_from_its_last_save
moments-lost-on-resuming
- state.pop("optimizer", None)
+ state.pop("optimizer", None) and None
iterations-repeated
- return range(done + 1, last + 1)
+ return range(done, last + 1)
@ common.py: tests/test_losses.py -k "hand_off or kl_internalization"
hand-off-without-hand
- 1 - lambda_ if config.hand_off
+ 1.0 if config.hand_off
kl-never
- if config.internalize_loss == "kl" and lambda_:
+ if config.internalize_loss == "kl" and not lambda_:
@ runtime/logprobs.py: tests/test_losses.py -k kl_internalization
kl-teacher-is-the-plain-prompt
- prompt_ids=row.skill_ids or row.prompt_ids
+ prompt_ids=row.prompt_ids
kl-of-the-last-prompt-token
- filled[mask] = (teacher
+ filled[mask.roll(-1, 1)] = (teacher
@ skills.py: tests/test_miner.py -k placebo
placebo-too-short
- words[:count]
+ words[:count - 1]
@ runtime/miner.py: tests/test_miner.py
miner-silence-is-a-crash
- except Exception as error:
+ except ValueError as error:
miner-never-gives-up
- if len(reasons) == len(prompts) > 0:
+ if False:
miner-takes-anything
- if not isinstance(text, str):
+ if False:
@ runtime/guard.py: tests/test_faults.py -k "finite or refused or group or worlds or evaluation"
nan-step-taken
- math.isfinite(log["loss"]) and math.isfinite(norm)
+ True
refusals-not-counted
- policy.refused += 1
+ policy.refused += 0
failed-group-kept
- if e.group not in failed
+ if True
half-of-the-world-gone-unsaid
- if 2 * len(failed) > len(groups):
+ if False:
@ common.py: tests/test_faults.py -k "finite or refused"
step-without-moved
- policy.moved = True
+ policy.moved = False
@ runtime/saves.py: tests/test_faults.py -k "two_saves or damaged_save or whole_save or last_two"
flipped-bit-unseen
- if sha256(path) != digest:
+ if False:
short-file-unseen
- if path.stat().st_size != size:
+ if size < 0:
damaged-save-stays-in-place
- if newest.exists() and set_aside:
+ if False:
only-one-save
- folder.rename(old)
+ shutil.rmtree(folder)
@ evaluate.py: tests/test_faults.py -k evaluation
half-a-wave-counts
- lines[: len(lines) // WAVE * WAVE]
+ lines
item-left-out
- if len(episodes) < len(wave):
+ if False:
@ tools/report.py: tests/test_report.py
report-unescaped-said
- return f"{escape(said[:start])}{mark}
+ return f"{said[:start]}{mark}
report-marks-the-plain-arm
- bool(record["skills"]) and record["phase"]
+ record["phase"]
@ tools/study.py: tests/test_study.py
interval-without-seeds
- variance += values.mean(1).var(ddof=1) / n_seeds
+ variance += 0.0
interval-without-items
- variance = values.mean(0).var(ddof=1) / n_items
+ variance = 0.0
interval-of-many-seeds
- t = t_quantile(n_seeds - 1)
+ t = 1.96
@ tools/subtasks.py: tests/test_study.py -k subtasks
evaluation-seeds-are-runs
- runs[Path(file).parent].append
+ runs[Path(file)].append
@ tools/effects.py: tests/test_study.py -k verdict
verdict-against-the-effect
- (skill.status == "active") == (effect
+ (skill.status == "active") != (effect
@ skills.py: tests/test_skills.py
copied-form-is-a-skill
- if condition.lower() == SKILL_FORM["condition"] or
+ if False or
@ common.py: tests/test_rollout.py -k "temperature or wrong_purchase or seeds_of_its_own"
evaluation-at-the-runs-temperature
- config.temperature if temperature is None else temperature
+ config.temperature
any-end-is-a-success
- episodes[i].success = info["success"]
+ episodes[i].success = done
score-is-the-success
- episodes[i].score = info["score"]
+ episodes[i].score = float(info["success"])
ranks-sample-alike
- seed=parallel.own_seed(1000 * seed + t)
+ seed=1000 * seed + t
@ evaluate.py: tests/test_rollout.py -k temperature
evaluation-temperature-not-passed
- seed + start, temperature=temperature, desc=desc)
+ seed + start, desc=desc)
waves-sample-alike
- groups, seed + start, temperature
+ groups, seed, temperature
@ skills.py: tests/test_skills.py
candidate-never-returns
- max(self.config.n_eval, active[0].retrieved) if active
+ self.config.n_eval if active
active-never-shown
- max(self.config.n_eval, active[0].retrieved) if active
+ math.inf if active
turns-by-the-worst
- max(self.config.n_eval, active[0].retrieved)
+ max(self.config.n_eval, active[-1].retrieved)
retired-text-returns
- for s in peers:
+ for s in (p for p in peers if p.status != "retired"):
retired-takes-room
- living = [s for s in peers if s.status != "retired"]
+ living = peers
match-weighs-nothing
- return 0.5 * fuzz
+ return 0.05 * fuzz
bonus-too-large
- skill.utility + 0.1 * math
+ skill.utility + 1.0 * math
bonus-over-all-buckets
- for s in self.skills if s.bucket == skill.bucket)
+ for s in self.skills)
@ common.py: tests/test_skills.py -k "task_and_not or share"
retrieved-for-the-type
- bank.retrieve(obs.task, obs
+ bank.retrieve(obs.task_type, obs
no-plain-half
- min(max(skilled, 1), members - 1)
+ max(skilled, 1)
@ distill.py: tests/test_phases.py -k "pairs_the_plain or lambda_rises"
teacher-without-skill
- skill_ids=step.prompt_ids
+ skill_ids=step.plain_ids
hand-off-too-early
- 1 - (k - 1) / config
+ 1 - k / config
@ warmup.py: tests/test_run.py -k warm_up_ends
warm-up-never-enough
- len(successes) >= config.n_req
+ len(successes) >= 1000 * config.n_req
@ mine.py: tests/test_phases.py -k "round_of_mining or remembers"
mined-once
- (k - 1) % config.mine_every == 0
+ k == 1
oldest-remembered
- [-MEMORY:]
+ [:MEMORY]
@ common.py: tests/test_losses.py -k "formula_written or kind_of_row"
clip-not-passed
- clip=config.clip,
+ clip=0.2,
dual-clip-not-passed
- dual_clip=config.dual_clip,
+ dual_clip=3.0,
@ common.py: tests/test_faults.py -k forgives
never-forgiven
- policy.refused = 0
+ pass
@ common.py: tests/test_rows_and_update.py -k gap_to
gap-of-the-last-step
- logs[0]["log_ratio"]
+ logs[-1]["log_ratio"]
@ runtime/batches.py: tests/test_rows_and_update.py -k shuffled
rows-in-order
- random.Random(seed).sample(kind, len(kind))
+ list(kind)
batches-too-large
- round(len(kinds[0]) / config.minibatch_rows)
+ len(kinds[0]) // config.minibatch_rows
@ runtime/generation.py: tests/test_generation.py -k "every_end or at_temperature_1"
one-end-only
- {*ids, tokenizer.eos_token_id}
+ {tokenizer.eos_token_id}
greedy-logprobs-tempered
- temperature or 1.0
+ temperature or 0.5
@ runtime/metrics.py: tests/test_rollout.py -k logged_share
contrast-inverted
- len(set(results)) == 1
+ len(set(results)) != 1
valid-is-invalid
- not s.valid for s in steps
+ s.valid for s in steps
cut-inverted
- n == config.max_response_tokens
+ n != config.max_response_tokens
low-percentile
- advantages)), 95))
+ advantages)), 5))
prompts-of-the-plain-arm
- len(s.prompt_ids)
+ len(s.plain_ids)
@ runtime/run.py: tests/test_run.py -k "warm_up_ends or by_the_clock"
warm-up-begun-again
- more = more and len(state["successes"]) < self.config.n_req
+ pass
clock-never-due
- minutes >= self.config.save_minutes
+ False
@ runtime/run.py: tests/test_faults.py -k not_saved
nan-weights-saved
- if not torch.isfinite(weight).all():
+ if False:
@ runtime/guard.py: tests/test_faults.py -k half_of
half-is-most
- if 2 * len(failed) > len(groups):
+ if 2 * len(failed) >= len(groups):
@ tools/regime.py: tests/test_study.py -k regime
gain-against-the-variant
- gain = values - base
+ gain = base - values
no-contrast-is-contrast
- 1 - float(np.mean([x["no_contrast"]
+ float(np.mean([x["no_contrast"]
@ tools/effects.py: tests/test_study.py -k effect
effect-inverted
- effect = guided.mean() - base.mean()
+ effect = base.mean() - guided.mean()
guided-without-its-skill
- items[skill.bucket], (skill,))
+ items[skill.bucket])
@ tools/study.py: tests/test_study.py
episodes-before-the-iteration
- x["iteration"] <= iteration]
+ x["iteration"] < iteration]
other-control
- CONTROL = "gigpo"
+ CONTROL = "siri"
wrong-quantile
- share - 0.5, scale
+ share - 0.4, scale
warm-up-explains
- if x["phase"] != "warmup"]
+ if x["phase"]]
@ tools/pool.py: tests/test_study.py -k pool
ties-are-ahead
- sum(value > 0 for value in values)
+ sum(value >= 0 for value in values)
one-look-shown
- pooled[f"{measure}_looks"]
+ pooled[f"{measure}_95"]
seeds-twice
- if len(set(seeds)) < len(seeds):
+ if False:
@ tiny/imitate.py: tests/test_tiny.py -k "fewer_steps or measured_on"
summaries-skipped
- if not is_summary(response)]
+ if True]
lessons-of-the-evaluation
- envs.world(lessons.world).EVAL_SPLIT
+ "train"
fewer-lessons
- len(pairs) - count))
+ len(pairs) // 2))
@ tiny/shop.py: tests/test_tiny_shop.py
goals-of-the-other-split
- envs.list_items("webshop", split, data):
+ envs.list_items("webshop", "train", data):
value-within-another
- if actions & {f"click[{v}]" for v in offered[name]}]
+ if any(v in str(actions) for v in offered[name][:1])]
options-of-other-tasks
- [name for name in names if f"the {name} "
+ [name for name in OPTIONS if f"the {name} "
other-words-than-the-task
- instruction.removeprefix("Find me ")
+ " ".join(sorted(instruction.split()))
one-product-alone
- rng.choice(items[product])
+ items[product][0]
@ config.py: tests/test_run.py -k "copy_of or version"
copy-unchecked
- path = copies[0]
+ path = copies[0]; return read_json(path)
@ tiny/imitate.py: tests/test_tiny.py -k "own_tok or only or micro or formed or rises or unbroken"
prompts-of-a-real-model-taught
- with_prompts=not lessons.model)
+ with_prompts=True)
lessons-without-an-end
- Row(prompt, answer + eos, 0.0, [])
+ Row(prompt, answer, 0.0, [])
mean-of-the-micro-batch
- (parts[0] / responses + parts[1] / prompts).backward()
+ (parts[0] / len(batch) + parts[1] / len(batch)).backward()
ill-formed-is-exact
- result["exact"] += valid and action
+ result["exact"] += action
rate-without-end
- return 0.5 + 0.5 * math.cos
+ return 0.6 + 0.4 * math.cos
optimizers-forgotten
- make_optimizers(model, lessons, state["optimizers"])
+ make_optimizers(model, lessons)
"""


def read_mutants(text) -> list:
    """The table above -> [Mutant]."""
    mutants = []
    for line in text.strip().splitlines():
        if line.startswith("@ "):
            file, tests = line.removeprefix("@ ").split(": ", 1)
        elif line.startswith("- "):
            mutants[-1].old.append(line[2:])
        elif line.startswith("+ "):
            mutants[-1].new.append(line[2:])
        elif line:
            mutants.append(Mutant(line, file, tests, [], []))
    return [replace(m, old="\n".join(m.old), new="\n".join(m.new)) for m in mutants]


def stale(mutant) -> str:
    """What is wrong with the mutant itself, or nothing."""
    count = (ROOT / mutant.file).read_text().count(mutant.old)
    return "" if count == 1 else f"{mutant.old!r} occurs {count} times in {mutant.file}"


def load_libraries():
    """Import what the tests need once, before the processes part; nothing of this project.

    Much of it is imported only when a model is loaded and used, so one is.
    """
    import alfworld.gen.constants  # noqa: F401
    import optimi  # noqa: F401
    import rapidfuzz  # noqa: F401
    import torch
    import torch.distributed.fsdp  # noqa: F401
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = ROOT / "tiny" / "policy"
    transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    from transformers import HfArgumentParser  # noqa: F401


def run_tests(folder, tests) -> int:
    """Start pytest in `folder`, in a process that has the libraries already -> the process's id."""
    process = os.fork()
    if process:
        return process
    signal.alarm(TIMEOUT)  # ends the process
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os.chdir(folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "tools"]:
        del sys.modules[name]  # the copy has its own
    options = ["-x", "-q", "-p", "no:cacheprovider", "--basetemp", f"{folder}/.temp"]
    code = 4
    try:
        code = pytest.main([*options, *shlex.split(tests)])
    finally:
        os._exit(code)


def judge(mutants, jobs) -> dict:
    """Mutant's name -> "killed", "survived" or what went wrong, `jobs` of them at a time."""
    results = {}
    running = {}  # process -> (mutant, folder, the file as it was)
    waiting = list(reversed(mutants))
    with tempfile.TemporaryDirectory() as temp:
        folders = [Path(temp) / str(n) / "project" for n in range(jobs)]
        for folder in folders:
            shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
        bar = tqdm(total=len(mutants), desc="mutants", unit="run")
        while waiting or running:
            while waiting and folders:
                mutant, folder = waiting.pop(), folders.pop()
                whole = (folder / mutant.file).read_text()
                (folder / mutant.file).write_text(whole.replace(mutant.old, mutant.new))
                running[run_tests(folder, mutant.tests)] = mutant, folder, whole
            process, status = os.wait()
            mutant, folder, whole = running.pop(process)
            (folder / mutant.file).write_text(whole)
            folders.append(folder)
            code = os.waitstatus_to_exitcode(status)
            names = {0: "survived", 1: "killed", -signal.SIGALRM: "killed"}  # it hung
            results[mutant.name] = names.get(code, f"pytest ended with {code}")
            bar.set_postfix_str(f"{mutant.name[:40]} {results[mutant.name]}")
            bar.update()
        bar.close()
    return results


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="names, joined by commas")
    parser.add_argument("--jobs", type=int, default=2, help="copies tested at the same time")
    args = parser.parse_args()
    start = time.time()
    chosen = [m for m in read_mutants(MUTANTS) if not args.only or m.name in args.only.split(",")]
    if not chosen:
        parser.error(f"--only {args.only}: no mutant has such a name")
    results = {m.name: f"stale: {stale(m)}" for m in chosen if stale(m)}
    fresh = [m for m in chosen if m.name not in results]
    load_libraries()
    # the same tests on the project as it is: a mutant is only killed by tests that pass without it
    tests = sorted({m.tests for m in fresh})
    unchanged = [Mutant(name, "common.py", name, "", "") for name in tests]
    results |= judge(unchanged + fresh, args.jobs)

    broken = [m.tests for m in unchanged if results[m.name] != "survived"]
    for tests in broken:
        print(f"without any mutant: {results[tests]}: {tests}")
    bad = len(broken)
    for mutant in chosen:
        result = results[mutant.name]
        excuse = EQUIVALENT.get(mutant.name, "")
        bad += result != "killed" and not (result == "survived" and excuse)
        print(f"{mutant.name:<34}{result}{f' (equivalent: {excuse})' if excuse else ''}")
    killed = sum(results[m.name] == "killed" for m in chosen)
    survived = sum(results[m.name] == "survived" for m in chosen)
    seconds = time.time() - start
    print(f"{killed} of {len(chosen)} killed, {survived} survived, in {seconds:.0f} s")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
