"""Everyday kinds: polite emails, ordering and simple logic, geography."""

from __future__ import annotations

from random import Random

from kinds.common import DAYS, NAMES, Conversation, Exchange, cycle_distinct, single

RECIPIENTS = ["Ms Patel", "Mr Olsen", "Dr Costa", "Mrs Novak", "Mr Adeyemi", "Ms Laurent", "Dr Tanaka", "Mrs Quinn"]
# What the email is for, and what it says.
ERRANDS = [
    ("declining a dinner invitation", "Thank you for your kind invitation. Sadly, I cannot come to dinner."),
    ("asking to move a meeting to {day}", "Could we please move our meeting to {day}? I am sorry for the trouble."),
    ("thanking for a reference letter", "Thank you so much for the reference letter. It means a lot to me."),
    ("saying that a parcel arrived damaged", "I am afraid the parcel arrived damaged. Could you send a new one?"),
    ("asking for a day off on {day}", "May I please take {day} off? I will finish my tasks beforehand."),
    ("reporting a broken heater", "The heater in my flat has stopped working. Could someone look at it soon?"),
    ("apologising for missing a lesson", "I am sorry that I missed the lesson. I was ill and will catch up."),
    ("with congratulations on a new job", "Congratulations on the new job! They are lucky to have you."),
    ("asking about a lost scarf", "I may have left my scarf at your office. Has anyone found it?"),
    ("confirming an appointment on {day}", "I am happy to confirm our appointment on {day}. See you then."),
    ("asking for a copy of the report", "Would you kindly send me a copy of the report when you have time?"),
    ("with an invitation to a school play on {day}", "We would be delighted to see you at our school play on {day}."),
    ("cancelling a gym membership", "I would like to cancel my gym membership. Thank you for everything."),
    ("asking for help with watering plants", "Would you mind watering my plants while I am away? I would be grateful."),
    ("as a reminder of an unpaid invoice", "This is a gentle reminder that our invoice is still open."),
    ("asking for feedback on an essay", "Could you please give me some feedback on my essay? I value your opinion."),
    ("offering help in the garden on {day}", "I would be glad to help with your garden on {day}, if that suits you."),
    ("asking for quieter evenings", "Could you please keep the music down in the evening? Thank you kindly."),
    ("saying sorry for a late reply", "I apologise for my late reply. Your message was very helpful."),
    ("giving a welcome to the team", "Welcome to the team! Please ask me whenever you need anything."),
    ("asking whether a room is free on {day}", "Is the small meeting room free on {day}? I would love to use it."),
    ("giving thanks for a lovely weekend", "Thank you for a lovely weekend. We felt very much at home."),
    ("asking for a vegetarian menu", "Would a vegetarian menu be possible? Many thanks for your help."),
    ("returning a borrowed book", "I have left your book at the front desk. Thank you for lending it."),
    ("wishing a speedy recovery", "I was sorry to hear you are unwell. I wish you a speedy recovery."),
]
EMAIL_PROMPTS = [
    "Write a short polite email to {to} {errand}. Sign as {me}.",
    "{me} needs a brief, courteous email to {to} {errand}.",
    "Draft a friendly note from {me} to {to}, {errand}.",
]
CLOSINGS = ["Kind regards,", "Best wishes,", "Yours sincerely,"]


def polite_email(rng: Random, count: int) -> list[Conversation]:
    """A two-sentence courteous email."""
    exchanges: list[Exchange] = []
    while len(exchanges) < count:
        # Each time round every errand comes once, with new people.
        for errand, body in rng.sample(ERRANDS, min(len(ERRANDS), count - len(exchanges))):
            to, me, day = rng.choice(RECIPIENTS), rng.choice(NAMES), rng.choice(DAYS)
            prompt = rng.choice(EMAIL_PROMPTS).format(to=to, me=me, errand=errand.format(day=day))
            exchanges.append((prompt, f"Dear {to},\n{body.format(day=day)}\n{rng.choice(CLOSINGS)}\n{me}"))
    return single(exchanges)


MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October"]
MONTHS += ["November", "December"]
ANIMALS_BY_SIZE = ["ant", "mouse", "cat", "sheep", "horse", "elephant", "blue whale"]
NOUNS = ["apple", "basket", "cloud", "dragon", "engine", "feather", "ginger", "harbour", "island", "jacket", "kettle"]
NOUNS += ["lemon", "mirror", "needle", "orchard", "pepper", "quilt", "rabbit", "saddle", "tunnel", "violin", "window"]
# Comparative, and the superlatives of either end.
COMPARISONS = [
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("stronger", "strongest", "weakest"),
]
# A group, what all of it is, one of the group, one of the whole.
CLASSES = [
    ("sparrows", "birds", "a sparrow", "a bird"),
    ("trout", "fish", "a trout", "a fish"),
    ("beetles", "insects", "a beetle", "an insect"),
    ("violins", "instruments", "a violin", "an instrument"),
    ("oaks", "trees", "an oak", "a tree"),
    ("poodles", "dogs", "a poodle", "a dog"),
    ("roses", "flowers", "a rose", "a flower"),
    ("ferries", "boats", "a ferry", "a boat"),
]
STORIES = [
    ("slice the bread", "toast the slice", "spread the butter"),
    ("dig a hole", "plant the seed", "water the soil"),
    ("fill the kettle", "boil the water", "pour the tea"),
    ("write the letter", "seal the envelope", "post it"),
    ("wash the shirt", "hang it on the line", "iron it"),
    ("buy a ticket", "board the train", "find a seat"),
    ("crack the eggs", "whisk them", "fry the omelette"),
    ("knock on the door", "wait for an answer", "step inside"),
    ("sand the shelf", "paint it", "let it dry"),
    ("tune the guitar", "play the song", "take a bow"),
]


def _shuffled(rng: Random, ordered: list[str]) -> list[str]:
    """Another order of the items, never the given one."""
    while (mixed := rng.sample(ordered, len(ordered))) == ordered:
        pass
    return mixed


def _order_months(rng: Random) -> Exchange:
    picked = sorted(rng.sample(range(len(MONTHS)), 4))
    months = [MONTHS[i] for i in picked]
    prompt = f"Put these months in calendar order, starting from January: {', '.join(_shuffled(rng, months))}."
    return prompt, f"In calendar order: {', '.join(months)}."


def _order_words(rng: Random) -> Exchange:
    words = sorted(rng.sample(NOUNS, 4))
    prompt = f"Arrange these words alphabetically: {', '.join(_shuffled(rng, words))}."
    return prompt, f"In alphabetical order they are {', '.join(words)}."


def _order_animals(rng: Random) -> Exchange:
    animals = [ANIMALS_BY_SIZE[i] for i in sorted(rng.sample(range(len(ANIMALS_BY_SIZE)), 4))]
    prompt = f"List these animals from smallest to largest: {', '.join(_shuffled(rng, animals))}."
    return prompt, f"From smallest to largest: {', '.join(animals)}."


def _order_people(rng: Random) -> Exchange:
    more, most, least = rng.choice(COMPARISONS)
    a, b, c = rng.sample(NAMES, 3)
    facts = rng.choice(
        [f"{a} is {more} than {b}, and {b} is {more} than {c}.", f"{b} is {more} than {c}. {a} is {more} than {b}."]
    )
    if rng.random() < 0.5:
        return (
            f"{facts} Who is the {most}?",
            f"{a} is the {most}, since {a} is {more} than {b} and {b} is {more} than {c}.",
        )
    return f"{facts} Who is the {least}?", f"{c} is the {least}, since both {a} and {b} are {more} than {c}."


def _syllogism(rng: Random) -> Exchange:
    group, whole, member, example = rng.choice(CLASSES)
    name = rng.choice(NAMES)
    if rng.random() < 0.5:
        prompt = f"All {group} are {whole}. {name} drew {member}. Does it follow that {name} drew {example}?"
        return prompt, f"Yes. All {group} are {whole}, so {name} drew {example}."
    prompt = f"All {group} are {whole}. {name} drew {example}. Must the drawing show {member}?"
    return prompt, f"No. All {group} are {whole}, but not all {whole} are {group}."


def _order_story(rng: Random) -> Exchange:
    story = list(rng.choice(STORIES))
    prompt = f"In what order would you do these things? {'; '.join(_shuffled(rng, story))}"
    return prompt, f"First {story[0]}, then {story[1]}, and finally {story[2]}."


def ordering(rng: Random, count: int) -> list[Conversation]:
    """Put things in order, or draw a simple conclusion."""
    makers = [_order_months, _order_words, _order_people, _order_animals, _syllogism, _order_story]
    return single(cycle_distinct(rng, count, makers))


# Country, capital, continent, a country it borders.
COUNTRIES = [
    ("Peru", "Lima", "South America", "Ecuador"),
    ("Kenya", "Nairobi", "Africa", "Tanzania"),
    ("Norway", "Oslo", "Europe", "Sweden"),
    ("Portugal", "Lisbon", "Europe", "Spain"),
    ("Thailand", "Bangkok", "Asia", "Laos"),
    ("Ghana", "Accra", "Africa", "Togo"),
    ("Uruguay", "Montevideo", "South America", "Brazil"),
    ("Mongolia", "Ulaanbaatar", "Asia", "China"),
    ("Austria", "Vienna", "Europe", "Slovenia"),
    ("Morocco", "Rabat", "Africa", "Algeria"),
    ("Vietnam", "Hanoi", "Asia", "Cambodia"),
    ("Hungary", "Budapest", "Europe", "Romania"),
    ("Paraguay", "Asunción", "South America", "Argentina"),
    ("Senegal", "Dakar", "Africa", "Mali"),
    ("Finland", "Helsinki", "Europe", "Norway"),
    ("Nepal", "Kathmandu", "Asia", "India"),
    ("Poland", "Warsaw", "Europe", "Slovakia"),
    ("Zambia", "Lusaka", "Africa", "Malawi"),
    ("Guatemala", "Guatemala City", "North America", "Belize"),
    ("Jordan", "Amman", "Asia", "Syria"),
    ("Greece", "Athens", "Europe", "Bulgaria"),
    ("Namibia", "Windhoek", "Africa", "Angola"),
    ("Costa Rica", "San José", "North America", "Panama"),
    ("Latvia", "Riga", "Europe", "Lithuania"),
]
COUNTRY_PROMPTS = [
    "What is the capital of {country}, and on which continent does the country lie?",
    "For a quiz, name the capital city and the continent of {country}.",
]
COUNTRY_REPLIES = [
    "The capital of {country} is {capital}, and the country is in {continent}.",
    "{country} lies in {continent}, and its capital city is {capital}.",
]
FACTS = [
    (
        "Which river flows through Paris?",
        "The Seine flows through Paris and on to the English Channel.",
    ),
    (
        "Which ocean lies between Africa and Australia?",
        "The Indian Ocean lies between Africa and Australia, south of Asia.",
    ),
    (
        "Where is the highest mountain above sea level?",
        "Mount Everest is the highest; it stands on the border of Nepal and China.",
    ),
    (
        "What is the largest hot desert on Earth called?",
        "It is the Sahara, which stretches across northern Africa.",
    ),
    (
        "Which sea separates Italy from Croatia?",
        "The Adriatic Sea, an arm of the Mediterranean, lies between Italy and Croatia.",
    ),
    (
        "Which canal joins the Atlantic and the Pacific?",
        "The Panama Canal joins the Atlantic and the Pacific.",
    ),
    (
        "Which mountains run along the west of South America?",
        "The Andes run along the whole west of South America.",
    ),
    (
        "On which island are both Haiti and the Dominican Republic?",
        "Both share the Caribbean island of Hispaniola.",
    ),
    (
        "Which strait separates Spain from Morocco?",
        "The Strait of Gibraltar, at the mouth of the Mediterranean, separates them.",
    ),
    (
        "Into which sea does the river Danube flow?",
        "The Danube flows into the Black Sea, in Romania and Ukraine.",
    ),
    (
        "Which large island lies off the coast of Mozambique?",
        "Madagascar lies off that coast, in the Indian Ocean.",
    ),
    (
        "Which city lies on both sides of the Bosphorus?",
        "Istanbul lies on both sides of the Bosphorus, in Turkey.",
    ),
    (
        "Which mountains lie on the border of France and Spain?",
        "The Pyrenees form the border between France and Spain.",
    ),
    (
        "What is the largest ocean on Earth?",
        "It is the Pacific, which touches Asia, Australia and the Americas.",
    ),
    (
        "Which European country is shaped like a boot?",
        "Italy looks like a boot on the map, with Sicily at its toe.",
    ),
    (
        "Which state of the United States consists of islands?",
        "Hawaii is the state made up of islands in the Pacific.",
    ),
]
FACT_PROMPTS = [
    "A question about the map of the world: {}",
    "{} Please answer in one full sentence.",
    "My atlas is torn. {}",
]
NEIGHBOUR_PROMPTS = [
    "On the map, which country shares a land border with {country}? Name one.",
    "I am studying {country}. Tell me one of its neighbours on land.",
]
NEIGHBOUR_REPLIES = [
    "One country that borders {country} is {neighbour}, also in {continent}.",
    "{neighbour} shares a land border with {country}, in {continent}.",
]


def geography(rng: Random, count: int) -> list[Conversation]:
    """Facts about countries, rivers and mountains, two of them with a second question."""
    exchanges = [(rng.choice(FACT_PROMPTS).format(question), answer) for question, answer in FACTS]
    for prompts, replies in ((COUNTRY_PROMPTS, COUNTRY_REPLIES), (NEIGHBOUR_PROMPTS, NEIGHBOUR_REPLIES)):
        for country, capital, continent, neighbour in COUNTRIES:
            words = {"country": country, "capital": capital, "continent": continent, "neighbour": neighbour}
            exchanges.append((rng.choice(prompts).format(**words), rng.choice(replies).format(**words)))
    conversations = single(rng.sample(exchanges, count - 2))
    follow_ups: list[Conversation] = [
        [
            ("Which country has Ottawa as its capital?", "Ottawa is the capital of Canada."),
            ("And which ocean lies to the east of Canada?", "The Atlantic Ocean lies to the east of Canada."),
        ],
        [
            ("In which country is the city of Marrakesh?", "Marrakesh is a city in Morocco."),
            ("Which mountains can you see from Marrakesh?", "From there you can see the Atlas Mountains."),
        ],
    ]
    return follow_ups + conversations
