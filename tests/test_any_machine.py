"""Any folder, locale, disk and terminal: all goes well there, or one line says why it does not."""

import shutil
from pathlib import Path

import pytest

import envs
from worlds import alfworld, shop, webshop

# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["removable disk", "Sliced", "pick_two-x", "söme gämes [1] *", "~"]
)
def test_a_data_folder_may_have_any_name(games, tmp_path, monkeypatch, name):
    folder = Path(shutil.copytree(games, tmp_path / name / "movable"))
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALFWORLD_DATA", str(folder))
    known = envs.list_items("alfworld", "train", games)
    for data in (str(folder), f"{folder}/", "link/../movable", "link", ""):
        items = envs.list_items("alfworld", "train", data)
        assert list(map(alfworld.item_name, items)) == list(map(alfworld.item_name, known))
        assert envs.make_env("alfworld", items[0]).reset().task_type == "look"


def test_a_catalogue_may_lie_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shop.make_catalogue(tmp_path / "a shop [1] é", products=20, seed=0)
    (tmp_path / "link").symlink_to("a shop [1] é")
    known = []
    for data in (tmp_path / "a shop [1] é", "a shop [1] é/", "./link"):
        items = envs.list_items("webshop", "test", data)
        known.append(list(map(webshop.item_name, items)))
        assert envs.make_env("webshop", items[0]).reset().task
    assert known[0] == known[1] == known[2] != []


def test_games_of_movable_receptacles_and_sliced_objects_are_left_out_by_their_own_names(tmp_path):
    tasks = ["pick-Mug", "pick_two_obj_and_place-AppleSliced-None", "pick_with_movable_recep-Cup"]
    for task in tasks:
        folder = tmp_path / "Sliced movable" / "json_2.1.1" / "train" / task / "trial_1"
        folder.mkdir(parents=True)
        (folder / "game.tw-pddl").touch()
    (item,) = alfworld.list_items(tmp_path / "Sliced movable", "train")
    assert alfworld.item_name(item) == "pick-Mug/trial_1"


def test_the_home_of_nobody_is_a_folder_without_games():
    assert envs.data_root("alfworld", "~/x") == Path.home() / "x"
    assert envs.data_root("alfworld", "~no-such-user/x") == Path("~no-such-user/x")
