"""The embedded shop: a small catalogue in WebShop's format.

`runs/tiny-shop-3` has products with three options each, all named in its tasks, `-1` to `-5` make
it easier and harder, and `runs/tiny-shop` has those of a product's category, one or two. They are
made where they are missing.
"""

import json
import random
from pathlib import Path

from config import is_whole, write_atomically

OPTIONS = {
    "color": ["red", "blue", "green", "black", "white", "pink", "gray"],
    "size": ["small", "medium", "large"],
    "scent": ["lemon", "rose", "mint", "vanilla"],
    "flavor": ["apple", "cherry", "honey", "salt"],
    "pack": ["single", "double", "family"],
}
CATEGORIES = {  # category: levels above the product, options
    "fashion": ("Clothing › Basics", ["color", "size"]),
    "beauty": ("Beauty › Care", ["scent"]),
    "grocery": ("Grocery › Snacks", ["flavor", "pack"]),
    "garden": ("Home › Living", ["size", "color"]),
    "electronics": ("Electronics › Parts", ["color"]),
}
ATTRIBUTES = {
    "fashion": "soft warm slim loose light thick",
    "beauty": "gentle natural fresh mild creamy clear",
    "grocery": "sweet crunchy organic dark dry raw",
    "garden": "sturdy round flat tall modern wooden",
    "electronics": "fast slim wireless portable quiet bright",
}
PRODUCTS = {
    "fashion": "shirt jacket sock hat scarf glove",
    "beauty": "soap lotion shampoo cream mask balm",
    "grocery": "cookie cereal chip nut cracker candy",
    "garden": "chair table lamp shelf basket rug",
    "electronics": "cable charger speaker mouse keyboard radio",
}
BRANDS = "Arbo Belka Cando Delmar Evora Fenix Gilda Hanse Iris Jolin Kapro Lumo".split()


def make_catalogue(folder: Path, products: int, seed, difficulty=None) -> Path:
    """Write `products` random products with their instructions, in the original's format.

    difficulty   how many options every product has, all named in its tasks (1 to 5), so that as
                 many things must be right at once. None: those of its category, one or two
    """
    rng = random.Random(f"{seed} catalogue")
    items = []
    instructions = {}
    while len(items) < products:
        category = rng.choice(list(CATEGORIES))
        levels, options = CATEGORIES[category]
        noun = rng.choice(PRODUCTS[category].split())
        first, second = rng.sample(ATTRIBUTES[category].split(), 2)
        asin = (first[:3] + second[:3] + noun[:3]).upper()  # an id a small policy can spell
        if asin in instructions:
            continue
        price = rng.randint(5, 90)
        if difficulty:
            options = [*options, *(name for name in OPTIONS if name not in options)][:difficulty]
        values = {name: sorted(rng.sample(OPTIONS[name], 3)) for name in options}
        product = {
            "asin": asin,
            "name": f"{rng.choice(BRANDS)} {first} {second} {noun}",
            "full_description": f"A {first} {noun}.",
            "small_description": [f"{first} and {second}"],
            "pricing": f"${price}.0",
            "customization_options": {o: [{"value": v} for v in values[o]] for o in options},
            "category": category,
            "query": noun,
            "product_category": f"{levels} › {noun}",
        }
        items.append(product)
        instructions[asin] = {
            "attributes": [first, second],
            "instruction": f"Find me {first} {second} {noun}",
            "instruction_attributes": [first, second],
        }
    write_atomically(folder / "items_ins_v2.json", json.dumps(instructions))
    write_atomically(folder / "items_shuffle.json", json.dumps(items))
    return folder


def make(folder: Path) -> Path:
    """Write an embedded catalogue, once; the number at the end of its name is the difficulty."""
    files = [folder / name for name in ("items_ins_v2.json", "items_shuffle.json")]
    if not all(map(is_whole, files)):
        number = folder.name.removeprefix("tiny-shop").removeprefix("-")
        make_catalogue(folder, 240, seed=0, difficulty=int(number) if number else None)
    return folder
