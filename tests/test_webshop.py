"""The WebShop engine: search, pages, reward, goals, broken data, the recorded sessions."""

import json
import lzma
import math
import os
import tarfile
import time

import pytest
from conftest import SHARED

import envs
from config import UserError
from worlds import webshop


def product(asin, name, price="$10.0", options=None, **more):
    options = {k: [{"value": v} for v in values] for k, values in (options or {}).items()}
    return {
        "asin": asin,
        "name": name,
        "pricing": price,
        "customization_options": options or "",
        "full_description": f"About the {name}.",
        "small_description": ["soft", "warm & light"],
        "category": "fashion",
        "query": "shirts",
        "product_category": "Clothing › Shirts › Tops",
    } | more


PRODUCTS = [
    product(
        "B000000001",
        "Red cotton shirt",
        "$12.5",
        {"Color": ["Red", "Blue/Navy"], "size": ["S", "L"]},
    ),
    product(
        "B000000002", "Wool socks", "$5 to $8", query="socks", product_category="Clothing › Socks"
    ),
    product("B000000003", "Blue cotton shirts and a cotton shirt"),
    product(
        "B000000004", "Kettle", query="kettles", product_category="Kitchen", category="kitchen"
    ),
    product("B000000004", "the same id again"),
    product("nan", "no id"),
    {"asin": "B000000005"},  # neither price, options nor name
    *(product(f"B0000001{i:02}", f"Plain lamp {i}", query="lamps") for i in range(25)),
]
INSTRUCTIONS = {
    p["asin"]: {
        "attributes": ["long sleeve"],
        "instruction": "Find me shirts with long sleeve",
        "instruction_attributes": ["long sleeve"],
    }
    for p in PRODUCTS[:3] + PRODUCTS[-16:]
}
HUMAN = {
    "B000000001": [
        {
            "instruction": "i want a shirt.",
            "instruction_attributes": ["long sleeve"],
            "instruction_options": ["red"],
        },
        {"instruction": "no attributes", "instruction_attributes": [], "instruction_options": []},
    ]
}


def write_catalogue(folder, products=PRODUCTS):
    (folder / "items_shuffle_9.json").write_text(json.dumps(products, indent=1))
    (folder / "items_ins_v2_9.json").write_text(json.dumps(INSTRUCTIONS))
    (folder / "items_human_ins.json").write_text(json.dumps(HUMAN))
    return str(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(webshop, "CACHE", tmp_path / "cache")
    return write_catalogue(tmp_path)


@pytest.fixture
def shop(folder):
    """A session for "B000000001 in red, size l", on its search page."""
    env = envs.make_env("webshop", f"{folder}/B000000001/1")
    env.reset()
    return env


def play(env, *actions):
    for action in actions:
        result = env.step(action)
    return result


def test_analysis_is_lucenes():
    text = "The dogs' O'Neil's size:s 3.5-inch 1,000 snow_white ponies ❤️★™ technology"
    assert webshop.analyze(text) == [
        "dog",
        "o'neil",
        "size:",
        "3.5",
        "inch",
        "1,000",
        "snow_whit",
        "poni",
        "❤️",
        "★",
        "™",
        "technolog",
    ]


def test_document_lengths_are_rounded_as_in_lucenes_index():
    assert [webshop.stored_length(n) for n in (23, 39, 40, 41, 64, 343)] == [
        23,
        39,
        40,
        40,
        64,
        312,
    ]


def test_search_scores_are_bm25_and_ties_go_by_id(folder):
    catalogue = webshop.load_catalogue(folder)
    found = [catalogue.ids[i] for i in catalogue.search(["lamp"])]
    assert found == [f"B0000001{i:02}" for i in range(25)]  # the same score for all: by id
    # one word, two documents: the one with two occurrences first, by the formula
    found = [catalogue.ids[i] for i in catalogue.search(["cotton"])]
    assert found == ["B000000003", "B000000001"]
    texts = [
        webshop.analyze(webshop.document(catalogue.product(i))) for i in range(len(catalogue.ids))
    ]
    mean = sum(map(len, texts)) / len(texts)
    idf = math.log(1 + (len(texts) - 2 + 0.5) / 2.5)
    index, number = catalogue.index, catalogue.number["B000000003"]
    frequency = texts[number].count("cotton")
    norm = 0.9 * (0.6 + 0.4 * webshop.stored_length(len(texts[number])) / mean)
    expected = idf * frequency / (frequency + norm)
    term = index.terms["cotton"]
    at = list(index.docs[index.starts[term] : index.starts[term + 1]]).index(number)
    weight = index.weights[index.starts[term] + at]
    assert idf - idf / (1 + weight) == pytest.approx(expected, rel=1e-5)


def test_pages_of_a_session(shop):
    task = "Find me shirts with long sleeve with color: red, and size: l, and price lower than"
    obs = shop.reset()
    assert obs.text.startswith(f"WebShop [SEP] Instruction: [SEP] {task}")
    assert (
        obs.admissible == ("search[<your query>]", "click[search]") and obs.task_type == "fashion"
    )
    obs, *_ = play(shop, "search[red shirt]")
    assert (
        "Back to Search [SEP] Page 1 (Total results: 2) [SEP] Next > [SEP] B000000001" in obs.text
    )
    obs, *_ = play(shop, "click[b000000001]")
    item = obs.text
    assert (
        "Back to Search [SEP] < Prev [SEP] color [SEP] red [SEP] blue | navy [SEP] size [SEP] s"
        " [SEP] l [SEP] Red cotton shirt [SEP] Price: $12.5 [SEP] Rating: N.A. [SEP] Description"
        " [SEP] Features [SEP] Reviews [SEP] Buy Now"
    ) in item
    obs, *_ = play(shop, "click[features]")
    assert obs.text.endswith("< Prev [SEP] soft [SEP] warm & light")
    assert play(shop, "click[< prev]", "click[red]", "click[l]")[0].text == item
    obs, reward, done, info = play(shop, "click[buy now]")
    assert 'options [SEP] {"color": "red", "size": "l"}' in obs.text and obs.admissible == ()
    assert (reward, done, info) == (1.0, True, {"score": 1.0, "success": True})
    assert play(shop, "click[buy now]", "search[x]")[0].text == obs.text  # over is over


def test_results_turn_pages_and_going_back_clears_the_options(shop):
    obs, *_ = play(shop, "search[lamp]", "click[next >]", "click[next >]")
    assert "Page 3 (Total results: 25) [SEP] < Prev [SEP] Next > [SEP] B000000120" in obs.text
    assert "Page 4" in play(shop, "click[next >]")[0].text  # empty pages beyond the end
    assert "Page 3" in play(shop, "click[< prev]")[0].text
    play(shop, "search[shirt]", "click[b000000001]", "click[red]")
    assert shop.options == {"color": "red"}
    play(shop, "click[< prev]")
    assert shop.options == {} and shop.kind == "results"


@pytest.mark.parametrize(
    "action",
    [
        "hello",
        "click[search]",
        "click[b000000001]",
        "Search[x]",
        " search[x]",
        "search",
        "click[]",
        "搜索[红色]",
        "click[红色]",
        "[",
        "search[]",
        "",
        "click[buy now]",
        "]][",
    ],
)
def test_what_a_page_does_not_offer_changes_nothing(shop, action):
    before = shop.reset().text
    obs, reward, done, _ = shop.step(action)
    assert (obs.text, reward, done) == (before, 0.0, False)


def test_unusual_searches_are_answered(shop):
    for query in (
        "x" * 10_000,
        "shirt " * 2_000,
        "红色 衬衫",
        "the of",
        "<r>",
        "<a> soft",
        "<c>",
        "!!!",
    ):
        obs, _, done, _ = shop.step(f"search[{query}]")
        assert "Page 1 (Total results: " in obs.text and not done
    obs, *_ = shop.step("search[SHIRT] please")  # text after the bracket is ignored
    assert "B000000001" in obs.text


def test_reward_parts(folder):
    catalogue = webshop.load_catalogue(folder)
    goal = catalogue.goal("B000000001/0")  # red, s
    shirt, socks, kettle = (catalogue.product(i) for i in (0, 1, 3))

    def reward(bought, price, chosen):
        return webshop.reward(bought, goal, price, chosen)

    right = dict(shirt, attributes=["Long Sleeves"])  # fuzzy match
    assert reward(right, 12.5, {"color": "red", "size": "s"}) == 1.0
    assert reward(right, 1e6, {"color": "red", "size": "s"}) == 0.75  # over the price limit
    assert reward(right, 12.5, {"color": "red"}) == 0.75
    assert (
        reward(dict(shirt, attributes=[], title="red long sleeve"), 12.5, {}) == 0.5
    )  # in the title
    assert reward(kettle, 12.5, {}) == 0.0  # not one noun in common
    half = dict(kettle, title="shirt of a kind", attributes=["long sleeve"])
    assert reward(half, 12.5, {"color": "red", "size": "s"}) == 1.0  # a third of the nouns
    assert webshop.normalize_color("standard") == "tan" and socks["price_tag"] == "$5.0 to $8.0"
    assert webshop.normalize_color(("color", "black1901")) == ("color", "black1901")


def test_goals_split_by_product_and_verls_way(folder):
    sizes = {}
    for rule in ("", ":verl"):
        train, test = (envs.list_items("webshop", s + rule, folder) for s in ("train", "test"))
        sizes[rule] = len(train), len(test)
        names = [{webshop.identity(item, rule) for item in items} for items in (train, test)]
        assert not names[0] & names[1]
    assert sum(sizes[""]) == sum(sizes[":verl"]) == 4 + 1 + 1 + 16
    asins = [
        {item.split("/")[-2] for item in envs.list_items("webshop", s, folder)}
        for s in ("train", "test")
    ]
    assert not asins[0] & asins[1]
    (human,) = envs.list_items("webshop", "train:human:verl", folder)
    goal = envs.make_env("webshop", human).goal
    assert goal["instruction_text"].startswith("i want a shirt, and price lower than")
    assert goal["goal_options"] == ["red"] and goal["attributes"] == ["long sleeve"]


def test_prompt_quotes_the_page_and_falls_back_without_history(shop):
    obs, *_ = play(shop, "search[lamp]")
    prompt = envs.build_prompt(obs, [("seen", "did")], [("shopping", "compare prices")])
    assert f"Your task is to: {obs.task}." in prompt and "- When shopping: compare prices" in prompt
    assert "observe: 'Back to Search' [SEP] 'Page 1 (Total results: 25)'" in prompt
    assert "'click[b000000100]'" in prompt and "[Observation 1: 'seen', Action 1: 'did']" in prompt
    past = [("x" * webshop.LONGEST_PROMPT, "did")]
    for long in envs.build_prompts(obs, past, [("shopping", "compare prices")]):
        assert "Observation 1" not in long and "Steps taken so far: 1" in long


@pytest.mark.parametrize("piece", ["_", "y", "a'", "1,", "[", "]", " ", "❤️", "\ud800", "shirt "])
def test_a_step_is_linear_in_the_length_of_the_action(shop, piece):
    """Underscores cost their number squared: eleven seconds at 16,000."""
    start = time.perf_counter()
    for action in (f"search[{piece * 10_000}]", piece * 10_000, f"click[{piece * 10_000}]"):
        shop.step(action)
    assert time.perf_counter() - start < 2


def test_a_token_of_more_than_255_characters_is_cut_as_in_lucene():
    assert [len(term) for term in webshop.analyze("x" * 600)] == [255, 255, 90]


def test_half_a_character_in_a_search_is_answered(shop):
    for action in ("search[<r> \ud800]", "search[\ud800]", "search[<c> \ud800]"):
        assert "Total results" in shop.step(action)[0].text


WRONG = {  # what one product, or what the other file says of it, may not be
    "no object": 5,
    "a title that is a number": {"name": 5},
    "half a character": {"full_description": "\ud800"},
    "an id that no click finds": {"asin": "b0a"},
    "two decimal points": {"pricing": "$1.2.3"},
    "a price without end": {"pricing": "$" + "9" * 400},
    "options that are a list": {"customization_options": [1]},
    "a value without its name": {"customization_options": {"color": [{"x": 1}]}},
    "an escape sequence": {"category": "\x1b[31m"},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_product_is_named_when_the_shop_is_opened(name, tmp_path, monkeypatch):
    """Found only when a page shows it, it would end the rollout of all sessions."""
    monkeypatch.setattr(webshop, "CACHE", tmp_path / "cache")
    wrong = WRONG[name]
    if isinstance(wrong, dict):
        wrong = PRODUCTS[2] | wrong
    folder = write_catalogue(tmp_path, [*PRODUCTS[:2], wrong])
    with pytest.raises(UserError, match="items_shuffle_9.json: product 3 is not") as error:
        envs.list_items("webshop", "train", folder)
    assert str(error.value).isprintable() and not list(webshop.CACHE.iterdir())


@pytest.mark.parametrize(
    "said",
    [
        5,
        {"attributes": None},
        {"attributes": "soft"},
        {"instruction": 0},
        {"instruction_attributes": [5]},
    ],
)
def test_damaged_attributes_are_named_when_the_shop_is_opened(said, tmp_path, monkeypatch):
    monkeypatch.setattr(webshop, "CACHE", tmp_path / "cache")
    folder = write_catalogue(tmp_path)
    (tmp_path / "items_ins_v2_9.json").write_text(json.dumps({"B000000001": said}))
    with pytest.raises(UserError, match="product 1 is not in the original's format"):
        envs.list_items("webshop", "train", folder)
    for wrong in ("[]", '{"a": 1, {"b": 2}: 3}', '{"a": \xff}', "", '{"a": ' + "[" * 10_000):
        (tmp_path / "items_ins_v2_9.json").write_bytes(wrong.encode("latin-1"))
        with pytest.raises(UserError, match="items_ins_v2_9.json: "):
            envs.list_items("webshop", "train", folder)


def test_a_catalogue_without_a_product_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(webshop, "CACHE", tmp_path / "cache")
    for products in ([], [{"asin": "B000000005"}]):
        with pytest.raises(UserError, match="no product with a word"):
            envs.list_items("webshop", "train", write_catalogue(tmp_path, products))


@pytest.mark.parametrize(
    "item",
    [
        "B000000001/4",
        "B000000001/human-1",
        "B000000001/x",
        "B000000004/0",
        "B000000001/-1",
        "B000000001/human-",
        "x/0",
    ],
)
def test_a_goal_that_is_not_there_is_one_clear_error(folder, item):
    with pytest.raises(UserError, match="list goals again"):
        envs.make_env("webshop", f"{folder}/{item}")


@pytest.mark.parametrize("damage", ["cut", "flipped", "removed", "emptied"])
def test_a_damaged_cache_is_built_anew(folder, damage):
    """It was opened as it was: wrong prices, or an error in the middle of a rollout."""
    first = webshop.load_catalogue(folder)
    (cache,) = webshop.CACHE.iterdir()
    for path in sorted(cache.iterdir()):
        whole = path.read_bytes()
        flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
        path.unlink()
        if damage != "removed":
            changed = {"cut": whole[:-1], "flipped": flipped, "emptied": b""}
            path.write_bytes(changed[damage])
        webshop.load_catalogue.cache_clear()
        again = webshop.load_catalogue(folder)
        assert path.read_bytes() == whole and again.prices == first.prices


def test_unfinished_caches_of_killed_processes_are_removed_and_young_ones_left(folder):
    """133 of them were found; a young one may be another process at work."""
    parts = [webshop.CACHE / f"{name}.part" for name in ("old", "young")]
    for part in parts:
        part.mkdir(parents=True)
        (part / "products.jsonl").write_text("x")
    then = time.time() - webshop.STALE - 9
    os.utime(parts[0], (then, then))
    webshop.load_catalogue(folder)
    assert [part.exists() for part in parts] == [False, True]


def test_two_processes_may_build_the_same_cache(tmp_path, folder, monkeypatch):
    """The slower one found its folder removed by the faster."""
    whole = webshop.write_cache

    def write_and_be_late(source, part):
        whole(source, part)
        monkeypatch.setattr(webshop, "write_cache", whole)
        webshop.build_cache(source, tmp_path / "theirs" / "cache")

    monkeypatch.setattr(webshop, "write_cache", write_and_be_late)
    webshop.build_cache(folder, tmp_path / "theirs" / "cache")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["cache"]
    assert webshop.is_intact(tmp_path / "theirs" / "cache")


def test_broken_data_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(webshop, "CACHE", tmp_path / "cache")
    monkeypatch.delenv("WEBSHOP_DATA", raising=False)
    with pytest.raises(UserError, match="WEBSHOP_DATA"):
        envs.list_items("webshop", "train")
    with pytest.raises(UserError, match="no readable items_shuffle"):
        envs.list_items("webshop", "train", str(tmp_path))
    folder = write_catalogue(tmp_path)
    whole = (tmp_path / "items_shuffle_9.json").read_text()
    (tmp_path / "items_shuffle_9.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="ends in the middle"):
        envs.list_items("webshop", "train", folder)
    (tmp_path / "items_shuffle_9.json").write_text("hello")
    with pytest.raises(UserError, match="not a JSON array"):
        envs.list_items("webshop", "train", folder)
    (tmp_path / "items_shuffle_9.json").write_text(whole)
    with pytest.raises(UserError, match="choose train or test"):
        envs.list_items("webshop", "valid_seen", folder)
    with pytest.raises(UserError, match="no split train:x: choose train or test"):
        envs.list_items("webshop", "train:x", folder)
    with pytest.raises(UserError, match="no product B999999999"):
        envs.make_env("webshop", f"{folder}/B999999999/0")


def test_reading_in_small_blocks_gives_the_same_products(tmp_path):
    folder = tmp_path / "items_shuffle_9.json"
    folder.write_text(json.dumps(PRODUCTS, indent=1))
    for block in (5, 7):
        assert list(webshop.stream_json(folder, block)) == PRODUCTS


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
def test_equals_the_original_on_its_recorded_sessions(tmp_path, monkeypatch):
    """1,603 actions and 200 starts: observation, available actions, reward and end are the same."""
    monkeypatch.setattr(webshop, "CACHE", tmp_path / "cache")
    with tarfile.open(SHARED / "webshop_1000.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    with lzma.open(SHARED / "webshop_transcripts.json.xz") as file:
        sessions = json.load(file)
    catalogue = webshop.load_catalogue(str(tmp_path))
    names = catalogue.goal_names()
    steps = 0
    for session in sessions:
        goal = catalogue.goal(names[session["goal_index"]])
        del session["goal"]["weight"]  # of the original's draw; here goals are drawn uniformly
        assert goal == session["goal"]
        env = webshop.WebShop(session["goal"], catalogue)
        for expected in session["steps"]:
            if expected["action"] is None:
                obs = env.reset()
                done, score = False, 0.0
            else:
                obs, _, done, info = env.step(expected["action"])
                score = info["score"]
            steps += 1
            where = f"goal {session['goal_index']}: {expected['action']}"
            assert obs.text == expected["observation"], where
            if expected["available"] is not None:
                assert available(obs) == expected["available"], where
            assert (score, done) == (expected["reward"], expected["done"]), where
    assert steps == 1803


def available(obs) -> dict:
    """What a page offers, as the original says it."""
    clicks = [action[len("click[") : -1] for action in obs.admissible if action[:6] == "click["]
    return {"has_search_bar": "search[<your query>]" in obs.admissible, "clickables": clicks}
