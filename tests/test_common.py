"""Numerics of the shared module. Each test names the bug it guards against."""

import dataclasses
import doctest
import json
import time

import numpy as np
import pytest
import torch
from conftest import SHARED

import common
import envs
from common import Row, Skill, SkillBank, gigpo_advantages, internalization_loss

# --- GiGPO ----------------------------------------------------------------------------------------


def test_worked_example_in_the_docstring_is_what_the_code_computes():
    assert doctest.run_docstring_examples(gigpo_advantages, vars(common)) is None
    finder = doctest.DocTestFinder().find(gigpo_advantages, "gigpo", globs=vars(common))
    results = doctest.DocTestRunner().run(finder[0])
    assert results.attempted == 1 and results.failed == 0


@pytest.mark.skipif(not (SHARED / "gigpo_cases.json").exists(), reason="../shared/data is not here")
def test_advantages_equal_verl_agents_code():
    for case in json.loads((SHARED / "gigpo_cases.json").read_text()):
        expected = case.pop("advantages")
        computed = gigpo_advantages(
            case.pop("groups"), case.pop("rewards"), case.pop("anchors"), **case
        )
        for ours, theirs in zip(computed, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_episode_baseline_runs_over_episodes_not_over_steps():
    # one solved episode of 1 step, one failed of 3: the mean over episodes is 5, over steps 2.5
    args = (["g", "g"], [[10], [0, 0, 0]], [["a"], ["b", "c", "d"]])
    over_steps = gigpo_advantages(*args, step_weight=0, normalize_std=False)
    over_episodes = gigpo_advantages(*args, step_weight=0, normalize_std=False, baseline="episodes")
    assert over_steps[0][0] == 7.5 and over_episodes[0][0] == 5 and over_episodes[1][2] == -5


def test_penalty_stays_on_its_row_and_is_not_propagated():
    clean = gigpo_advantages(["g", "h"], [[0, 10], [0]], [["a", "b"], ["a"]], normalize_std=False)
    penal = gigpo_advantages(
        ["g", "h"],
        [[0, 10], [0]],
        [["a", "b"], ["a"]],
        normalize_std=False,
        penalties=[[0, 1], [0]],
    )
    assert penal[0][0] - clean[0][0] == pytest.approx(0.5)  # only through the group's mean score
    assert penal[0][1] - clean[0][1] == pytest.approx(-0.5)


@pytest.mark.parametrize("reward", [0, 10])
@pytest.mark.parametrize("normalize_std", [True, False])
def test_group_without_contrast_gives_zero_and_no_nan(reward, normalize_std):
    result = gigpo_advantages(["g"] * 4, [[reward]] * 4, [["a"]] * 4, normalize_std=normalize_std)
    assert all((a == 0).all() for a in result)


def test_empty_inputs_do_not_crash():
    assert gigpo_advantages([], [], []) == []
    assert [len(a) for a in gigpo_advantages(["g", "g"], [[], [1]], [[], ["a"]])] == [0, 1]


def test_groups_with_equal_observations_do_not_mix():
    apart = gigpo_advantages(
        ["g", "h"], [[10], [0]], [["a"], ["a"]], normalize_std=False, step_weight=1
    )
    assert (
        apart[0][0] == 10 and apart[1][0] == 0
    )  # single-row groups: mean 0, std 1; no step advantage


def test_five_thousand_steps_take_less_than_a_fifth_of_a_second():
    rng = np.random.default_rng(0)
    groups, rewards = (
        [f"task {i // 8}" for i in range(250)],
        [[0.0] * 19 + [10.0 * (i % 3 == 0)] for i in range(250)],
    )
    anchors = [[f"state {rng.integers(8)}" for _ in range(20)] for _ in range(250)]
    start = time.perf_counter()
    gigpo_advantages(groups, rewards, anchors)
    assert time.perf_counter() - start < 0.2


# --- losses ---------------------------------------------------------------------------------------


def test_policy_loss_clips_from_the_right_side_and_dual_clips():
    one = torch.ones(1, 1, dtype=torch.bool)
    loss = lambda ratio, a: common.clipped_policy_loss(  # noqa: E731
        torch.tensor([[ratio]]).log(), torch.zeros(1, 1), torch.tensor([[float(a)]]), one
    ).item()
    assert loss(1.5, 1) == pytest.approx(-1.2)  # a good action gains nothing beyond 1 + clip
    assert loss(0.5, 1) == pytest.approx(-0.5)
    assert loss(0.5, -1) == pytest.approx(0.8)
    assert loss(2.0, -1) == pytest.approx(2.0)
    assert loss(9.0, -1) == pytest.approx(3.0)  # dual clip


def test_k3_is_zero_at_the_reference_and_positive_elsewhere():
    mask = torch.tensor([[True, True, False]])
    assert common.k3_kl(torch.zeros(1, 3), torch.zeros(1, 3), mask) == 0
    value = common.k3_kl(torch.tensor([[-1.0, -1.0, 5.0]]), torch.tensor([[-2.0, -2.0, 0.0]]), mask)
    assert value == pytest.approx(np.exp(-1.0) + 1 - 1)  # d = -1; the masked token does not count


GATE = dict(advantages=0.5, utility=0.25, used_skill=True, action=True)


@pytest.mark.parametrize(
    "closed",
    [dict(advantages=-0.5), dict(utility=-0.25), dict(used_skill=False), dict(action=False)],
)
def test_each_factor_of_the_internalization_gate_alone_switches_a_token_off(closed):
    def gradient(advantages, utility, used_skill, action):
        logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        mask = torch.tensor([[False, action]])
        internalization_loss(
            logprobs,
            torch.tensor([advantages]),
            torch.tensor([utility]),
            torch.tensor([used_skill]),
            mask,
        ).backward()
        return logprobs.grad[0].tolist()

    assert gradient(**GATE) == [0, -0.5]
    assert gradient(**GATE | closed) == [0, 0]


def test_internalization_weight_is_clipped_and_carries_no_gradient():
    advantages = torch.tensor([7.0], requires_grad=True)
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    on = torch.tensor([[True]])
    internalization_loss(
        logprobs, advantages, torch.tensor([1.0]), torch.tensor([True]), on, clip=2.0
    ).backward()
    assert logprobs.grad.item() == -2.0 and advantages.grad is None


# --- rows and log-probs ---------------------------------------------------------------------------


def as_rows(episodes, advantage=1.0):
    return [
        Row(s.prompt_ids, s.response_ids, advantage, s.logprobs) for e in episodes for s in e.steps
    ]


def test_eos_is_inside_the_loss_mask(episodes, policy):
    tokenizer = policy[1]
    rows = [row for row in as_rows(episodes) if row.response_ids[-1] == tokenizer.eos_token_id]
    assert rows, "the policy never ended a response"
    batch = common.collate(rows, tokenizer.pad_token_id, "cpu")
    for i, row in enumerate(rows):
        assert (
            batch["ids"][i, len(row) - 1] == tokenizer.eos_token_id
            and batch["response_mask"][i, len(row) - 1]
        )
        assert batch["response_mask"][i].sum() == len(row.response_ids)


@torch.no_grad()
def test_logprobs_are_shifted_by_one(policy):
    model, tokenizer = policy
    ids = torch.tensor([common.encode_prompts(tokenizer, ["go to desk 1 and look"])[0]])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, -4:] = True
    logprobs, _ = common.token_logprobs(model, ids, mask)
    for t in range(
        ids.shape[1] - 4, ids.shape[1]
    ):  # token t is predicted by the prefix that ends before it
        expected = model(ids[:, :t]).logits[0, -1].log_softmax(-1)[ids[0, t]]
        assert logprobs[0, t].item() == pytest.approx(expected.item(), abs=1e-5)
    assert (logprobs[~mask] == 0).all()


def test_rollout_logprobs_equal_training_logprobs_on_right_padded_rows(episodes, policy, config):
    model, tokenizer = policy
    rows = as_rows(episodes)
    common.score_rows(model, rows, "old_logprobs", config, tokenizer.pad_token_id)
    gap = max(
        (row.old_logprobs - torch.tensor(row.rollout_logprobs)).abs().max().item() for row in rows
    )
    assert gap < 1e-4


@torch.no_grad()
def test_batch_of_one_equals_the_same_row_in_a_padded_batch(episodes, policy):
    model, tokenizer = policy
    rows = sorted(as_rows(episodes), key=len)
    rows = [rows[0], rows[-1]]
    both = common.collate(rows, tokenizer.pad_token_id, "cpu")
    alone = common.collate(rows[:1], tokenizer.pad_token_id, "cpu")
    together, _ = common.token_logprobs(model, both["ids"], both["response_mask"])
    single, _ = common.token_logprobs(model, alone["ids"], alone["response_mask"])
    torch.testing.assert_close(together[0, : single.shape[1]], single[0], atol=1e-5, rtol=0)


def gradients(policy, config, rows, **changes):
    model, tokenizer = policy
    config = common.Config(**vars(config) | {"kl_coef": 0.1, "entropy_coef": 0.01} | changes)
    model.zero_grad()
    terms = common.backward(model, rows, config, 0.5, tokenizer.pad_token_id)
    return terms, torch.cat([p.grad.flatten() for p in model.parameters()])


def test_loss_and_gradients_do_not_change_with_the_micro_batch_size(episodes, policy, config):
    rng = np.random.default_rng(0)
    rows = as_rows(episodes)
    for i, row in enumerate(rows):
        row.advantage = float(rng.normal())
        row.old_logprobs = torch.tensor(row.rollout_logprobs) + 0.3 * torch.randn(
            len(row.response_ids)
        )
        row.ref_logprobs = torch.tensor(row.rollout_logprobs) - 0.2
        if i % 3 == 0:
            row.distill, row.utility = True, 0.25 * (i % 2 == 0) + 0.25
            row.action_mask = common.action_mask(policy[1], row.response_ids)
    whole, big = gradients(policy, config, rows, micro_tokens=10**9)
    parts, small = gradients(policy, config, rows, micro_tokens=1)  # one row at a time
    assert big.abs().max() > 1e-3
    torch.testing.assert_close(big, small, atol=2e-6, rtol=1e-4)
    for name in whole:
        assert whole[name] == pytest.approx(parts[name], abs=1e-5), name


def test_lr_zero_leaves_the_weights_unchanged(episodes, policy, config):
    model, tokenizer = policy
    config.lr, before = 0.0, [p.clone() for p in model.parameters()]
    rows = as_rows(episodes)
    metrics = common.update(
        model, None, common.make_optimizer(model, config), rows, config, tokenizer=tokenizer, seed=0
    )
    assert metrics["grad_norm"] > 0 and metrics["clipped"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_update_moves_the_log_probs_in_the_direction_of_the_advantages(episodes, policy, config):
    model, tokenizer = policy
    config.lr, config.kl_coef, config.entropy_coef = 1e-3, 0.0, 0.0
    rows = as_rows(episodes)[:12]
    for i, row in enumerate(rows):
        row.advantage = 1.0 if i % 2 else -1.0
    common.score_rows(model, rows, "ref_logprobs", config, 0)  # the log-probs before
    common.update(
        model, None, common.make_optimizer(model, config), rows, config, tokenizer=tokenizer, seed=0
    )
    common.score_rows(model, rows, "old_logprobs", config, 0)
    change = [float((row.old_logprobs - row.ref_logprobs).sum()) for row in rows]
    assert np.mean(change[1::2]) > np.mean(change[0::2])


def test_flags_that_save_time_or_memory_do_not_change_the_step(episodes, config):
    """In float32 the sampler's log-probs are the trainer's; a reference on the CPU is the same."""
    logs = []
    for flags in ({"recompute_old": True}, {"recompute_old": False}, {"ref_offload": True}):
        settings = dataclasses.replace(config, **flags)
        model, tokenizer = common.load_policy("tiny", settings, "cpu")
        reference = common.load_reference(dataclasses.replace(settings, model="tiny"), "cpu")
        optimizer, rows = common.make_optimizer(model, settings), as_rows(episodes)
        options = {"tokenizer": tokenizer, "seed": 0}
        logs.append(common.update(model, reference, optimizer, rows, settings, **options))
    for log in logs[1:]:
        for name in ("loss", "policy", "kl", "entropy", "grad_norm"):
            assert log[name] == pytest.approx(logs[0][name], abs=1e-5), name
        assert log["logprob_gap"] < 1e-5


def test_update_without_rows_does_nothing(policy, config):
    model, tokenizer = policy
    metrics = common.update(model, None, None, [], config, tokenizer=tokenizer, seed=0)
    assert metrics["optimizer_steps"] == 0


# --- action tokens --------------------------------------------------------------------------------


def masked_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    mask = common.action_mask(tokenizer, ids)
    return tokenizer.decode([i for i, on in zip(ids, mask) if on])


def test_action_mask_covers_the_action_and_its_closing_tag_only(policy):
    tokenizer = policy[1]
    assert (
        masked_text(tokenizer, "<think>take it</think><action>go to desk 1</action>")
        == "go to desk 1</action>"
    )
    assert masked_text(tokenizer, "<think>a <action> b") == ""
    assert masked_text(tokenizer, "") == ""


def test_action_mask_with_a_tokenizer_that_splits_the_tags():
    """A BPE without tag tokens, as Qwen's: a bracket may merge with the letter beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=raw.pre_tokenizer.alphabet()
    )
    raw.train_from_iterator(["<action>go to desk</action>", "n>go", ">go"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    text = "<think>é</think><action>go on</action> end"
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    mask = common.action_mask(tokenizer, ids)
    on = [i for i, m in enumerate(mask) if m]
    assert on == list(range(on[0], on[-1] + 1))
    covered = tokenizer.decode([ids[i] for i in on])
    assert "go on</action>" in covered and len(covered) < len("action>go on</action> e")
    assert not mask[-1] and not mask[0]


# --- rollout --------------------------------------------------------------------------------------


def test_paired_halves_share_the_game_and_the_initial_observation(policy, config):
    model, tokenizer = policy
    items = envs.list_items("alfworld", "train", config.data)[:3]
    bank = SkillBank(config)
    for item in items:
        bank.skills.append(
            Skill("any task", "look first", envs.task_type_of(item), status="active")
        )
    plan = common.plan_rollouts(items, config, bank)
    episodes = common.rollout(model, tokenizer, config, plan, temperature=1.0, seed=0)
    for start in range(0, 12, 4):
        group = episodes[start : start + 4]
        assert [bool(e.skills) for e in group] == [True, True, False, False]
        assert (
            len({e.item for e in group})
            == len({e.group for e in group})
            == len({e.steps[0].obs for e in group})
            == 1
        )
        with_skill, plain = group[0].steps[0], group[2].steps[0]
        assert with_skill.plain_ids == plain.prompt_ids == plain.plain_ids
        assert "look first" in tokenizer.decode(with_skill.prompt_ids)  # on the first step too
        assert "look first" not in tokenizer.decode(with_skill.plain_ids)


def test_finished_episodes_leave_the_batch(config, policy):
    model, tokenizer = policy
    config.max_steps = 20
    items = envs.list_items("alfworld", "train", config.data)
    episodes = common.rollout(
        model, tokenizer, config, common.plan_rollouts(items[:6], config), temperature=1.0, seed=3
    )
    assert any(e.success for e in episodes)
    for e in episodes:
        rewards = [s.reward for s in e.steps]
        assert rewards == [0.0] * (len(rewards) - 1) + [10.0 * e.success]
        assert e.success or len(e.steps) == 20


def test_a_long_prompt_loses_history_first_then_names_the_game(policy, config):
    tokenizer = policy[1]
    episode = common.Episode("some/game", "g", "task", "pick")
    episode.steps = [
        common.Step("You see much. " * 30, [], [], "", [], [], "look", True, 0.0) for _ in range(2)
    ]
    obs = envs.Observation("You see a desk 1.", "put a mug on desk", "pick", ("look",))
    ids, _ = common.fit_prompts(tokenizer, config, [(episode, obs)])[0]
    config.max_prompt_tokens = len(ids) - 1
    shorter, _ = common.fit_prompts(tokenizer, config, [(episode, obs)])[0]
    assert len(shorter) <= config.max_prompt_tokens and "Observation 2" in tokenizer.decode(shorter)
    config.max_prompt_tokens = 20
    with pytest.raises(envs.UserError, match="some/game.*max_prompt_tokens"):
        common.fit_prompts(tokenizer, config, [(episode, obs)])


def test_empty_group_is_a_clear_error(config):
    config.group_size = 0
    with pytest.raises(envs.UserError, match="--group_size"):
        common.plan_rollouts(["x"], config)


# --- skills ---------------------------------------------------------------------------------------


def test_skill_life_cycle():
    bank = SkillBank(common.Config())
    good, bad, flat = (Skill("c", f"s{i}", "pick") for i in range(3))
    bank.skills = [good, bad, flat]
    for _ in range(3):
        bank.update(good, 0.5)
    assert good.status == "candidate"  # n_eval = 4 evaluations come first
    bank.update(good, 0.5)
    assert good.status == "active" and good.utility == pytest.approx(0.5 * (1 - 0.7**4))
    for _ in range(4):
        bank.update(bad, -0.25)
    assert bad.status == "candidate"  # below zero once
    bank.update(bad, -0.25)
    assert bad.status == "retired"  # twice running
    for _ in range(9):
        bank.update(flat, 0.0)
    assert flat.status == "candidate"
    for _ in range(20):
        bank.update(good, -0.5)
    assert good.status == "retired"  # an active skill can fall, and a retired one never returns
    bank.update(good, 1.0)
    assert good.status == "retired" and len(good.deltas) == 25
    assert bank.retrieve("task", "pick") == [flat]


def test_retrieval_stays_in_the_bucket_with_one_candidate_at_most(config):
    bank = SkillBank(config)
    bank.skills = [
        Skill("a", "1", "heat"),
        Skill("b", "2", "heat"),
        Skill("c", "3", "cool", status="active"),
    ]
    bank.skills += [Skill(f"d{i}", f"{i}", "heat", status="active") for i in range(4)]
    found = bank.retrieve("heat some egg", "heat")
    assert len(found) == 3 and sum(s.status == "candidate" for s in found) == 1
    assert {s.bucket for s in found} == {"heat"}
    again = bank.retrieve("heat some egg", "heat")
    assert found[0] is not again[0]  # the other candidate gets its turn
    assert all(
        s.status == "active" for s in bank.retrieve("heat some egg", "heat", statuses=("active",))
    )


def test_bank_refuses_instances_essays_and_repetitions(config):
    bank = SkillBank(config)
    assert (
        bank.add(
            "the task asks for a clean object", "take it to the sinkbasin and clean it", "clean"
        )
        == "added"
    )
    assert (
        bank.add("an object must be clean", "Take it to the sinkbasin, and clean it", "clean")
        == "duplicate"
    )
    assert (
        bank.add("an object must be clean", "take it to the fridge and cool it", "clean") == "added"
    )
    assert bank.add("you need a mug", "open drawer 3", "pick") == "instance"
    assert bank.add("you shop", "buy B09ABCDEF1", "pick") == "instance"
    assert bank.add("you need a mug", "word " * 81, "pick") == "words"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[1]",
        '"x"',
        '{"condition": "a"}',
        '{"condition": 1, "strategy": 2}',
        "{",
        '{"condition": "", "strategy": "x"}',
        'Sure! {"condition": "a", "strategy": "b"}',
    ],
)
def test_a_summary_that_is_no_skill_is_none_and_never_crashes(text):
    assert common.parse_skill(text) is None


def test_a_summary_is_parsed():
    assert common.parse_skill('{"condition": "When it is hot", "strategy": "cool it."}') == (
        "it is hot",
        "cool it",
    )
    assert common.parse_skill('```json\n{"condition": "c", "strategy": "s"}\n```') == ("c", "s")


def test_bank_survives_its_file(config, tmp_path):
    bank = SkillBank(config)
    bank.add("c", "s", "pick", iteration=3)
    bank.update(bank.skills[0], 0.5)
    bank.save(tmp_path / "skills.jsonl")
    loaded = SkillBank.load(tmp_path, config)
    assert vars(loaded.skills[0]) == vars(bank.skills[0])


def test_delta_is_the_difference_of_the_halves_and_needs_both():
    skill = Skill("c", "s", "pick")

    def make(group, skills, success):
        return common.Episode("i", group, "t", "pick", skills, [], success)

    episodes = [make("g", (skill,), True), make("g", (skill,), True), make("g", (), True)]
    episodes += [make("g", (), False), make("h", (), True), make("h", (), True)]
    assert common.group_deltas(episodes) == {"g": 0.5}


def test_wilson_interval():
    low, high = common.wilson(119, 128)
    assert (round(low, 3), round(high, 3)) == (0.872, 0.963)
    assert common.wilson(0, 0) == (0.0, 1.0)


def test_gradient_checkpointing_is_on_in_training_and_changes_no_gradient(episodes, config):
    """Transformers recomputes activations in train mode only; in eval mode the flag is silent."""
    rows = as_rows(episodes)
    for row in rows:
        row.old_logprobs = torch.tensor(row.rollout_logprobs)
    results = []
    for on in (False, True):
        config.gradient_checkpointing, config.lr = on, 1e-3
        model, tokenizer = common.load_policy("tiny", config, "cpu")
        optimizer, calls = common.make_optimizer(model, config), []
        layer = model.model.layers[0].input_layernorm
        layer.register_forward_hook(lambda *_, c=calls: c.append(1))
        common.update(model, None, optimizer, rows, config, tokenizer=tokenizer, seed=0)
        results.append((len(calls), torch.cat([p.flatten() for p in model.parameters()])))
    assert results[1][0] > results[0][0]  # the layer ran again in the backward pass
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=0)


# --------------------------------------------------------------------------------------------------
# The optimizer and memory
# --------------------------------------------------------------------------------------------------


def test_bfloat16_weights_move_at_lr_1e_6_as_float32_weights_do():
    """Plain AdamW on bfloat16 loses 98% of the steps at this learning rate."""
    torch.manual_seed(0)
    start = (torch.randn(20_000) * 0.02).bfloat16()
    direction = torch.randn(20_000)

    def moved(dtype):
        model = torch.nn.ParameterList([torch.nn.Parameter(start.to(dtype, copy=True))])
        optimizer = common.make_optimizer(model, common.Config(lr=1e-6))
        noise = torch.Generator().manual_seed(1)
        for _ in range(100):
            gradient = direction + 0.3 * torch.randn(20_000, generator=noise)
            model[0].grad = (1e-3 * gradient).to(dtype)
            optimizer.step()
        lost = optimizer.state[model[0]]["kahan_comp"]
        end = model[0].detach().double() + (0 if lost is None else lost.double())
        return end - start.double()

    exact, kept = moved(torch.float32), moved(torch.bfloat16)
    assert (kept != 0)[exact != 0].double().mean() > 0.98
    assert 0.98 < (kept @ exact) / (exact @ exact) < 1.02


def test_second_moment_of_bfloat16_follows_a_gradient_that_shrinks():
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))])
    optimizer = common.make_optimizer(model, common.Config())
    for scale in [1.0] * 200 + [0.1] * 200:
        model[0].grad = torch.full((64,), scale, dtype=torch.bfloat16)
        optimizer.step()
    second_moment = optimizer.state[model[0]]["exp_avg_sq"].float().mean().item()
    assert second_moment == pytest.approx(0.01, rel=0.1)


def test_memory_table_of_the_7b_says_what_fits_and_what_to_change(monkeypatch):
    import memory

    config = common.Config(model="qwen2.5-7b-shape")
    parts = memory.parts(config)
    assert parts["parameters"] == 7_615_616_512
    assert parts["weights"] == 2 * parts["parameters"]
    assert parts["optimizer"] == 3 * parts["weights"]  # two moments and the Kahan buffer
    assert parts["KV cache"] == 128 * (3072 + 512) * 56 * 1024
    assert "141 GB card: fits" in memory.table(config)
    assert memory.parts(common.Config(model="qwen2.5-7b-shape", kl_coef=0))["reference"] == 0
    many = common.Config(model="qwen2.5-7b-shape", generation_rows=512, tasks=64)
    assert "141 GB card: with --generation_rows a quarter" in memory.table(many)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "80 GB card: fits" in memory.table(config)
    assert memory.parts(config)["weights"] == parts["weights"] / 2
