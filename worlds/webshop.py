"""WebShop as a plain-Python engine: search, catalogue, goals, reward, pages. No Java, no torch.

    shop = open_item("/data/webshop/B09QQP3356/0")       # <folder>/<product>/<number of the goal>
    obs = shop.reset()                        # obs.text: the page, its parts joined by [SEP]
    obs, reward, done, info = shop.step("search[red shirt]")    # 1.0 where the score is 1.0

The original (github.com/princeton-nlp/WebShop) renders HTML, parses it back and searches with
Lucene. What an agent sees of that is five kinds of pages and a ranking by a formula. Both are
written out here and equal the original step by step (`tests/test_webshop.py`).

| file, with any suffix  | holds                                                                   |
|------------------------|-------------------------------------------------------------------------|
| `items_shuffle*.json`  | products: name, description, options, price, category                   |
| `items_ins_v2*.json`   | per product its attributes, maybe an instruction: the synthetic goals   |
| `items_human_ins.json` | per product the instructions written by people: the human goals         |

What the engine needs of these files is cached in `runs/webshop-cache/`. The full catalogue of 1.18
million products need not fit in memory: they are read from disk when a page shows them, and the
index is memory-mapped. worlds/README.md lists the deliberate differences from the original.
"""

import array
import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import time
import zlib
from collections import Counter
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

import numpy as np
import regex
from nltk.stem.porter import PorterStemmer
from rapidfuzz import fuzz
from rapidfuzz.utils import default_process

from config import UserError, read_json
from worlds import Observation

# What every world tells `envs.py` about itself (see worlds/README.md).
NAME = "online store WebShop"  # in the request for a skill
ROLE = "You are an agent shopping in the online store WebShop."  # starts every prompt
TASK_IN_FIRST_OBSERVATION = False  # a prompt shows pages without the instruction
FALLBACK_CHARS = 20  # of a response without an action, sent to the world
LONGEST_PROMPT = 13_000  # characters; a longer prompt is written without history
DATA = ""  # nobody but the user knows where the original's files are
EVAL_SPLIT = "test"  # what evaluate.py takes by default

SEED = 0  # of the prices given as a range and of the price limits
GOAL_SEED = 0  # of the one shuffle of the goals
RESULTS = 50  # of a search, at most
PER_PAGE = 10
CACHE = Path("runs/webshop-cache")
FORMAT = 4  # raise it when what is cached changes
ASIN = re.compile(r"[0-9A-Z]{1,10}")  # the id of a product
AGAIN = "delete it or download it again"  # an embedded one is then made again
STALE = 3600  # seconds after which the unfinished cache of another process counts as abandoned

# --- Search: Lucene's EnglishAnalyzer and BM25 ----------------------------------------------------

# A token by the Unicode word-break rules, as Lucene's StandardTokenizer keeps it: letters, digits
# and underscores run together; ' and . between letters and ' . , ; between digits do not break it.
LETTER = r"[\p{WB=ALetter}\p{WB=Hebrew_Letter}]\p{M}*"
DIGIT = r"\p{WB=Numeric}\p{M}*"
JOIN = r"\p{WB=ExtendNumLet}"
PICTURE = (  # Extended_Pictographic as it was up to Unicode 15, Lucene's
    r"(?![0-9#*])[\p{Emoji}\u2600-\u2605\u2607-\u2612\u2614-\u2685\u2690-\u2705"
    r"\u2708-\u2712\u2763-\u2767\u2388\U0001F000-\U0001FAFF]"
)
TOKEN = regex.compile(
    rf"(?<!{JOIN}){JOIN}*(?:{LETTER}|{DIGIT}|\p{{WB=Katakana}})"
    rf"(?:{LETTER}|{DIGIT}|{JOIN}|\p{{WB=Katakana}}"
    rf"|(?<={LETTER})[\p{{WB=MidLetter}}\p{{WB=MidNumLet}}'](?={LETTER})"
    rf"|(?<={DIGIT})[\p{{WB=MidNum}}\p{{WB=MidNumLet}}'](?={DIGIT}))*"
    r"|\p{Script=Han}|\p{Script=Hiragana}"
    rf"|{PICTURE}(?:\uFE0F|\p{{Emoji_Modifier}}|\u200D{PICTURE})*"
)
LONGEST = 255  # characters; Lucene cuts a longer one into pieces
STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then "
    "there these they this to was will with".split()
)
stemmer = PorterStemmer(mode="MARTIN_EXTENSIONS")  # Porter's own later version, which Lucene has


@lru_cache(maxsize=1 << 20)
def term_of(token: str):
    """A token -> its search term, or None for a stop word."""
    token = regex.sub(r"['’＇][sS]$", "", token).lower()
    if not token or token in STOP_WORDS:
        return None
    return stemmer.stem(token, to_lowercase=False)


def analyze(text: str) -> list:
    """Text -> search terms: "The dog's 3.5-inch RUNNING shoes" -> dog 3.5 inch run shoe."""
    pieces = (t[i : i + LONGEST] for t in TOKEN.findall(text) for i in range(0, len(t), LONGEST))
    return [term for term in map(term_of, pieces) if term]


K1 = np.float32(0.9)
B = np.float32(0.4)


def stored_length(n: int) -> int:
    """A document length as Lucene's index keeps it, in one byte: exact to 40, then four bits."""
    if n < 24:
        return n
    shift = max(0, (n - 24).bit_length() - 4)
    return 24 + ((n - 24) >> shift << shift)


class Index:
    """Postings of every term, as arrays: a query reads a few slices and adds them up.

    score(d) = sum over query terms of w - w / (1 + f / norm(d)),  w = idf * times in the query,
    idf = ln(1 + (N - n + 0.5) / (n + 0.5)),  norm(d) = k1 (1 - b + b length(d) / mean length),
    each in float32, and the sum rounded to float32, so even ties fall as in Lucene (by id).
    """

    def __init__(self, folder):
        names = ("starts", "docs", "weights", "rank")  # rank [N]: of each id among all ids, sorted
        arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in names)
        self.starts, self.docs, self.weights, self.rank = arrays
        terms = (folder / "terms.txt").read_text(encoding="utf-8").split("\n")
        self.terms = {term: number for number, term in enumerate(terms)}

    @staticmethod
    def build(documents, ids, folder):
        """Write the index of an iterable of texts. UserError where there is no word in them."""
        terms = {}  # term -> its number
        lengths = []
        columns = [array.array("i") for _ in range(3)]  # term, document, frequency
        for number, text in enumerate(documents):
            counts = Counter(analyze(text))
            lengths.append(counts.total())
            for word, times in counts.items():
                posting = (terms.setdefault(word, len(terms)), number, times)
                for column, value in zip(columns, posting, strict=True):
                    column.append(value)
        if not terms:
            raise UserError(f"{folder}: no product with a word in it; download the products again")
        term, doc, frequency = (np.frombuffer(c, np.int32) for c in columns)  # [postings] each
        mean = np.float32(sum(lengths) / max(1, len(lengths)))
        stored = np.array([stored_length(n) for n in lengths], np.float32)
        norm = np.float32(1) / (K1 * ((1 - B) + B * stored / mean))  # [N] 1 / norm(d)
        order = np.argsort(term, kind="stable")
        rank = np.argsort(np.argsort(ids)).astype(np.int32)
        starts = np.searchsorted(term[order], np.arange(len(terms) + 1))
        weights = frequency[order].astype(np.float32) * norm[doc[order]]  # [postings] f / norm(d)
        arrays = {"starts": starts, "docs": doc[order], "weights": weights, "rank": rank}
        for name, values in arrays.items():
            np.save(folder / f"{name}.npy", values)
        (folder / "terms.txt").write_text("\n".join(terms), encoding="utf-8")

    def search(self, query: str, k: int = RESULTS) -> list:
        """The numbers of the k best documents; a word given twice counts twice."""
        n_docs = len(self.rank)
        scores = np.zeros(n_docs)
        for term, times in Counter(analyze(query)).items():
            if term not in self.terms:
                continue
            i = self.terms[term]
            span = slice(self.starts[i], self.starts[i + 1])
            n = int(span.stop - span.start)
            idf = np.float32(np.log(1 + (n_docs - n + 0.5) / (n + 0.5)))
            weight = np.float32(times) * idf
            scores[self.docs[span]] += weight - weight / (np.float32(1) + self.weights[span])
        scores = scores.astype(np.float32)
        found = np.flatnonzero(scores)
        if len(found) > k:  # first cut to the k best and their ties, then sort those few
            found = found[scores[found] >= np.partition(scores[found], -k)[-k]]
        return found[np.lexsort((self.rank[found], -scores[found]))][:k].tolist()


# --- Catalogue and goals --------------------------------------------------------------------------


def find_file(folder, pattern) -> Path:
    found = sorted(path for path in Path(folder).glob(pattern) if os.access(path, os.R_OK))
    if not found:
        remedy = "put the original WebShop files there, or set WEBSHOP_DATA or --data"
        raise UserError(f"no readable {pattern} in {folder}: {remedy}")
    return found[0]


def stream_json(path, block=1 << 20):
    """The elements of a JSON array, one by one, read `block` characters at a time.

    UserError for anything else, or where the file breaks off.
    """
    decode = json.JSONDecoder().raw_decode
    space = re.compile(r"[\s,]*")
    with open(path, encoding="utf-8") as file:
        try:
            text = file.read(block)
            if text[:1] != "[":
                raise UserError(f"{path}: not a JSON array; {AGAIN}")
            at = 1
            while True:
                at = space.match(text, at).end()
                if text.startswith("]", at):
                    return
                try:
                    value, end = decode(text, at)
                except (ValueError, RecursionError):
                    end = len(text)
                if end < len(text):
                    yield value
                    at = end
                elif more := file.read(max(block, len(text) - at)):  # it may go on in there
                    text = text[at:] + more
                    at = 0
                else:
                    raise UserError(f"{path}: no JSON, or it ends in the middle; {AGAIN}")
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text; {AGAIN}") from None


def read_object(path) -> dict:
    """A JSON object. UserError for anything else."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: not a JSON object; {AGAIN}")
    return data


def read_product(raw: dict, attributes: dict, human: list) -> dict:
    """Its entries of items_shuffle, items_ins_v2, items_human_ins -> what of them is used."""
    bullets = raw.get("small_description") or []
    prices = read_prices(raw.get("pricing") or "")
    options = {}
    for name, contents in (raw.get("customization_options") or {}).items():
        if contents is not None:
            values = [str(content["value"]).strip() for content in contents]
            options[name.lower()] = [value.replace("/", " | ").lower() for value in values]
    fields = ("instruction", "instruction_attributes", "instruction_options")
    written = [[goal[f] for f in fields] for goal in human if goal["instruction_attributes"]]
    return {
        "asin": raw["asin"],
        "title": raw.get("name") or "",
        "description": raw.get("full_description") or "",
        "bullets": [str(b) for b in bullets] if isinstance(bullets, list) else [bullets],
        "prices": prices,
        "price_tag": "$" + " to $".join(map(str, prices)),
        "options": options,
        "category": raw.get("category") or "",
        "query": (raw.get("query") or "").lower().strip(),
        "product_category": raw.get("product_category") or "",
        "attributes": attributes.get("attributes", ["DUMMY_ATTR"]),
        "instruction": attributes.get("instruction"),
        "instruction_attributes": attributes.get("instruction_attributes") or [],
        "human": written,
    }


def check_product(product):
    """TypeError or ValueError for what a page, the search or the reward could not use later."""
    if not ASIN.fullmatch(product["asin"]):
        raise ValueError("its id is not made of 1 to 10 digits and capital letters")
    if not product["category"].isprintable():
        raise ValueError("its category is not printable")
    if not all(map(math.isfinite, product["prices"])):
        raise ValueError("its price is no number")
    texts = [product[name] for name in ("title", "description", "query", "product_category")]
    texts += product["options"]
    if product["instruction"] is not None:
        texts.append(product["instruction"])
    lists = [product[name] for name in ("bullets", "attributes", "instruction_attributes")]
    lists += product["options"].values()
    for instruction, attributes, options in product["human"]:
        texts.append(instruction)
        lists += [attributes, options]
    "".join(sum(lists, texts)).encode()  # an error for no list, no text or half a character


def read_prices(text: str) -> list:
    """Text as "$5 to $8" -> [5.0, 8.0]: one price, or the ends of a range; [100.0] for none."""
    digits = [re.sub(r"[^\d.]", "", part).rstrip(".") for part in text.split("$")[1:]]
    prices = [float(Decimal(number)) for number in digits if number]
    return prices[:2] or [100.0]


def document(product: dict) -> str:
    """The one field that is searched: not the other bullets, category, brand or price."""
    options = [f"{name}: {', '.join(values)}" for name, values in product["options"].items()]
    bullet = (product["bullets"] or [""])[0]
    parts = (product["title"], product["description"], bullet, ", and ".join(options))
    return " ".join(parts).lower()


def price_limit(price: float, rng):
    """The larger of two of the first four multiples of ten above the price; None above 980."""
    above = [10.0 * i for i in range(1, 100) if 10.0 * i > price][:4]
    return max(rng.sample(above, 2)) if len(above) >= 2 else None


def build_cache(folder, cache):
    """Write the folder `cache`, whole, from the files of `folder`; several processes may at once.

    UserError for a damaged file, with the number of the product.
    """
    shutil.rmtree(cache, ignore_errors=True)
    part = cache.with_name(f"{cache.name}.{os.urandom(4).hex()}.part")
    part.mkdir(parents=True)
    try:
        write_cache(folder, part)
        with contextlib.suppress(OSError):  # another process was faster
            part.rename(cache)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sources(folder) -> list[Path]:
    """The files of products, of attributes and, where there is one, of human goals."""
    human = sorted(Path(folder).glob("items_human_ins*.json"))
    patterns = ("items_shuffle*.json", "items_ins_v2*.json")
    return [find_file(folder, pattern) for pattern in patterns] + human[:1]


def write_cache(folder, part):
    """Into the empty folder `part`: products.jsonl with an offset for each product, the table of
    prices and limits, the index, and a checksum of each.
    """
    source, *others = sources(folder)
    attributes = read_object(others[0])
    human = read_object(others[1]) if others[1:] else {}  # human goals are optional
    offsets = [0]
    prices = {}  # id -> [price] or [lowest, highest]
    counts = []  # of each product: synthetic goals, None without an instruction, and human goals
    path = part / "products.jsonl"
    with open(path, "wb") as file:
        for number, raw in enumerate(stream_json(source), 1):
            try:
                asin = str(raw.get("asin") or "nan")
                if asin == "nan" or len(asin) > 10 or asin in prices:
                    continue
                product = read_product(raw, attributes.get(asin, {}), human.get(asin, []))
                check_product(product)
            except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{source}: product {number} is not in the original's format, here or in what "
                    f"the other files say of it ({error!r:.200}); delete or download them again"
                ) from None
            line = json.dumps(product).encode() + b"\n"
            file.write(line)
            offsets.append(offsets[-1] + len(line))
            prices[asin] = product["prices"]
            n_synthetic = None
            if product["instruction"] is not None:
                n_synthetic = math.prod(map(len, product["options"].values()))
            counts.append((n_synthetic, len(product["human"])))
    ids = list(prices)
    drawn = draw_prices(prices.values(), counts)
    table = {"ids": ids, **drawn, "counts": counts}
    (part / "table.json").write_text(json.dumps(table), encoding="utf-8")
    np.save(part / "offsets.npy", np.array(offsets))
    with open(path, "rb") as file:
        Index.build((document(json.loads(line)) for line in file), ids, part)
    (part / "checksums.json").write_text(json.dumps(checksums(part)), encoding="utf-8")


def checksums(cache) -> dict:
    """{file: CRC-32} of a cache, but for the file that holds them: half a second a gigabyte."""
    found = {}
    for path in cache.iterdir():
        if path.name != "checksums.json":
            content = np.memmap(path, mode="r") if path.stat().st_size else b""
            found[path.name] = zlib.crc32(content)
    return found


def is_intact(cache) -> bool:
    """Whether a cache is there, complete and as it was written."""
    try:
        recorded = (cache / "checksums.json").read_text(encoding="utf-8")
        return json.loads(recorded) == checksums(cache)
    except (OSError, ValueError):
        return False


def draw_prices(prices, counts) -> dict:
    """A price for each product and a limit for each goal, in the original's order of draws: all
    prices, then the limits, which start anew for the human goals.
    """
    rng = random.Random(SEED)
    drawn = [p[0] if len(p) == 1 else rng.uniform(*p) for p in prices]
    goals = list(zip(drawn, counts, strict=True))
    state = rng.getstate()
    limits = [None if n is None else price_limit(p, rng) for p, (n, _) in goals]
    rng.setstate(state)
    human_limits = [[price_limit(p, rng) for _ in range(n)] for p, (_, n) in goals]
    return {"prices": drawn, "limits": limits, "human_limits": human_limits}


class Catalogue:
    """Products by number, their drawn prices, the search index and the goals."""

    def __init__(self, cache):
        table = json.loads((cache / "table.json").read_text(encoding="utf-8"))
        self.ids = table["ids"]
        self.prices = table["prices"]
        self.limits = table["limits"]
        self.human_limits = table["human_limits"]
        self.counts = table["counts"]  # (synthetic goals or None, human goals)
        self.number = {asin: i for i, asin in enumerate(self.ids)}
        self.index = Index(cache)
        self.offsets = np.load(cache / "offsets.npy")
        self.lines = np.memmap(cache / "products.jsonl", mode="r")
        self.product = lru_cache(maxsize=4096)(self.read)

    def read(self, number: int) -> dict:
        start, end = self.offsets[number : number + 2]
        return json.loads(bytes(self.lines[start:end]))

    def search(self, words: list) -> list:
        """Numbers of the products for a query; <r> (any products), <c> and <q> as its first word
        are the original's back doors.
        """
        first, *rest = words
        rest = " ".join(rest).strip()
        if first == "<r>":
            count = len(self.ids)
            rng = random.Random(rest.encode(errors="replace"))  # half characters too
            return rng.sample(range(count), min(RESULTS, count))
        if first in ("<c>", "<q>"):
            name = "category" if first == "<c>" else "query"
            return [i for i in range(len(self.ids)) if self.read(i)[name] == rest]
        return [] if first == "<a>" else self.index.search(" ".join(words))

    def goal_names(self, human=False) -> list:
        """Every goal as "<asin>/<number>" ("<asin>/human-<number>"), shuffled once."""
        names = []
        for asin, (n_synthetic, n_human) in zip(self.ids, self.counts, strict=True):
            numbers = range(n_human if human else n_synthetic or 0)
            names += [f"{asin}/{'human-' * human}{i}" for i in numbers]
        random.Random(GOAL_SEED).shuffle(names)
        return names

    def split(self, name: str, human=False, verl=False) -> list[str]:
        """Goals of "train" or "test": an eighth of the products is held out, and up to 500 of their
        goals are the test. With `verl` the first 500 of all goals are, as in verl-agent.
        """
        names = self.goal_names(human)
        if verl:
            size = min(500, len(names) // 2)
            return names[:size] if name == "test" else names[size:]
        products = sorted({n.split("/")[0] for n in names})
        random.Random(GOAL_SEED).shuffle(products)
        held_out = set(products[: max(1, len(products) // 8)])
        if name == "test":
            return [n for n in names if n.split("/")[0] in held_out][:500]
        return [n for n in names if n.split("/")[0] not in held_out]

    def goal(self, name: str) -> dict:
        """A goal in the original's format. UserError for one that is not there."""
        asin, _, which = name.rpartition("/")
        if asin not in self.number:
            raise UserError(f"goal {name}: no product {asin} in this catalogue; list goals again")
        number = self.number[asin]
        product = self.product(number)
        human = which.startswith("human-")
        count = self.counts[number][human] or 0
        k = which.removeprefix("human-")
        if not k.isdecimal() or int(k) >= count:
            raise UserError(f"goal {name}: product {asin} has no such goal; list goals again")
        if human:
            text, attributes, options = product["human"][int(k)]
            text = text.strip(".")
            limit = self.human_limits[number][int(k)]
        else:
            text = product["instruction"]
            attributes = product["instruction_attributes"]
            names = sorted(product["options"])  # the k-th of all ways to choose
            choices = itertools.product(*(product["options"][name] for name in names))
            options = dict(zip(names, next(itertools.islice(choices, int(k), None)), strict=True))
            if options:
                text += " with " + ", and ".join(f"{k}: {v}" for k, v in options.items())
            limit = self.limits[number]
        if limit:
            text += f", and price lower than {limit:.2f} dollars"
        return {
            "asin": asin,
            "category": product["category"],
            "query": product["query"],
            "name": product["title"],
            "product_category": product["product_category"],
            "instruction_text": text,
            "attributes": attributes,
            "price_upper": limit or 1000000,
            "goal_options": options,
        }


@lru_cache(maxsize=4)
def load_catalogue(folder) -> Catalogue:
    """Open the cache of a data folder; a missing, damaged or outdated one is built first."""
    files = []
    for path in sources(folder):  # a clear error before anything else
        stat = path.stat()  # a copy may keep size and mtime, but not ctime
        files.append((str(path.resolve()), stat.st_size, stat.st_mtime, stat.st_ctime))
    key = json.dumps([FORMAT, SEED, files]).encode()
    cache = CACHE / hashlib.sha256(key).hexdigest()[:16]
    for part in CACHE.glob("*.part"):  # of a process that was killed while it built
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > STALE:
                shutil.rmtree(part)
    if not is_intact(cache):
        build_cache(folder, cache)
    tagger()  # spaCy takes a second to start: at the start, not at the first purchase
    return Catalogue(cache)


# --- Reward ---------------------------------------------------------------------------------------

COLORS = (  # in the original's order: the first one contained in a value replaces it
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown "
    "burgundy camel camo caramel champagne charcoal cheetah chestnut chocolate christmas coffee "
    "cognac copper coral cranberry cream crystal dark denim eggplant elephant espresso fuchsia "
    "gold granite grape graphite grass gray green grey heather indigo ivory ivy khaki lavender "
    "lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor "
    "mushroom mustard natural navy nude olive orange peach pewter pink plum purple rainbow red "
    "rose royal rust sand sapphire seashell silver skull slate steel stone stonewash sunflower "
    "tan taupe teal tiger turquoise violet walnut wheat white wine yellow"
).split()


def normalize_color(value):
    """The first color in a string ("standard" has "tan") or pair; `value` itself without one."""
    return next((color for color in COLORS if color in value), value)


@lru_cache(maxsize=1 << 16)
def matches(a, b) -> bool:
    """thefuzz.token_set_ratio(a, b) > 85, which drops Latin-1 characters and rounds."""
    a, b = (re.sub("[\x80-\xff]", "", str(x)) for x in (a, b))
    return round(fuzz.token_set_ratio(a, b, processor=default_process)) > 85


@lru_cache(maxsize=1)
def tagger():
    """spaCy's English model where it is installed, else its tokenizer alone."""
    import spacy

    try:
        return spacy.load("en_core_web_sm")
    except OSError:
        print("webshop: no spaCy model en_core_web_sm, so every word of a title is a noun; this")
        print("can change the partial score of a wrong product, hardly ever a success")
        return spacy.blank("en")


@lru_cache(maxsize=4096)
def nouns(title: str) -> tuple:
    """The nouns of a title in lower case; every word with a letter where there is no tagger."""
    parse = tagger()
    if parse.pipe_names:
        chosen = [token for token in parse(title) if token.pos_ in ("NOUN", "PROPN")]
    else:
        chosen = [token for token in parse(title) if any(map(str.isalpha, token.text))]
    return tuple(token.text.lower() for token in chosen)


def reward(product: dict, goal: dict, price: float, chosen: dict) -> float:
    """The original's score of a purchase, in [0, 1].

        r_type (attributes found + options found + price is right) / (all of these)

    r_type is 1 for the right kind of product: same query, two common levels of the category, or
    a fifth of the goal's nouns in the title; else 0.5; with hardly a common noun 0.1, with none 0.
    """
    wanted = nouns(goal["name"])
    common = set(nouns(product["title"])) & set(wanted)
    title_score = len(common) / len(wanted) if wanted else 0.2
    categories = (described["product_category"].split("›") for described in (product, goal))
    levels = set.intersection(*({level.strip() for level in category} for category in categories))
    same_kind = product["query"] == goal["query"] or len(levels) >= 2
    r_type = 1.0 if same_kind or title_score > 0.2 else 0.5
    if title_score < 0.1:
        r_type = 0.1 if title_score > 0 else 0.0

    texts = (product["title"], " ".join(product["bullets"]), product["description"])
    n_attributes = sum(
        any(matches(have, want) for have in product["attributes"])
        or any(want in text.lower() for text in texts)
        for want in goal["attributes"]
    )
    options = goal["goal_options"]
    if isinstance(options, dict):  # its items stay pairs, and are compared as such
        options = options.items()
    options = [normalize_color(option) for option in options]
    values = [normalize_color(value) for value in chosen.values()]
    n_options = sum(any(matches(value, want) for value in values) for want in options)
    right_price = price <= goal["price_upper"]
    total = n_attributes + n_options + right_price
    return total / (len(goal["attributes"]) + len(options) + 1) * r_type


# --- Pages and actions ----------------------------------------------------------------------------

BACK = "Back to Search"
PREV = "< Prev"
NEXT = "Next >"
BUY = "Buy Now"
SUBPAGES = ("Description", "Features", "Reviews")


def parse_command(action: str) -> tuple:
    """A text "verb[target]" -> (verb, target in lower case), as the original's `(.+)\\[(.+)\\]`.

    On the first line the target ends at the last "]" and begins at the last "[" that leaves it
    something. Linear in the length, which a regular expression with two greedy parts is not.
    """
    inside, _, _ = action.split("\n", 1)[0].rpartition("]")
    verb, _, _ = inside[:-1].rpartition("[")
    return (verb, inside[len(verb) + 1 :].lower()) if verb else (action, "")


class WebShop:
    """One shopping session for one goal, in the original's format.

    Pages: search -> results -> item -> its description, features or reviews; buying it ends.
    """

    def __init__(self, goal: dict, catalogue: Catalogue):
        self.goal = goal
        self.catalogue = catalogue

    def reset(self) -> Observation:
        """Start at the search page, always the same -> what the agent sees first."""
        self.done = False
        self.score = 0.0
        self.open_search()
        return self.observe()

    def step(self, action: str):
        """Take an action -> (Observation, reward, done, info); a page ignores what it lacks."""
        verb, target = parse_command(action)
        if verb == "search" and target and not self.done:  # with or without a search bar
            self.words = target.split(" ")
            self.number = 1  # of the page
            self.open_results()
        elif verb == "click" and target in self.clickables and target != "search":
            self.click(target)
        info = {"score": self.score, "success": self.score == 1.0}
        return self.observe(), float(self.score == 1.0), self.done, info

    def observe(self) -> Observation:
        admissible = [f"click[{name}]" for name in self.clickables]
        if self.kind == "search":
            admissible.insert(0, "search[<your query>]")
        task = self.goal["instruction_text"]
        category = self.goal["category"] or "all"
        return Observation(self.page, task, category, tuple(admissible), "webshop")

    def show(self, kind, parts, buttons, links=(), options=()):
        """Make a page of text parts, and of buttons, links and option values to click."""
        head = ["WebShop"] if kind == "search" else []
        head += ["Instruction:", self.goal["instruction_text"]]
        visible = [p.strip() for p in head + parts if p not in ("", "\n")]
        self.kind = kind
        if kind in ("search", "results"):  # no product is open
            self.asin = None
            self.options = {}
        self.page = " [SEP] ".join(visible)
        # what can be clicked -> the option's name for one of its values, else None
        self.clickables = dict.fromkeys(name.lower() for name in [*buttons, *links])
        self.clickables |= {value: name for name, values in options for value in values}

    def open_search(self):
        self.show("search", ["Search"], ["search"])

    def open_results(self):
        found = self.catalogue.search(self.words)
        first = (self.number - 1) * PER_PAGE
        products = [self.catalogue.product(i) for i in found[first : first + PER_PAGE]]
        turn = [PREV, NEXT] if self.number > 1 else [NEXT]
        parts = [BACK, f"Page {self.number} (Total results: {len(found)})", *turn]
        for p in products:
            parts += [p["asin"], p["title"], p["price_tag"]]
        self.show("results", parts, [BACK, *turn], [p["asin"] for p in products])

    def open_item(self):
        p = self.catalogue.product(self.catalogue.number[self.asin])
        parts = [BACK, PREV]
        for name, values in p["options"].items():
            parts += [name, *values]
        parts += [p["title"], f"Price: {p['price_tag']}", "Rating: N.A.", *SUBPAGES, BUY]
        self.show("item", parts, [BACK, PREV, *SUBPAGES, BUY], (), p["options"].items())

    def buy(self):
        number = self.catalogue.number[self.asin]
        product, price = self.catalogue.product(number), self.catalogue.prices[number]
        self.score = reward(product, self.goal, price, self.options)
        self.done = True
        chosen = json.dumps(self.options, sort_keys=True)
        for character in "<>&'":  # as the original's template writes it
            chosen = chosen.replace(character, f"\\u{ord(character):04x}")
        self.kind = "done"
        self.clickables = {}
        self.page = DONE_PAGE.format(asin=self.asin, options=chosen, score=self.score)

    def click(self, target):
        """Follow a button, else choose an option's value, else open a product."""
        if target == BUY.lower():
            self.buy()
        elif target == BACK.lower():
            self.open_search()
        elif self.kind == "results" and target in (PREV.lower(), NEXT.lower()):
            self.number += 1 if target == NEXT.lower() else -1
            self.open_results()
        elif target == PREV.lower():
            self.open_item() if self.kind == "subpage" else self.open_results()
        elif target.capitalize() in SUBPAGES:
            p = self.catalogue.product(self.catalogue.number[self.asin])
            texts = {"description": [p["description"]], "features": p["bullets"], "reviews": []}
            self.show("subpage", [BACK, PREV, *texts[target]], [BACK, PREV])
        elif self.clickables[target] is not None:
            self.options[self.clickables[target]] = target
            self.open_item()
        else:
            self.asin = target.upper()
            self.open_item()


DONE_PAGE = (
    "Thank you for shopping with us! [SEP] Your code: [SEP] None [SEP] (Paste it in your MTurk "
    "interface.) [SEP] Purchased [SEP] asin [SEP] {asin} [SEP] options [SEP] {options} [SEP] attrs "
    "[SEP] None [SEP] category [SEP] None [SEP] query [SEP] None [SEP] product category [SEP] None "
    "[SEP] Target [SEP] asin [SEP] options [SEP] attrs [SEP] price upper [SEP] instuction text "
    "[SEP] category [SEP] product category [SEP] query [SEP] Goal [SEP] None [SEP] Reward [SEP] "
    "Your score (min 0.0, max 1.0) [SEP] {score} [SEP] Reward Details [SEP] None"
)


# --- What envs.py calls ---------------------------------------------------------------------------


def open_item(item, engine: str = "fast") -> WebShop:
    """A session for "<data folder>/<asin>/<number>". UserError for a goal that is not there."""
    path = Path(item)
    catalogue = load_catalogue(path.parent.parent.resolve())
    return WebShop(catalogue.goal(f"{path.parent.name}/{path.name}"), catalogue)


def list_items(root, split: str, engine: str = "fast") -> list[str]:
    """The goals of "train" or "test", with ":human" those written by people, with ":verl" in the
    usual split (see `Catalogue.split`). UserError where there are none.
    """
    name, *rules = split.split(":")
    if name not in ("train", "test") or not set(rules) <= {"human", "verl"}:
        remedy = "choose train or test, and with it :human, :verl or both"
        raise UserError(f"--env webshop has no split {split}: {remedy}")
    catalogue = load_catalogue(Path(root).resolve())
    goals = catalogue.split(name, "human" in rules, "verl" in rules)
    if not goals:
        raise UserError(f"no goals in {root}: its files have no instructions of this kind")
    return [f"{root}/{goal}" for goal in goals]


def files(items) -> list[Path]:
    """The files behind the items."""
    return sources(Path(items[0]).parent.parent)


def item_name(item) -> str:
    """The goal, whatever the data folder."""
    return "/".join(item.rsplit("/", 2)[1:])


def identity(item, split: str) -> str:
    """What two splits must not share: the product, or in the usual split the goal."""
    return item_name(item) if "verl" in split.split(":") else Path(item).parts[-2]


def shown(text, task) -> str:
    """A page as a prompt shows it: its parts after the task, quoted."""
    parts = text.split(" [SEP] ")
    if task not in parts:
        return text
    return " [SEP] ".join(f"'{part}'" for part in parts[parts.index(task) + 1 :])
