"""The WebShop engine: search, pages, reward, goals, broken data, the recorded sessions."""

import dataclasses
import itertools
import json
import lzma
import math
import os
import random
import re
import tarfile
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import spacy
from conftest import SHARED

import envs
from config import UserError
from worlds import shop, webshop

DATA = Path(__file__).parent / "data"


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
            "instruction": "i want shirt X.",
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
def session(folder):
    """A session for "B000000001 in red, size l", on its search page."""
    env = envs.make_env("webshop", f"{folder}/B000000001/1")
    env.reset()
    return env


def play(env, *actions):
    for action in actions:
        result = env.step(action)
    return result


# --- Search ---------------------------------------------------------------------------------------


def test_analysis_is_lucenes():
    text = "The dogs' O'Neil's size:s 3.5-inch 1,000 snow_white ponies ❤️★™ technology"
    terms = "dog o'neil size: 3.5 inch 1,000 snow_whit poni ❤️ ★ ™ technolog"
    assert webshop.analyze(text) == terms.split()
    stop = "a an and are as at be but by for if in into is it no not of on or such that the their "
    stop += "then there these they this to was will with"
    assert webshop.analyze(stop) == [] and len(webshop.STOP_WORDS) == 33
    assert [len(term) for term in webshop.analyze("x" * 600)] == [255, 255, 90]


def test_document_lengths_keep_four_bits_as_in_lucenes_index():
    kept = [*range(24), *(24 + (m << shift) for shift in range(20) for m in range(16))]
    for n in range(5000):
        assert webshop.stored_length(n) == max(k for k in kept if k <= n)


def test_search_is_bm25_by_its_formula_and_ties_go_by_id(tmp_path):
    rng = random.Random(0)
    words = "red blue wool cotton shirt lamp kettle sock mug rug".split()
    texts = [rng.choices(words, range(1, 11), k=rng.choice([0, 3, 9, 60, 150])) for _ in range(300)]
    texts += texts[:30]
    ids = rng.sample(range(1000), len(texts))
    webshop.Index.build(map(" ".join, texts), list(map(str, ids)), tmp_path)
    index = webshop.Index(tmp_path)
    assert index.weights.dtype == np.float32  # so that ties are ties
    mean = sum(map(len, texts)) / len(texts)
    having = Counter(word for text in texts for word in set(text))

    def score(text, query):
        total = 0.0
        for word in query:
            n = having[word]
            idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
            length = webshop.stored_length(len(text)) / mean
            f = text.count(word)
            total += idf * f / (f + 0.9 * (1 - 0.4 + 0.4 * length))
        return round(total, 5)

    for query in ("red", "red blue", "red red blue", "shirt unknown the mug", "unknown", ""):
        scores = [score(text, query.split()) for text in texts]
        best = sorted((-s, str(ids[at]), at) for at, s in enumerate(scores) if s)
        for k in (7, 1000):
            assert index.search(query, k) == [at for _, _, at in best[:k]]
        assert index.search(query) == [at for _, _, at in best[:50]]


def test_what_is_searched_is_the_title_the_description_the_first_bullet_and_the_options():
    product = webshop.read_product(RAW, {}, [])
    assert webshop.document(product) == (
        "red cotton shirt about the red cotton shirt. soft color: red, blue | navy, and size: s, l"
    )
    assert webshop.document(product | {"bullets": [], "options": {}, "description": ""}) == (
        "red cotton shirt   "
    )


def test_the_back_doors_of_a_search(folder):
    catalogue = webshop.load_catalogue(folder)
    n = len(catalogue.ids)
    assert catalogue.search(["<r>", "1", "", "x"]) == random.Random(b"1  x").sample(range(n), n)
    assert catalogue.search(["<c>", "kitchen"]) == [catalogue.number["B000000004"]]
    assert catalogue.search(["<q>", "", "shirts", ""]) == [0, 2]
    assert catalogue.search(["shirts"]) == [2, 0]
    assert catalogue.search(["<a>", "lamp"]) == [] and len(catalogue.search(["lamp"])) == 25
    catalogue.ids = ["x"] * 99
    assert len(catalogue.search(["<r>"])) == 50


# --- Catalogue and goals --------------------------------------------------------------------------

RAW = PRODUCTS[0]
SAID = {"attributes": ["a"], "instruction": "Find", "instruction_attributes": ["b"]}


def test_what_is_read_of_a_product():
    human = HUMAN["B000000001"]
    assert webshop.read_product(RAW | {"query": " Red Shirts "}, SAID, human) == {
        "asin": "B000000001",
        "title": "Red cotton shirt",
        "description": "About the Red cotton shirt.",
        "bullets": ["soft", "warm & light"],
        "prices": [12.5],
        "price_tag": "$12.5",
        "options": {"color": ["red", "blue | navy"], "size": ["s", "l"]},
        "category": "fashion",
        "query": "red shirts",
        "product_category": "Clothing › Shirts › Tops",
        "human": [["i want shirt X.", ["long sleeve"], ["red"]]],
        **SAID,
    }
    assert webshop.read_product({"asin": "B"}, {}, []) == {
        **dict.fromkeys(("title", "description", "category", "query", "product_category"), ""),
        **{"asin": "B", "bullets": [], "prices": [100.0], "price_tag": "$100.0", "options": {}},
        **{"attributes": ["DUMMY_ATTR"], "instruction": None, "instruction_attributes": []},
        "human": [],
    }
    values = [{"value": " 3/4 In "}, {"value": 5}]
    odd = RAW | {"small_description": "one text", "pricing": "$1,005.50 to $2.", "name": None}
    odd = webshop.read_product(odd | {"customization_options": {"A": None, "B": values}}, {}, [])
    assert odd["options"] == {"b": ["3 | 4 in", "5"]} and odd["bullets"] == ["one text"]
    assert odd["prices"] == [1005.5, 2.0] and odd["price_tag"] == "$1005.5 to $2.0"


def test_a_price_is_one_number_or_the_ends_of_a_range():
    for text in ("", "5", "$ $", "$."):
        assert webshop.read_prices(text) == [100.0]
    assert webshop.read_prices("$5") == webshop.read_prices("from 3 $5.0") == [5.0]
    assert webshop.read_prices("$.5. to $1,000.25 or $7") == [0.5, 1000.25]


def test_a_price_limit_is_one_of_the_second_to_fourth_multiples_of_ten_above_the_price():
    for price in (0, 9.99, 10, 10.01, 950, 969.99, 970, 979.99, 980, 990, 1e4):
        above = [m for m in range(10, 1000, 10) if m > price][:4]
        drawn = {webshop.price_limit(price, random.Random(seed)) for seed in range(99)}
        assert drawn == (set(above[1:]) or {None})


def test_prices_and_limits_are_drawn_in_the_originals_order():
    """All prices, then the limits of the synthetic goals; those of the human goals start anew."""
    prices = [[12.5], [5.0, 8.0], [985.0], [31.0], [2.0]]
    counts = [(4, 2), (None, 1), (1, 0), (0, 1), (2, 0)]
    rng = random.Random(0)
    drawn = [12.5, rng.uniform(5.0, 8.0), 985.0, 31.0, 2.0]
    again = random.Random()
    again.setstate(rng.getstate())

    def limit(first, rng):
        return max(rng.sample([first, first + 10.0, first + 20.0, first + 30.0], 2))

    limits = [limit(20.0, rng), None, None, limit(40.0, rng), limit(10.0, rng)]
    human = [[limit(20.0, again), limit(20.0, again)], [limit(10.0, again)], []]
    human += [[limit(40.0, again)], []]
    expected = {"prices": drawn, "limits": limits, "human_limits": human}
    assert webshop.draw_prices(prices, counts) == expected


def test_a_catalogue_is_what_its_files_say(folder):
    """The first of each id, without ids that are missing or too long."""
    catalogue = webshop.load_catalogue(folder)
    raws = {p["asin"]: p for p in reversed(PRODUCTS) if p["asin"] != "nan" and len(p["asin"]) == 10}
    assert catalogue.ids == sorted(raws)
    for number, asin in enumerate(catalogue.ids):
        said = INSTRUCTIONS.get(asin, {}), HUMAN.get(asin, [])
        assert catalogue.product(number) == webshop.read_product(raws[asin], *said)
        assert catalogue.number[asin] == number
    counts = [(4, 1), (1, 0), (1, 0), (None, 0), (None, 0)] + [(None, 0)] * 9 + [(1, 0)] * 16
    assert list(map(tuple, catalogue.counts)) == counts
    prices = [catalogue.product(i)["prices"] for i in range(len(counts))]
    drawn = webshop.draw_prices(prices, counts)
    kept = (catalogue.prices, catalogue.limits, catalogue.human_limits)
    assert kept == tuple(drawn.values())


def test_goals_are_all_ways_to_choose_and_what_people_wrote(folder):
    catalogue = webshop.load_catalogue(folder)
    names = catalogue.goal_names()
    asins = [catalogue.ids[i] for i in (0, 0, 0, 0, 1, 2, *range(14, 30))]
    ordered = [f"{a}/{i if a == asins[0] else 0}" for i, a in enumerate(asins)]
    random.Random(0).shuffle(ordered)
    assert names == ordered and catalogue.goal_names(human=True) == ["B000000001/human-0"]
    chosen = [{"color": c, "size": s} for c in ("red", "blue | navy") for s in ("s", "l")]
    assert [catalogue.goal(f"B000000001/{i}")["goal_options"] for i in range(4)] == chosen
    common = {
        "asin": "B000000001",
        "category": "fashion",
        "query": "shirts",
        "name": "Red cotton shirt",
        "product_category": "Clothing › Shirts › Tops",
        "attributes": ["long sleeve"],
    }
    limit = catalogue.limits[0]
    text = "Find me shirts with long sleeve with color: blue | navy, and size: s"
    assert catalogue.goal("B000000001/2") == common | {
        "instruction_text": f"{text}, and price lower than {limit:.2f} dollars",
        "price_upper": limit,
        "goal_options": {"color": "blue | navy", "size": "s"},
    }
    limit = catalogue.human_limits[0][0]
    assert catalogue.goal("B000000001/human-0") == common | {
        "instruction_text": f"i want shirt X, and price lower than {limit:.2f} dollars",
        "price_upper": limit,
        "goal_options": ["red"],
    }
    catalogue.limits[1] = None
    goal = catalogue.goal("B000000002/0")
    assert goal["instruction_text"] == "Find me shirts with long sleeve"
    assert goal["price_upper"] == 1000000 and goal["goal_options"] == {}


def test_the_name_of_a_split_says_whose_goals_and_whose_rule(folder):
    catalogue = webshop.load_catalogue(folder)
    for name, human, verl in itertools.product(("train", "test"), (False, True), (False, True)):
        split = name + ":human" * human + ":verl" * verl
        goals = catalogue.split(name, human, verl)
        if not goals:
            with pytest.raises(UserError, match="no goals in"):
                envs.list_items("webshop", split, folder)
            continue
        items = envs.list_items("webshop", split, folder)
        assert items == [f"{folder}/{goal}" for goal in goals]
        assert [webshop.item_name(item) for item in items] == goals
        kept = [webshop.identity(item, split) for item in items]
        assert kept == [goal if verl else goal.split("/")[0] for goal in goals]
        assert envs.make_env("webshop", items[0]).goal == catalogue.goal(goals[0])


def test_an_eighth_of_the_products_is_held_out_or_verls_first_five_hundred_goals(tmp_path):
    folder = shop.make_catalogue(tmp_path, 240, seed=0, difficulty=3)
    webshop.build_cache(folder, folder / "cache")
    catalogue = webshop.Catalogue(folder / "cache")
    names = catalogue.goal_names()
    assert len(names) == 240 * 27
    assert catalogue.split("test", verl=True) == names[:500]
    assert catalogue.split("train", verl=True) == names[500:]
    train, test = catalogue.split("train"), catalogue.split("test")
    held_out = {name.split("/")[0] for name in names} - {name.split("/")[0] for name in train}
    assert len(held_out) == 30 and train == [n for n in names if n.split("/")[0] not in held_out]
    assert test == [n for n in names if n.split("/")[0] in held_out][:500]
    assert held_out != set(sorted(catalogue.ids)[:30])  # they are drawn
    catalogue.counts = [(1, 0)] * 5 + [(None, 2)] * 235
    assert len(catalogue.split("test", verl=True)) == 2 and len(catalogue.split("test")) == 1
    assert len(catalogue.split("test", human=True)) == 2 * (235 // 8)


# --- Reward ---------------------------------------------------------------------------------------


def test_rewards_are_the_originals_in_its_recorded_purchases(monkeypatch):
    """160 made-up ones; in the recording too every word of a title is a noun."""
    blank = spacy.blank("en")
    monkeypatch.setattr(webshop, "tagger", lambda: blank)
    webshop.nouns.cache_clear()
    for case in json.loads((DATA / "webshop_reward_cases.json").read_text()):
        bought = case["product"], case["goal"], case["price"], case["chosen"]
        assert webshop.reward(*bought) == case["reward"], case
    product, goal = case["product"] | {"bullets": ["Very soft", "touch"]}, case["goal"]
    goal |= {"name": product["title"], "attributes": ["soft touch"], "goal_options": []}
    assert webshop.reward(product, goal, 0.0, {}) == 1.0  # it may run over two bullets
    webshop.nouns.cache_clear()


def test_the_kind_of_product_is_judged_by_query_category_and_common_nouns(monkeypatch):
    """r_type by its definition; nothing is wanted but a price."""
    monkeypatch.setattr(webshop, "nouns", lambda title: tuple(title.split()))
    goal = {"query": "q", "product_category": "A › B › C", "attributes": [], "goal_options": {}}
    categories = {"": 0, "C": 1, " B › X › B": 1, "B›A": 2, "C › B › A": 3}
    for wanted in range(21):
        goal["name"] = " ".join(map(str, range(wanted)))
        for common, category in itertools.product(range(wanted + 1), categories):
            title = " ".join(map(str, [*range(common), "x", "y"]))
            texts = {"title": title, "description": "", "bullets": [], "attributes": []}
            share = Fraction(common, wanted) if wanted else Fraction(1, 5)
            for query in "qp":
                product = {"query": query, "product_category": category, **texts}
                same = query == "q" or categories[category] >= 2 or share > Fraction(1, 5)
                expected = 1.0 if same else 0.5
                if share < Fraction(1, 10):
                    expected = 0.1 if common else 0.0
                for price in (9.99, 10.0, 10.01):
                    found = webshop.reward(product, goal | {"price_upper": 10.0}, price, {})
                    assert found == expected * (price <= 10), (goal, product, price)


def test_nouns_are_what_the_tagger_says(monkeypatch):
    words = {"Acme": "PROPN", "red": "ADJ", "Shirt": "NOUN", "5": "NUM"}

    def parse(title):
        return [SimpleNamespace(text=text, pos_=words[text]) for text in title.split()]

    parse.pipe_names = ["tagger"]
    monkeypatch.setattr(webshop, "tagger", lambda: parse)
    webshop.nouns.cache_clear()
    assert webshop.nouns("Acme red Shirt 5") == ("acme", "shirt")
    webshop.nouns.cache_clear()


def test_a_match_is_more_than_85_percent_rounded_of_two_texts():
    for common, other in itertools.product(range(1, 40), range(1, 40)):
        percent = round(100 * 2 * common / (2 * common + other))
        assert webshop.matches("a" * common + "b" * other, "a" * common) == (percent > 85)
    assert webshop.matches("Soft, (WARM) touch", "warm") and webshop.matches("caf\xe9", "caf")
    assert not webshop.matches("\xe9", "\xe9") and webshop.matches(("size", "l"), ("size", "l"))


def test_the_first_color_in_a_value_replaces_it():
    colors = {"standard": "tan", "dark red": "dark", "b12-rose gold": "gold", "xl": "xl"}
    for value, color in [*colors.items(), ("Red", "Red"), ("snow-white", "white")]:
        assert webshop.normalize_color(value) == color
    assert webshop.normalize_color(("color", "red")) == "red"
    assert webshop.normalize_color(("color", "black1901")) == ("color", "black1901")


# --- Pages and actions ----------------------------------------------------------------------------


def test_a_command_is_parsed_as_by_the_originals_regular_expression():
    for characters in itertools.chain(*(itertools.product("aB[]\n", repeat=n) for n in range(7))):
        action = "".join(characters)
        found = re.match(r"(.+)\[(.+)\]", action)
        expected = (found[1], found[2].lower()) if found else (action, "")
        assert webshop.parse_command(action) == expected


def test_pages_of_a_session(session):
    """Every page, what can be clicked there, and the end."""
    limit = session.goal["price_upper"]
    task = "Find me shirts with long sleeve with color: red, and size: l, and price lower than "
    task += f"{limit:.2f} dollars"
    results = "Page 1 (Total results: 2) | Next > | B000000001 | Red cotton shirt | $12.5 | "
    results += "B000000003 | Blue cotton shirts and a cotton shirt | $10.0"
    item = "< Prev | color | red | blue / navy | size | s | l | Red cotton shirt | Price: $12.5 | "
    item += "Rating: N.A. | Description | Features | Reviews | Buy Now"
    item_clicks = "< prev,description,features,reviews,buy now,red,blue / navy,s,l"
    lamps = [f"B0000001{i:02}" for i in range(25)]
    lamp_texts = [f"{asin} | Plain lamp {i} | $10.0" for i, asin in enumerate(lamps)]
    pages = {  # page number -> its text and its clicks
        n: (
            " | ".join([f"Page {n} (Total results: 25)", *turn, *lamp_texts[10 * n - 10 : 10 * n]]),
            ",".join([*turn, *lamps[10 * n - 10 : 10 * n]]).lower(),
        )
        for n, turn in ((1, ["Next >"]), *((n, ["< Prev", "Next >"]) for n in (2, 3, 4)))
    }
    about = "< Prev | About the Red cotton shirt."
    script = [  # action, the page after "Back to Search", what can be clicked but that
        ("search[red Cotton shirt]", results, "next >,b000000001,b000000003"),
        ("click[b000000001]", item, item_clicks),
        ("click[features]", "< Prev | soft | warm & light", "< prev"),
        ("click[< prev]", item, item_clicks),
        ("click[Description]", about, "< prev"),
        ("click[buy now]", about, "< prev"),  # is not here
        ("click[< prev]", item, item_clicks),
        ("click[reviews]", "< Prev", "< prev"),
        ("search[lamp] please", *pages[1]),
        ("click[next >]", *pages[2]),
        ("click[next >]", *pages[3]),
        ("click[next >]", *pages[4]),  # empty
        ("click[< prev]", *pages[3]),
        ("click[b000000124]", None, None),
        ("click[< prev]", *pages[3]),
        ("search[red cotton shirt]", results, "next >,b000000001,b000000003"),
        ("click[b000000001]", item, item_clicks),
        ("click[s]", item, item_clicks),
        ("click[red]", item, item_clicks),
        ("click[L]", item, item_clicks),
    ]
    start = session.reset()
    assert start.text == f"WebShop [SEP] Instruction: [SEP] {task} [SEP] Search"
    assert start.admissible == ("search[<your query>]", "click[search]")
    assert (start.task, start.task_type, start.world) == (task, "fashion", "webshop")
    for action, page, clicks in script:
        obs, *outcome = session.step(action)
        assert outcome == [0.0, False, {"score": 0.0, "success": False}]
        assert obs == dataclasses.replace(start, text=obs.text, admissible=obs.admissible)
        if page is not None:
            page = f"Instruction: | {task} | Back to Search | {page}"
            assert obs.text == page.replace(" | ", " [SEP] ").replace(" / ", " | "), action
            clicks = f"back to search,{clicks}".replace(" / ", " | ").split(",")
            assert obs.admissible == tuple(f"click[{name}]" for name in clicks), action
    obs, *outcome = session.step("click[buy now]")
    assert outcome == [1.0, True, {"score": 1.0, "success": True}] and obs.admissible == ()
    options = '{"color": "red", "size": "l"}'
    end = webshop.DONE_PAGE.format(asin="B000000001", options=options, score="1.0")
    assert obs.text == end and end.endswith("[SEP] 1.0 [SEP] Reward Details [SEP] None")
    for action in ("click[buy now]", "search[x]"):  # over is over
        again, *outcome_again = session.step(action)
        assert again == obs and outcome_again == outcome
    assert session.reset() == start and session.options == {}
    bare = webshop.WebShop(session.goal | {"category": ""}, session.catalogue)
    assert bare.reset().task_type == "all"


def test_a_purchase_is_of_what_was_chosen_last_and_leaving_a_product_forgets_it(session):
    play(session, "search[red cotton shirt]", "click[b000000001]", "click[red]", "click[l]")
    assert session.options == {"color": "red", "size": "l"}
    play(session, "click[features]", "click[< prev]", "click[s]")
    assert session.options == {"color": "red", "size": "s"}
    play(session, "click[< prev]")
    assert session.options == {} and session.kind == "results"
    play(session, "click[b000000001]", "click[blue | navy]", "click[back to search]")
    assert session.options == {} and session.kind == "search"
    play(session, "search[red cotton shirt]", "click[b000000003]")
    obs, *outcome = play(session, "click[buy now]")
    assert outcome == [0.0, True, {"score": 0.5, "success": False}]
    assert "asin [SEP] B000000003 [SEP] options [SEP] {} [SEP]" in obs.text
    assert "[SEP] 0.5 [SEP]" in obs.text
    session.reset()
    play(session, "search[red cotton shirt]", "click[b000000003]")
    session.options = {"b": "<z> & 'y'", "a": "é"}  # written as the original's template does
    text = play(session, "click[buy now]")[0].text
    assert r'{"a": "\u00e9", "b": "\u003cz\u003e \u0026 \u0027y\u0027"}' in text


def test_what_a_page_does_not_offer_changes_nothing(session):
    before = session.reset()
    elsewhere = "click[search],click[b000000001],click[buy now],click[],search[],search,[,]][,"
    for action in [*elsewhere.split(","), "hello", "Search[x]", " search[x]", "搜索[红色]"]:
        obs, reward, done, _ = session.step(action)
        assert (obs, reward, done) == (before, 0.0, False)


def test_unusual_searches_are_answered(session):
    unusual = [
        "x" * 10_000,
        "shirt " * 2_000,
        "红色 衬衫",
        "the of",
        "<r>",
        "<a> soft",
        "<c>",
        "!!!",
    ]
    for query in [*unusual, "\ud800", "<r> \ud800", "<c> \ud800"]:
        obs, _, done, _ = session.step(f"search[{query}]")
        assert "Page 1 (Total results: " in obs.text and not done


def test_prompt_quotes_the_page_and_falls_back_without_history(session):
    obs, *_ = play(session, "search[lamp]")
    prompt = envs.build_prompt(obs, [("seen", "did")], [("shopping", "compare prices")])
    assert f"Your task is to: {obs.task}." in prompt and "- When shopping: compare prices" in prompt
    assert "observe: 'Back to Search' [SEP] 'Page 1 (Total results: 25)'" in prompt
    assert "'click[b000000100]'" in prompt and "[Observation 1: 'seen', Action 1: 'did']" in prompt
    past = [("x" * webshop.LONGEST_PROMPT, "did")]
    for long in envs.build_prompts(obs, past, [("shopping", "compare prices")]):
        assert "Observation 1" not in long and "Steps taken so far: 1" in long


@pytest.mark.parametrize("piece", ["_", "y", "a'", "1,", "[", "]", " ", "❤️", "\ud800", "shirt "])
def test_a_step_is_linear_in_the_length_of_the_action(session, piece):
    """Underscores cost their number squared: eleven seconds at 16,000."""
    start = time.perf_counter()
    for action in (f"search[{piece * 10_000}]", piece * 10_000, f"click[{piece * 10_000}]"):
        session.step(action)
    assert time.perf_counter() - start < 2


# --- Damaged files --------------------------------------------------------------------------------

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


SAID_WRONG = [5, {"attributes": None}, {"attributes": "soft"}, {"instruction": 0}]


@pytest.mark.parametrize("said", [*SAID_WRONG, {"instruction_attributes": [5]}])
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


NO_GOALS = "B000000001/4 B000000001/human-1 B000000001/x B000000004/0 B000000001/-1 x/0"


@pytest.mark.parametrize("item", [*NO_GOALS.split(), "B000000001/human-"])
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


def test_files_that_kept_their_size_and_time_are_read_anew(tmp_path, folder):
    """As `cp -p` may leave them: the cache of the old ones was played."""
    (path,) = tmp_path.glob("items_shuffle*")
    before = path.stat()
    first = webshop.load_catalogue(folder)
    path.write_text(path.read_text().replace("cotton", "linen "))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    webshop.load_catalogue.cache_clear()
    again = webshop.load_catalogue(folder)
    assert again.product(0)["title"] == first.product(0)["title"].replace("cotton", "linen ")
    assert again.product(0)["title"] != first.product(0)["title"]


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
