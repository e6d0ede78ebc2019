"""Kinds with numbers: word problems and unit conversions."""

from __future__ import annotations

from random import Random

from kinds.common import NAMES, PEOPLE, Conversation, Exchange, cycle_distinct, single

ITEMS = ["pears", "marbles", "shells", "pencils", "buttons", "plums", "stamps", "muffins", "beads", "cards"]
SHOP = ["notebook", "kite", "lamp", "puzzle", "mug", "cap", "basket", "lantern"]
ENDINGS = ["The answer is {}.", "Answer: {}.", "So the answer is {}."]


def _ending(rng: Random, result: int) -> str:
    return rng.choice(ENDINGS).format(result)


def _two_days(rng: Random) -> Exchange:
    name, she, _ = rng.choice(PEOPLE)
    item, a, b = rng.choice(ITEMS), rng.randint(5, 40), rng.randint(5, 40)
    prompt = f"{name} collects {a} {item} on Monday and {b} more on Tuesday. How many {item} does {she} have in all?"
    return prompt, f"{name} has {a} + {b} = {a + b} {item}. {_ending(rng, a + b)}"


def _boxes_less(rng: Random) -> Exchange:
    name = rng.choice(NAMES)
    item, a, b = rng.choice(ITEMS), rng.randint(3, 9), rng.randint(4, 9)
    c = rng.randint(2, a * b - 2)
    prompt = f"{name} has {a} boxes with {b} {item} in each and gives away {c}. How many {item} are left?"
    return (
        prompt,
        f"At first: {a} * {b} = {a * b}. Then {a * b} - {c} = {a * b - c} are left. {_ending(rng, a * b - c)}",
    )


def _share(rng: Random) -> Exchange:
    a, each = rng.randint(3, 9), rng.randint(3, 12)
    item = rng.choice(ITEMS)
    prompt = f"{a} children share {a * each} {item} equally. How many {item} does each child get?"
    return prompt, f"Each child gets {a * each} / {a} = {each} {item}. {_ending(rng, each)}"


def _change(rng: Random) -> Exchange:
    name, she, _ = rng.choice(PEOPLE)
    thing, price, left = rng.choice(SHOP), rng.randint(3, 17), rng.randint(2, 20)
    prompt = (
        f"A {thing} costs {price} dollars. {name} pays with {price + left} dollars. How much change does {she} get?"
    )
    return prompt, f"The change is {price + left} - {price} = {left} dollars. {_ending(rng, left)}"


def _pages(rng: Random) -> Exchange:
    name = rng.choice(NAMES)
    a, days, more = rng.randint(6, 20), rng.randint(3, 7), rng.randint(5, 40)
    read = a * days
    prompt = f"{name} reads {a} pages a day of a {read + more}-page book. How many pages remain after {days} days?"
    return (
        prompt,
        f"{name} reads {a} * {days} = {read} pages, so {read + more} - {read} = {more} remain. Answer: {more}.",
    )


def _bus(rng: Random) -> Exchange:
    a, off, on = rng.randint(18, 45), rng.randint(3, 15), rng.randint(3, 15)
    vehicle = rng.choice(["bus", "tram", "ferry"])
    prompt = f"A {vehicle} carries {a} people. At a stop {off} get off and {on} get on. How many people are on it now?"
    return prompt, f"{a} - {off} = {a - off} and {a - off} + {on} = {a - off + on}. {_ending(rng, a - off + on)}"


def _rows(rng: Random) -> Exchange:
    a, b, c = rng.randint(4, 12), rng.randint(5, 11), rng.randint(3, 9)
    place = rng.choice(["hall", "tent", "classroom", "theatre"])
    prompt = f"A {place} has {a} rows of {b} chairs, and {c} more chairs at the back. How many chairs are there?"
    return (
        prompt,
        f"The rows hold {a} * {b} = {a * b}. With the rest, {a * b} + {c} = {a * b + c}. Answer: {a * b + c}.",
    )


def _ages(rng: Random) -> Exchange:
    (name, _, her), (other, _, _) = rng.sample(PEOPLE, 2)
    a, b, later = rng.randint(6, 13), rng.randint(2, 9), rng.randint(2, 6)
    prompt = f"{name} is {a}, and {her} cousin {other} is {b} years older. How old will {other} be in {later} years?"
    return (
        prompt,
        f"{other} is {a} + {b} = {a + b} now. Then {a + b} + {later} = {a + b + later}. Answer: {a + b + later}.",
    )


def _half(rng: Random) -> Exchange:
    name, she, her = rng.choice(PEOPLE)
    item, half, lost = rng.choice(ITEMS), rng.randint(8, 30), rng.randint(2, 6)
    prompt = (
        f"{name} gives half of {her} {2 * half} {item} to a friend and then loses {lost}. How many does {she} keep?"
    )
    return prompt, f"{2 * half} / 2 = {half}, then {half} - {lost} = {half - lost}. {_ending(rng, half - lost)}"


def _several_prices(rng: Random) -> Exchange:
    name, she, _ = rng.choice(PEOPLE)
    (one, two), a, b, n = rng.sample(SHOP, 2), rng.randint(2, 9), rng.randint(4, 15), rng.randint(2, 5)
    prompt = f"{name} buys {n} {one}s at {a} dollars each and a {two} for {b} dollars. How much does {she} spend?"
    return prompt, f"{n} * {a} = {n * a} dollars, and {n * a} + {b} = {n * a + b} dollars. {_ending(rng, n * a + b)}"


WORDINGS = [
    _two_days,
    _boxes_less,
    _share,
    _change,
    _pages,
    _bus,
    _rows,
    _ages,
    _half,
    _several_prices,
]


def _with_follow_up(rng: Random) -> Conversation:
    name, she, _ = rng.choice(PEOPLE)
    item, a, b, c = rng.choice(ITEMS), rng.randint(12, 30), rng.randint(3, 9), rng.randint(3, 9)
    return [
        (
            f"{name} finds {a} {item} and loses {b}. How many does {she} have?",
            f"{a} - {b} = {a - b}. The answer is {a - b}.",
        ),
        (
            f"Then {name} is given {c} {item}. How many now?",
            f"{a - b} + {c} = {a - b + c}. The answer is {a - b + c}.",
        ),
    ]


def word_problem(rng: Random, count: int) -> list[Conversation]:
    """Arithmetic word problems, two of them with a follow-up question."""
    return [_with_follow_up(rng) for _ in range(2)] + single(cycle_distinct(rng, count - 2, WORDINGS))


# Larger unit, its plural, smaller units per larger unit, smaller plural.
UNITS = [
    ("kilometre", "kilometres", 1000, "metres"),
    ("metre", "metres", 100, "centimetres"),
    ("kilogram", "kilograms", 1000, "grams"),
    ("litre", "litres", 1000, "millilitres"),
    ("centimetre", "centimetres", 10, "millimetres"),
    ("hour", "hours", 60, "minutes"),
    ("minute", "minutes", 60, "seconds"),
    ("week", "weeks", 7, "days"),
    ("day", "days", 24, "hours"),
    ("foot", "feet", 12, "inches"),
    ("yard", "yards", 3, "feet"),
    ("pound", "pounds", 16, "ounces"),
    ("gallon", "gallons", 8, "pints"),
]
CONVERSION_PROMPTS = [
    "Please convert {n} {big} to {small} for me.",
    "How many {small} are there in {n} {big}?",
    "Express a quantity of {n} {big} in {small}.",
    "Change {n} {big} into {small}, please.",
]
CONVERSION_REPLIES = [
    "1 {one} is {factor} {small}, so {n} {big} are {result} {small}.",
    "{n} {big} equal {result} {small}, since each {one} has {factor} {small}.",
    "Multiply by {factor} {small} per {one}: {n} {big} make {result} {small}.",
]


def _conversion(rng: Random, unit: tuple[str, str, int, str], n: int) -> Exchange:
    one, big, factor, small = unit
    prompt = rng.choice(CONVERSION_PROMPTS).format(n=n, big=big, small=small)
    reply = rng.choice(CONVERSION_REPLIES)
    return prompt, reply.format(n=n, one=one, big=big, small=small, factor=factor, result=n * factor)


def unit_conversion(rng: Random, count: int) -> list[Conversation]:
    """Convert a whole number of a unit into a smaller one."""
    pairs = [(unit, n) for unit in UNITS for n in range(2, 13)]
    return [[_conversion(rng, unit, n)] for unit, n in rng.sample(pairs, count)]
