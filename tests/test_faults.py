"""What may happen to a long run: short versions of `python -m tests.faults`."""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, as_rows

import envs
from common import open_groups, rollout, update
from config import UserError
from runtime import guard, saves
from runtime.policy import load_policy
from runtime.run import load_state, require_finite
from tests.faults import files, kills, runs
from worlds import household, shop


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The three phases unbroken -> (folder, {phase: (digest, seconds, file operations)})."""
    folder = runs.prepare(tmp_path_factory.mktemp("faults") / "whole")
    return folder, kills.unbroken(folder)


# --- kills ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_at_any_file_operation_ends_as_the_unbroken_one(whole):
    verdicts = kills.at_operations(*whole, count=1, first=0.6)
    assert [result for _, result in verdicts] == ["same"] * 3, verdicts


@pytest.mark.slow
def test_sigterm_saves_the_last_iteration_and_the_run_goes_on_to_the_same_end(whole):
    """Without a save on the way: what the signal does not save is lost."""
    folder, good = whole
    copy = kills.again(folder, "warmup")
    late = "--save_minutes 99"
    child = runs.start("warmup", copy, flags=late)
    log = copy / "runs" / "r" / "metrics.jsonl"
    while not (log.exists() and log.read_text()):
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    assert runs.wait(child) == 143, runs.said(copy)
    assert "SIGTERM: " in runs.said(copy)
    state = load_state(copy / "runs" / "r" / "warmup")
    assert state["iteration"] >= 1
    assert kills.verdict(copy, "warmup", good["warmup"][0]) == "same"


MADE = {  # what the project makes itself
    "shop": lambda: shop.make(Path("tiny-shop-3")),
    "household": lambda: household.make(Path("games"), {"train": 3}),
}


def content():
    paths = [path for path in Path().rglob("*") if path.is_file() and path.suffix != ".part"]
    return {path: path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", MADE)
def test_data_whose_making_was_killed_are_made_again(tmp_path, monkeypatch, name):
    """In the middle of each of its files."""
    monkeypatch.chdir(tmp_path)
    MADE[name]()
    whole = content()
    for last in range(1, len(whole) + 1):
        for path in whole:
            path.unlink()
        child = os.fork()
        if not child:
            write = Path.write_text
            left = iter(range(last, 0, -1))

            def write_half(path, text, encoding, write=write, left=left):
                if next(left) > 1:
                    return write(path, text, encoding=encoding)
                write(path, text[: len(text) // 2], encoding=encoding)
                os._exit(137)

            Path.write_text = write_half
            MADE[name]()
            os._exit(0)
        assert runs.wait(child) == 137
        MADE[name]()
        assert content() == whole


@pytest.mark.parametrize("damage", ["deleted", "emptied", "cut in half", "zeros at the end"])
@pytest.mark.parametrize("name", MADE)
def test_data_of_which_a_file_was_torn_are_made_again(tmp_path, monkeypatch, name, damage):
    """Half a game stayed for good, and of half a shop the advice was to download it again."""
    monkeypatch.chdir(tmp_path)
    MADE[name]()
    whole = content()
    for path in whole:
        left = files.damages(path.read_bytes())[damage]
        path.unlink()
        if left is not None:
            path.write_bytes(left)
        MADE[name]()
        if path.name != "traj_data.json":  # nothing here reads it
            assert content()[path] == whole[path]


# --- saves ----------------------------------------------------------------------------------------


@pytest.fixture
def two_saves(tmp_path):
    """A phase saved twice, each time its number."""
    for number in (1, 2):
        part = tmp_path / "mine.part"
        (part / "model").mkdir(parents=True)
        (part / "state.pt").write_bytes(bytes([number]) * 100)
        (part / "model" / "weights").write_bytes(bytes([number]) * 1000)
        saves.put(part, tmp_path / "mine")
    return tmp_path


def test_the_last_two_saves_are_kept(two_saves):
    assert saves.find(two_saves, "mine") == two_saves / "mine"
    assert (two_saves / "mine" / "state.pt").read_bytes()[0] == 2
    assert (two_saves / "mine.old" / "state.pt").read_bytes()[0] == 1
    assert not (two_saves / "mine.part").exists()


@pytest.mark.parametrize("damage", files.damages(b""))
@pytest.mark.parametrize("name", ["state.pt", "model/weights", "manifest.json"])
def test_a_damaged_save_is_named_and_the_one_before_is_used(two_saves, capsys, name, damage):
    path = two_saves / "mine" / name
    content = files.damages(path.read_bytes())[damage]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    found = saves.find(two_saves, "mine", set_aside=True)
    assert found == two_saves / "mine.old" and name in capsys.readouterr().out
    assert (two_saves / "mine.damaged").exists() and not (two_saves / "mine").exists()
    # the next save must not replace the good one by the damaged one
    part = two_saves / "mine.part"
    part.mkdir()
    (part / "state.pt").write_bytes(b"3")
    saves.put(part, two_saves / "mine")
    assert (two_saves / "mine.old" / "state.pt").read_bytes()[0] == 1


@pytest.mark.parametrize(
    "known, words",
    [
        ({}, "is damaged or of another version"),
        ({"phase": "mine", "files": {}}, "does not know model/weights"),
        ({"phase": "mine", "files": {"model/weights": None}}, "is damaged or"),
    ],
)
def test_a_manifest_that_does_not_know_every_file_switches_nothing_off(
    two_saves, capsys, known, words
):
    """With `{}` in it flipped weights were trained on."""
    (two_saves / "mine" / "manifest.json").write_text(json.dumps(known))
    assert saves.find(two_saves, "mine") == two_saves / "mine.old"
    assert f"mine/manifest.json {words}" in capsys.readouterr().out


def test_what_a_system_hides_in_a_folder_is_no_damage(two_saves):
    for name in (".DS_Store", ".nfs000123", ".ipynb_checkpoints/state.pt"):
        path = two_saves / "mine" / "model" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert saves.find(two_saves, "mine") == two_saves / "mine"
    (two_saves / "mine" / "model" / "more.safetensors").touch()  # would be loaded
    assert saves.find(two_saves, "mine") == two_saves / "mine.old"


def test_the_save_of_another_phase_is_refused_and_not_set_aside(two_saves):
    (two_saves / "mine").rename(two_saves / "distill")
    for phase in ("distill", "distill.old"):
        with pytest.raises(UserError, match=f"{phase} is a save of mine: give the folders back"):
            saves.find(two_saves, "distill", set_aside=True)
        if phase == "distill":
            (two_saves / "distill").rename(two_saves / "distill.old")
    assert saves.find(two_saves, "mine") == two_saves / "mine.old"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text", None])
def test_a_state_that_is_none_is_one_line(two_saves, content):
    path = two_saves / "mine" / "state.pt"
    path.write_bytes(content or b"")
    if content is None:
        torch.save({"iteration": 1}, path)
        assert load_state(path.parent, ["iteration"]) == {"iteration": 1}
    with pytest.raises(UserError, match="state.pt: damaged or of another version; delete .*mine, "):
        load_state(path.parent, ["iteration", "finished"])


def test_without_a_whole_save_the_remedy_is_named(two_saves):
    for name in ("mine", "mine.old"):
        (two_saves / name / "state.pt").write_bytes(b"")
    for _ in range(2):  # the second time must not begin anew without a word
        with pytest.raises(UserError, match="state.pt has 0 bytes.*no whole save of mine is left"):
            saves.find(two_saves, "mine", set_aside=True)


@pytest.mark.slow
def test_damaged_files_of_a_run_are_named_and_recovered_from(whole):
    some = [
        ("mine/skills.jsonl", "emptied"),
        ("warmup/config.json", "deleted"),
        ("metrics.jsonl", "cut in half"),
    ]
    for name, damage in some:
        assert files.try_case(whole[0], name, damage) == (True, "same"), (name, damage)


@pytest.mark.slow
def test_a_full_disk_ends_with_one_line_and_the_last_save_whole(whole):
    said = files.full_disk(whole[0])
    if not said:
        pytest.skip("no right to mount a small file system")
    assert said.startswith("exit code 2: error: ") and "ree some disk" in said


# --- numbers that are not finite ------------------------------------------------------------------


@pytest.fixture
def broken_rows(episodes):
    """Rows of a mini-batch whose loss is NaN."""
    rows = as_rows(episodes)
    rows[0].advantage = math.nan
    return rows


def weights_of(policy):
    return torch.cat([p.detach().flatten() for p in policy.model.parameters()]).clone()


def test_a_step_that_is_not_finite_moves_nothing_and_keeps_its_rows(
    broken_rows, trainer, config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config.minibatch_rows = 10_000
    start = weights_of(trainer)
    metrics = update(trainer, broken_rows, config, 0)
    assert metrics["refused_steps"] == 1 and metrics["optimizer_steps"] == 0
    assert torch.equal(weights_of(trainer), start)
    kept = torch.load(Path("runs") / config.run / "not-finite.pt", weights_only=True)
    assert len(kept["rows"]) == len(broken_rows) and math.isnan(kept["loss"])
    assert not trainer.steps


def test_good_steps_next_to_a_refused_one_are_taken(
    broken_rows, trainer, config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config.minibatch_rows = len(broken_rows) // 2
    metrics = update(trainer, broken_rows, config, 0)
    assert (metrics["refused_steps"], metrics["optimizer_steps"]) == (1, 1)
    assert trainer.steps == 1 and trainer.refused <= 1
    assert torch.isfinite(weights_of(trainer)).all() and math.isfinite(metrics["loss"])


def test_three_refused_steps_in_a_row_stop_the_run(
    broken_rows, trainer, config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    config.minibatch_rows = 10_000
    for _ in range(guard.MOST - 1):
        update(trainer, broken_rows, config, 0)
    with pytest.raises(UserError, match="3 steps in a row .* not finite"):
        update(trainer, broken_rows, config, 0)


def test_a_good_step_forgives_the_refused_ones_before_it(
    broken_rows, trainer, config, tmp_path, monkeypatch
):
    """Two bad steps today and one next week are not three in a row."""
    monkeypatch.chdir(tmp_path)
    config.minibatch_rows = 10_000
    good = [row for row in broken_rows if math.isfinite(row.advantage)]
    for _ in range(2):
        for _ in range(guard.MOST - 1):
            update(trainer, broken_rows, config, 0)
        update(trainer, good, config, 0)
        assert trainer.refused == 0


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    good = {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int64)}
    require_finite(good, tmp_path)
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match="b is not finite: not saved"):
            require_finite(good | {"b": torch.tensor([1.0, bad])}, tmp_path)


# --- worlds that fail -----------------------------------------------------------------------------


def broken_world(monkeypatch, bad_items, turn):
    """envs.make_env whose games of `bad_items` raise in their `turn`-th step; 0: when opened."""
    original = envs.make_env

    def make_env(name, item, engine="fast"):
        game = original(name, item, engine)
        step = game.step
        turns = []

        def failing(action):
            turns.append(action)
            if len(turns) == turn:
                raise RuntimeError("the world is gone")
            return step(action)

        if item in bad_items:
            if turn == 0:
                raise UserError("damaged game")
            game.step = failing
        return game

    monkeypatch.setattr(envs, "make_env", make_env)


@pytest.mark.parametrize("turn", [0, 1, 3])
def test_a_group_whose_world_raises_is_left_out_whole_and_named(
    policy, config, monkeypatch, capsys, turn
):
    items = envs.list_items("alfworld", "train", config.data)[:3]
    broken_world(monkeypatch, items[1:2], turn)
    groups = open_groups(items, config, members=2)
    episodes = rollout(policy, config, groups, seed=0)
    assert [e.item for e in episodes] == [items[0]] * 2 + [items[2]] * 2
    assert all(e.steps for e in episodes)
    reason = "damaged game" if turn == 0 else "the world is gone"
    assert f"{items[1]}: " in (said := capsys.readouterr().out) and reason in said


def test_when_most_worlds_fail_the_run_stops_with_the_reason(policy, config, monkeypatch):
    items = envs.list_items("alfworld", "train", config.data)[:3]
    broken_world(monkeypatch, items[:2], 1)
    groups = open_groups(items, config, members=2)
    with pytest.raises(UserError, match="2 of 3 groups could not be played.*the world is gone"):
        rollout(policy, config, groups, seed=0)


def test_a_run_goes_on_while_half_of_the_worlds_can_be_played(policy, config, monkeypatch):
    items = envs.list_items("alfworld", "train", config.data)[:2]
    broken_world(monkeypatch, items[:1], 1)
    groups = open_groups(items, config, members=2)
    assert len(rollout(policy, config, groups, seed=0)) == 2


# --- files that are not what they should be -------------------------------------------------------


def copy_of_policy(tmp_path):
    source = ROOT / "tiny" / "policy_household"
    return Path(shutil.copytree(source, tmp_path / "model"))


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path, config):
    """transformers makes up the layer that is missing, at random."""
    model = copy_of_policy(tmp_path)
    shape = json.loads((model / "config.json").read_text())
    shape["num_hidden_layers"] += 1
    shape.pop("layer_types", None)
    (model / "config.json").write_text(json.dumps(shape))
    with pytest.raises(UserError, match="weights do not fit its config.json"):
        load_policy(model, config, "cpu")


def test_a_tokenizer_with_more_tokens_than_the_weights_is_refused(tmp_path, config):
    model = copy_of_policy(tmp_path)
    _, tokenizer = load_policy("tiny-household", config, "cpu")
    tokenizer.add_tokens([f"<{n}>" for n in range(50)])
    tokenizer.save_pretrained(model)
    with pytest.raises(UserError, match="they are of two models"):
        load_policy(model, config, "cpu")
