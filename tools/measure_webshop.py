"""Time and memory of the WebShop engine on a catalogue of any size.

    python -m tools.measure_webshop --products 1180000     # the size of the full catalogue

Writes random products with texts and options of about the real lengths into a temporary folder,
builds the cache, opens it again and searches.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from runtime.run import run_script
from worlds import webshop


def write_products(folder, count):
    """Products of 110 searched words each, drawn from 50,000 words by Zipf's law -> the words in
    the order of their draws.
    """
    rng = random.Random(0)
    words = [f"w{n:x}" for n in range(50_000)]
    weights = [1 / (n + 10) for n in range(len(words))]
    pool = rng.choices(words, weights, k=2_000_000)

    def text(n):
        start = rng.randrange(len(pool) - n)
        return " ".join(pool[start : start + n])

    with open(folder / "items_shuffle.json", "w") as file:
        for i in range(count):
            product = {
                "asin": f"B{i:09}",
                "name": text(15),
                "full_description": text(60),
                "small_description": [text(20)] * 5,
                "pricing": f"${rng.randint(5, 90)}.99",
                "customization_options": {"color": [{"value": w} for w in text(8).split()]},
                "category": "fashion",
                "query": text(2),
                "product_category": "a › b › c",
            }
            file.write(("[" if i == 0 else ",\n") + json.dumps(product))
        file.write("]")
    (folder / "items_ins_v2.json").write_text("{}")
    return pool


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--products", type=int, default=100_000, help="size of the catalogue")
    count = parser.parse_args().products
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = folder / "cache"
        pool = write_products(folder, count)
        size = (folder / "items_shuffle.json").stat().st_size
        start = time.time()
        webshop.build_cache(folder, cache)
        built = time.time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        start = time.time()
        catalogue = webshop.Catalogue(cache)
        opened = time.time() - start
        queries = [" ".join(random.Random(i).sample(pool, 8)) for i in range(200)]
        start = time.time()
        for query in queries:
            catalogue.search(query.split(" "))
        search = (time.time() - start) / len(queries)
        disk = sum(p.stat().st_size for p in cache.iterdir())
    print(f"{count:,} products, {size / 1e9:.2f} GB of JSON, {disk / 1e9:.2f} GB of cache")
    print(f"built in {built:.0f} s, peak memory {peak:.1f} GB; opened in {opened:.1f} s")
    print(f"a search for 8 words takes {search * 1e3:.1f} ms")


if __name__ == "__main__":
    run_script(main)
