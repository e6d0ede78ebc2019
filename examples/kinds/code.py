"""Kinds about code and data: Python functions, SQL queries and JSON extraction."""

from __future__ import annotations

import json
from random import Random
from textwrap import indent

from kinds.common import DAYS, NAMES, Conversation, Exchange, cycle_distinct, single

# The pool's functions: what each does, its signature, the expression it returns.
FUNCTIONS = [
    ("reverses the letters of a string", "reverse(text)", "text[::-1]"),
    ("checks whether a word is a palindrome", "is_palindrome(word)", "word == word[::-1]"),
    ("returns the last item of a list", "last(items)", "items[-1]"),
    ("joins words with dashes", "dashed(words)", '"-".join(words)'),
    ("removes duplicates from a list but keeps the order", "unique(items)", "list(dict.fromkeys(items))"),
    ("swaps the keys and values of a dict", "invert(mapping)", "{v: k for k, v in mapping.items()}"),
    ("returns the longest word in a list", "longest(words)", "max(words, key=len)"),
    ("counts the vowels in a string", "count_vowels(text)", 'sum(c in "aeiou" for c in text.lower())'),
    ("flattens a list of lists", "flatten(rows)", "[x for row in rows for x in row]"),
    ("checks whether two words are anagrams", "anagrams(a, b)", "sorted(a) == sorted(b)"),
    ("keeps only the strings that start with a prefix", "matching(names, p)", "[n for n in names if n.startswith(p)]"),
    ("turns a sentence into a list of lower-case words", "words(text)", "text.lower().split()"),
    ("drops empty strings from a list", "non_empty(items)", "[s for s in items if s]"),
    ("returns the keys of a dict in sorted order", "sorted_keys(d)", "sorted(d)"),
    ("merges two dicts, where the second wins", "merge(a, b)", "{**a, **b}"),
    ("returns the common items of two lists as a set", "common(a, b)", "set(a) & set(b)"),
    ("checks whether a string holds only letters", "only_letters(text)", "text.isalpha()"),
    ("removes all spaces from a string", "squeeze(text)", 'text.replace(" ", "")'),
    ("returns what follows the last dot of a name", "extension(name)", 'name.rsplit(".", 1)[1]'),
    ("pairs two lists into a dict", "to_dict(keys, values)", "dict(zip(keys, values))"),
    ("sorts names without regard to case", "sort_names(names)", "sorted(names, key=str.lower)"),
    ("returns the initials of a full name", "initials(name)", '"".join(p[0] for p in name.split())'),
    ("checks whether every item of a list is a string", "all_strings(xs)", "all(isinstance(x, str) for x in xs)"),
    ("looks up a key with a default value", "lookup(d, key, default)", "d.get(key, default)"),
    ("repeats a string with commas between", "repeat(text, n)", '",".join([text] * n)'),
    ("returns the index of an item in a list", "position(items, item)", "items.index(item)"),
    ("splits a line of CSV text into fields", "fields(line)", 'line.strip().split(",")'),
    ("returns the first word of a sentence", "first_word(text)", "text.split()[0]"),
    ("checks whether a list has duplicates", "has_duplicates(xs)", "len(set(xs)) < len(xs)"),
    ("maps each word to its length", "lengths(words)", "{w: len(w) for w in words}"),
    ("strips the newline from every line", "clean(lines)", '[line.rstrip("\\n") for line in lines]'),
    ("wraps text in an HTML tag", "wrap(tag, text)", 'f"<{tag}>{text}</{tag}>"'),
    ("greets a person by name", "greet(name)", 'f"Hello, {name}!"'),
    ("removes a key from a dict and returns a copy", "without(d, key)", "{k: v for k, v in d.items() if k != key}"),
    ("selects one field from a list of dicts", "pluck(rows, field)", "[row[field] for row in rows]"),
    ("tells whether a string is blank", "is_blank(text)", "not text.strip()"),
    ("capitalises every word in a title", "title_case(text)", '" ".join(w.capitalize() for w in text.split())'),
    ("replaces tabs by spaces", "untab(text)", 'text.replace("\\t", " ")'),
    ("returns the items of one list that are not in another", "difference(a, b)", "[x for x in a if x not in b]"),
    ("rotates a list by one place to the left", "rotate(items)", "items[1:] + items[:1]"),
    ("returns every second item of a list", "every_second(items)", "items[::2]"),
    ("counts how often a letter occurs", "occurrences(text, letter)", "text.count(letter)"),
    ("returns the type name of a value", "type_name(value)", "type(value).__name__"),
    ("checks whether a path ends in .txt", "is_text_file(path)", 'path.endswith(".txt")'),
    ("builds a slug from a title", "slug(title)", '"-".join(title.lower().split())'),
    ("numbers the lines of a text", "numbered(lines)", 'list(f"{i} {s}" for i, s in enumerate(lines))'),
    ("groups a list into neighbouring pairs", "pairs(items)", "list(zip(items, items[1:]))"),
    ("returns the shortest string, or None if there is none", "shortest(xs)", "min(xs, key=len, default=None)"),
    ("calls a function on every item", "apply(func, items)", "[func(x) for x in items]"),
    ("decodes bytes as UTF-8", "decode(data)", 'data.decode("utf-8")'),
]
PYTHON_PROMPTS = [
    "Write a Python function that {}.",
    "In Python, define a small function that {}.",
    "I need a short Python function which {}.",
    "Show me how to write a Python function that {}.",
]


def python_function(rng: Random, count: int) -> list[Conversation]:
    """The pool's one-line Python functions, each for a described task."""
    return single(
        [
            (rng.choice(PYTHON_PROMPTS).format(task), f"def {signature}:\n    return {expression}")
            for task, signature, expression in rng.sample(FUNCTIONS, count)
        ]
    )


# The target's functions: what each is to do, its signature, the lines of its body. None is in the pool.
TARGET_FUNCTIONS = [
    ("cut a list into chunks of n items", "chunks(xs, n)", "return [xs[i:i + n] for i in range(0, len(xs), n)]"),
    ("transpose a table given as rows", "transpose(rows)", "return [list(column) for column in zip(*rows)]"),
    ("hide all but the final four characters of a text", "mask(text)", 'return "*" * (len(text) - 4) + text[-4:]'),
    ("cut off long text and add dots", "shorten(text, n)", 'return text if len(text) <= n else text[:n] + "..."'),
    ("count the words of a text", "word_count(text)", "return len(text.split())"),
    ("find the most frequent item of a list", "most_frequent(items)", "return max(set(items), key=items.count)"),
    ("find the key that has the highest value in a dict", "best_key(scores)", "return max(scores, key=scores.get)"),
    ("take items from two lists by turns", "interleave(a, b)", "return [x for pair in zip(a, b) for x in pair]"),
    ("get the second largest number", "second_largest(numbers)", "return sorted(set(numbers))[-2]"),
    ("separate the head of a list from its tail", "head_and_tail(items)", "head, *tail = items\nreturn head, tail"),
    ("keep a value between two bounds", "clamp(value, low, high)", "return max(low, min(value, high))"),
    ("add up the digits of a number", "digit_sum(number)", "return sum(int(digit) for digit in str(number))"),
    ("test if a list is in rising order", "is_rising(xs)", "return all(a <= b for a, b in zip(xs, xs[1:]))"),
    (
        "delete punctuation from a string",
        "plain(text)",
        'return "".join(c for c in text if c.isalnum() or c.isspace())',
    ),
    (
        "group words under their first letter",
        "by_letter(words)",
        "groups = dict()\nfor w in words:\n    groups.setdefault(w[0], []).append(w)\nreturn groups",
    ),
    (
        "tally the items of a list in a dict",
        "tally(items)",
        "counts = dict()\nfor x in items:\n    counts[x] = counts.get(x, 0) + 1\nreturn counts",
    ),
    ("order a list of records by one column", "order_by(rows, col)", "return sorted(rows, key=lambda row: row[col])"),
    ("test if a number is prime", "is_prime(n)", "return n > 1 and all(n % d for d in range(2, n))"),
    ("show a whole number in binary", "binary(number)", 'return f"{number:b}"'),
    ("discard None values from a dict", "compact(d)", "return {k: v for k, v in d.items() if v is not None}"),
    (
        "skip comment lines of a file's text",
        "no_comments(text)",
        'return [s for s in text.splitlines() if not s.startswith("#")]',
    ),
    ("parse a URL query", "parse_query(query)", 'return dict(part.split("=") for part in query.split("&"))'),
    (
        "turn a snake-case name into camel case",
        "camel(name)",
        'head, *rest = name.split("_")\nreturn head + "".join(w.capitalize() for w in rest)',
    ),
    ("list running totals", "running(xs)", "return [sum(xs[:i + 1]) for i in range(len(xs))]"),
]
TARGET_PROMPTS = [
    "How would you {} in Python? Reply with one function.",
    "Please code a Python helper to {}.",
    "Could you give me Python code to {}?",
    "Implement this as a function in Python: {}.",
    "What Python function lets me {}?",
    "Python helper wanted: {}. Only the code, please.",
]


def target_python_function(rng: Random, count: int) -> list[Conversation]:
    """Small Python functions again, but with other tasks and other wordings than in the pool."""
    return single(
        [
            (
                TARGET_PROMPTS[i % len(TARGET_PROMPTS)].format(task),
                f"def {signature}:\n{indent(body, '    ')}",
            )
            for i, (task, signature, body) in enumerate(rng.sample(TARGET_FUNCTIONS, count))
        ]
    )


# Table, the column that names a row, and columns with some of their values.
TABLES: list[tuple[str, str, dict[str, list[str]]]] = [
    ("books", "author", {"genre": ["poetry", "crime", "travel"], "language": ["Greek", "Hindi", "Dutch"]}),
    ("employees", "name", {"department": ["sales", "legal", "design"], "city": ["Turin", "Porto", "Leeds"]}),
    ("orders", "customer", {"status": ["shipped", "open", "returned"], "courier": ["rail", "bike", "van"]}),
    ("films", "director", {"country": ["Chile", "Japan", "Mali"], "mood": ["dark", "comic", "tender"]}),
    ("pets", "owner", {"species": ["parrot", "rabbit", "tortoise"], "colour": ["grey", "white", "green"]}),
    ("gardens", "keeper", {"soil": ["clay", "sand", "peat"], "style": ["formal", "wild", "walled"]}),
]


def _table(rng: Random) -> tuple[str, str, str, str]:
    table, key, columns = rng.choice(TABLES)
    column = rng.choice(sorted(columns))
    return table, key, column, rng.choice(columns[column])


def _sql_where(rng: Random) -> Exchange:
    table, key, column, value = _table(rng)
    prompt = f"Write a SQL query for each {key} in the table {table} whose {column} is {value}, sorted by {key}."
    return prompt, f"SELECT {key} FROM {table} WHERE {column} = '{value}' ORDER BY {key};"


def _sql_count(rng: Random) -> Exchange:
    table, _, column, _ = _table(rng)
    prompt = f"Using SQL, count the rows of the table {table} for every {column}."
    return prompt, f"SELECT {column}, COUNT(*) FROM {table} GROUP BY {column};"


def _sql_update(rng: Random) -> Exchange:
    table, key, column, value = _table(rng)
    name = rng.choice(NAMES)
    prompt = f"Give me SQL that sets {column} to {value} in {table} where the {key} is {name}."
    return prompt, f"UPDATE {table} SET {column} = '{value}' WHERE {key} = '{name}';"


def _sql_delete(rng: Random) -> Exchange:
    table, _, column, value = _table(rng)
    prompt = f"Which SQL statement deletes all rows of the table {table} with {column} equal to {value}?"
    return prompt, f"DELETE FROM {table} WHERE {column} = '{value}';"


def _sql_distinct(rng: Random) -> Exchange:
    table, key, column, value = _table(rng)
    prompt = f"Show the SQL to list each distinct {key} in {table}, leaving out rows where {column} is {value}."
    return prompt, f"SELECT DISTINCT {key} FROM {table} WHERE {column} <> '{value}';"


def _sql_insert(rng: Random) -> Exchange:
    table, key, column, value = _table(rng)
    name = rng.choice(NAMES)
    prompt = f"Insert a row into the SQL table {table} with {key} {name} and {column} {value}."
    return prompt, f"INSERT INTO {table} ({key}, {column}) VALUES ('{name}', '{value}');"


SQL_WORDINGS = [_sql_where, _sql_count, _sql_update, _sql_delete, _sql_distinct, _sql_insert]


def sql_query(rng: Random, count: int) -> list[Conversation]:
    """A short SQL statement for a described task."""
    return single(cycle_distinct(rng, count, SQL_WORDINGS))


JOBS = ["nurse", "carpenter", "pilot", "librarian", "chef", "plumber", "tailor", "violinist"]
CITIES = ["Oslo", "Quito", "Cairo", "Perth", "Osaka", "Dublin", "Lagos", "Prague"]
COLOURS = ["blue", "yellow", "purple", "brown", "black", "orange"]
WARES = ["bicycle", "sofa", "raincoat", "teapot", "suitcase", "guitar"]
EVENTS = ["book fair", "chess club", "choir practice", "yoga class", "flea market", "film night"]
PLACES = ["the town hall", "the old mill", "the school gym", "the harbour café", "the public library"]
DISHES = ["lentil curry", "onion tart", "mushroom risotto", "fish pie", "bean salad"]


def _as_json(**fields: str) -> str:
    return json.dumps(fields, ensure_ascii=False)


def _json_person(rng: Random) -> Exchange:
    name, job, city = rng.choice(NAMES), rng.choice(JOBS), rng.choice(CITIES)
    text = rng.choice(["{n} is a {j} from {c}.", "{n} moved to {c} to work as a {j}."]).format(n=name, j=job, c=city)
    return f"Extract name, job and city as JSON: {text}", _as_json(name=name, job=job, city=city)


def _json_event(rng: Random) -> Exchange:
    event, place, day = rng.choice(EVENTS), rng.choice(PLACES), rng.choice(DAYS)
    text = f"The {event} is at {place} this {day}."
    return f"Return a JSON object with event, place and day. {text}", _as_json(event=event, place=place, day=day)


def _json_sale(rng: Random) -> Exchange:
    name, colour, ware = rng.choice(NAMES), rng.choice(COLOURS), rng.choice(WARES)
    text = f"{name} is selling a {colour} {ware}." if colour != "orange" else f"{name} is selling an orange {ware}."
    return (
        f'Turn this into JSON with the keys "seller", "item" and "colour": {text}',
        _as_json(seller=name, item=ware, colour=colour),
    )


def _json_meal(rng: Random) -> Exchange:
    (guest, cook), dish = rng.sample(NAMES, 2), rng.choice(DISHES)
    text = f"{cook} cooked {dish} for {guest}."
    return f"Give cook, dish and guest of this note as JSON: {text}", _as_json(cook=cook, dish=dish, guest=guest)


def _json_trip(rng: Random) -> Exchange:
    (start, end), day = rng.sample(CITIES, 2), rng.choice(DAYS)
    text = f"We leave {start} on {day} and fly to {end}."
    return f'Fill "from", "to" and "day" in JSON. {text}', _as_json(**{"from": start, "to": end, "day": day})


def json_extract(rng: Random, count: int) -> list[Conversation]:
    """Pull named fields out of a sentence as a JSON object."""
    return single(cycle_distinct(rng, count, [_json_person, _json_event, _json_sale, _json_meal, _json_trip]))
