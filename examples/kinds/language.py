"""Kinds about language: French phrases, grammar, word meaning and sentiment."""

from __future__ import annotations

from random import Random

from kinds.common import Conversation, Exchange, capitalised, single

FRENCH = [
    ("Where is the train station?", "Où est la gare ?"),
    ("I would like a coffee, please.", "Je voudrais un café, s'il vous plaît."),
    ("The cat is sleeping on the chair.", "Le chat dort sur la chaise."),
    ("My sister lives in Lyon.", "Ma sœur habite à Lyon."),
    ("We are going to the beach tomorrow.", "Nous allons à la plage demain."),
    ("It is raining today.", "Il pleut aujourd'hui."),
    ("The bread is still warm.", "Le pain est encore chaud."),
    ("I do not understand the question.", "Je ne comprends pas la question."),
    ("Can you help me?", "Pouvez-vous m'aider ?"),
    ("The window is open.", "La fenêtre est ouverte."),
    ("She is reading a good book.", "Elle lit un bon livre."),
    ("My brother plays the piano.", "Mon frère joue du piano."),
    ("The market is closed on Sundays.", "Le marché est fermé le dimanche."),
    ("I have lost my keys.", "J'ai perdu mes clés."),
    ("What time is it?", "Quelle heure est-il ?"),
    ("The children are in the garden.", "Les enfants sont dans le jardin."),
    ("He drinks tea in the morning.", "Il boit du thé le matin."),
    ("This soup is too salty.", "Cette soupe est trop salée."),
    ("Good evening, madam.", "Bonsoir, madame."),
    ("The train is late.", "Le train est en retard."),
    ("I am looking for the library.", "Je cherche la bibliothèque."),
    ("They speak very quickly.", "Ils parlent très vite."),
    ("The sky is blue.", "Le ciel est bleu."),
    ("My grandmother makes jam.", "Ma grand-mère fait de la confiture."),
    ("You have a beautiful house.", "Vous avez une belle maison."),
    ("The dog is afraid of storms.", "Le chien a peur des orages."),
    ("I am cold.", "J'ai froid."),
    ("See you next week!", "À la semaine prochaine !"),
    ("The apples are in the kitchen.", "Les pommes sont dans la cuisine."),
    ("We do not have any milk.", "Nous n'avons pas de lait."),
    ("He works in a hospital.", "Il travaille dans un hôpital."),
    ("Turn left after the bridge.", "Tournez à gauche après le pont."),
    ("The museum opens soon.", "Le musée ouvre bientôt."),
    ("I like walking in the forest.", "J'aime marcher dans la forêt."),
    ("Where are my shoes?", "Où sont mes chaussures ?"),
    ("Her car is red.", "Sa voiture est rouge."),
    ("The snow is already melting.", "La neige fond déjà."),
    ("Please close the door.", "Fermez la porte, s'il vous plaît."),
    ("I will call you tonight.", "Je t'appellerai ce soir."),
    ("The teacher is very patient.", "Le professeur est très patient."),
    ("We ate fish yesterday.", "Nous avons mangé du poisson hier."),
    ("The moon is bright.", "La lune est brillante."),
    ("How much does this hat cost?", "Combien coûte ce chapeau ?"),
    ("My friend is learning French.", "Mon ami apprend le français."),
    ("The birds sing at dawn.", "Les oiseaux chantent à l'aube."),
    ("He forgot his umbrella.", "Il a oublié son parapluie."),
    ("The river is deep here.", "La rivière est profonde ici."),
    ("Do you want some water?", "Voulez-vous de l'eau ?"),
    ("The cheese is on the table.", "Le fromage est sur la table."),
    ("I prefer the green shirt.", "Je préfère la chemise verte."),
    ("The lesson begins now.", "La leçon commence maintenant."),
    ("Happy birthday, my dear friend!", "Joyeux anniversaire, mon cher ami !"),
]
FRENCH_PROMPTS = [
    'Translate this sentence into French: "{}"',
    'How would you say "{}" in French, please?',
    'I am going to Paris. What is the French for "{}"?',
    'Put this English sentence into French: "{}"',
]
FRENCH_REPLIES = ["In French, that is « {} »", "You would say: « {} »", "The French sentence is « {} »"]


def translate_french(rng: Random, count: int) -> list[Conversation]:
    """Everyday sentences from English into French, two of them with a second sentence."""
    table = rng.sample(FRENCH, count + 2)
    conversations: list[Conversation] = single(
        [(rng.choice(FRENCH_PROMPTS).format(en), rng.choice(FRENCH_REPLIES).format(fr)) for en, fr in table[:count]]
    )
    for conversation, (english, french) in zip(conversations, table[count:], strict=False):
        conversation.append((f'And now this one: "{english}"', f"That would be « {french} »"))
    return conversations


GRAMMAR = [
    ("She go to the library every weekend.", "She goes to the library every weekend."),
    ("The dogs was barking all night.", "The dogs were barking all night."),
    ("I has never seen a whale before.", "I have never seen a whale before."),
    ("Him and me went to the cinema.", "He and I went to the cinema."),
    ("There is too many chairs in this room.", "There are too many chairs in this room."),
    ("He don't like spicy food at all.", "He doesn't like spicy food at all."),
    ("We was late because the bus broke down.", "We were late because the bus broke down."),
    ("Me sister bought a new bicycle.", "My sister bought a new bicycle."),
    ("The childs are playing near the fountain.", "The children are playing near the fountain."),
    ("She sings more better than her teacher.", "She sings better than her teacher."),
    ("Its raining, so bring a umbrella.", "It's raining, so bring an umbrella."),
    ("They has finished painting the fence.", "They have finished painting the fence."),
    ("I seen that film with my cousin.", "I saw that film with my cousin."),
    ("Your going to love this garden.", "You're going to love this garden."),
    ("The cat licked it's paws by the fire.", "The cat licked its paws by the fire."),
    ("He is the most tallest boy in the choir.", "He is the tallest boy in the choir."),
    ("Yesterday we walk along the river.", "Yesterday we walked along the river."),
    ("She has went home already.", "She has gone home already."),
    ("Neither of the keys open this door.", "Neither of the keys opens this door."),
    ("I could of helped you carry the bags.", "I could have helped you carry the bags."),
    ("The news are on the radio now.", "The news is on the radio now."),
    ("He runned to the shop before it closed.", "He ran to the shop before it closed."),
    ("Each of the students have a locker.", "Each of the students has a locker."),
    ("There house is next to the bakery.", "Their house is next to the bakery."),
    ("I am agree with your opinion.", "I agree with your opinion."),
    ("She didn't ate her breakfast today.", "She didn't eat her breakfast today."),
    ("We are living here since last spring.", "We have been living here since last spring."),
    ("He gave the letter to my brother and I.", "He gave the letter to my brother and me."),
    ("The sheeps are grazing on the hill.", "The sheep are grazing on the hill."),
    ("Can you borrow me your pen?", "Can you lend me your pen?"),
    ("She is good in playing chess.", "She is good at playing chess."),
    ("I look forward to meet your family.", "I look forward to meeting your family."),
    ("He speaks very good Italian, isn't it?", "He speaks very good Italian, doesn't he?"),
    ("The police is searching the park.", "The police are searching the park."),
    ("Less people came to the fair this year.", "Fewer people came to the fair this year."),
    ("She explained me the rules of the game.", "She explained the rules of the game to me."),
    ("If I was you, I will apologise.", "If I were you, I would apologise."),
    ("He play guitar and sings in a band.", "He plays guitar and sings in a band."),
    ("The informations on the sign are wrong.", "The information on the sign is wrong."),
    ("I didn't see nobody at the station.", "I didn't see anybody at the station."),
    ("This is the woman which fixed my roof.", "This is the woman who fixed my roof."),
    ("The soup smells deliciously tonight.", "The soup smells delicious tonight."),
    ("She drives careful in the snow.", "She drives carefully in the snow."),
    ("Them flowers need more sunlight.", "Those flowers need more sunlight."),
    ("He has broke his favourite cup.", "He has broken his favourite cup."),
    ("I am used to wake up early.", "I am used to waking up early."),
    ("The mouses ate the cheese in the cellar.", "The mice ate the cheese in the cellar."),
    ("She want to become an honest lawyer.", "She wants to become an honest lawyer."),
    ("Who's scarf is lying on the stairs?", "Whose scarf is lying on the stairs?"),
    ("My trousers is hanging on the line.", "My trousers are hanging on the line."),
    ("He asked where was the post office.", "He asked where the post office was."),
    ("We enjoyed to watch the parade.", "We enjoyed watching the parade."),
]
GRAMMAR_PROMPTS = [
    "Correct the grammar of this sentence: {}",
    "Please fix the mistakes in what I wrote: {}",
    "Rewrite this sentence in correct English: {}",
    'What is wrong here? Give the corrected sentence. "{}"',
]
GRAMMAR_REPLIES = ["In correct English: {}", "Here it is, corrected: {}", "The correct sentence is: {}"]


def grammar_fix(rng: Random, count: int) -> list[Conversation]:
    """Correct a sentence with a common mistake."""
    table = rng.sample(GRAMMAR, count)
    return single(
        [(rng.choice(GRAMMAR_PROMPTS).format(bad), rng.choice(GRAMMAR_REPLIES).format(good)) for bad, good in table]
    )


# Word, a synonym, an antonym.
WORDS = [
    tuple(line.split())
    for line in """
    happy cheerful sad
    big large small
    quick fast slow
    brave courageous cowardly
    silent quiet noisy
    rich wealthy poor
    begin start finish
    ancient old modern
    difficult hard easy
    generous giving stingy
    polite courteous rude
    strong powerful weak
    bright vivid dull
    calm peaceful agitated
    clever smart foolish
    damp moist dry
    empty vacant full
    famous renowned unknown
    gentle mild harsh
    honest truthful dishonest
    humble modest arrogant
    increase grow shrink
    joy delight sorrow
    kind caring cruel
    lazy idle hardworking
    love adore hate
    near close far
    neat tidy messy
    permit allow forbid
    praise commend criticise
    rare scarce common
    repair mend break
    safe secure dangerous
    shout yell whisper
    shy timid outgoing
    simple plain complicated
    strange odd ordinary
    tired weary rested
    ugly unattractive beautiful
    vanish disappear appear
    victory triumph defeat
    wide broad narrow
    accept receive refuse
    build construct demolish
    careful cautious reckless
    enemy foe friend
    expand enlarge contract
    gather collect scatter
    loyal faithful disloyal
    sharp pointed blunt
    thin slender thick
    true correct false
    """.strip().splitlines()
]
WORD_PROMPTS = [
    'Give one synonym and one antonym for the word "{}".',
    'What is another word for "{}", and what is its opposite?',
    'Name a word that means the same as "{}" and one that means the opposite.',
    'I need a synonym and an antonym of "{}" for my essay.',
]
WORD_REPLIES = [
    'A synonym of "{}" is "{}", and an antonym is "{}".',
    '"{}" means much the same as "{}"; its opposite is "{}".',
    'For "{}" you can use the synonym "{}" and the antonym "{}".',
]


def synonym_antonym(rng: Random, count: int) -> list[Conversation]:
    """A synonym and an antonym of a word, two of them with a second word."""
    table = rng.sample(WORDS, count + 2)
    conversations: list[Conversation] = single(
        [(rng.choice(WORD_PROMPTS).format(row[0]), rng.choice(WORD_REPLIES).format(*row)) for row in table[:count]]
    )
    for conversation, (word, synonym, antonym) in zip(conversations, table[count:], strict=False):
        conversation.append((f'The same for "{word}", please.', f'Synonym: "{synonym}". Antonym: "{antonym}".'))
    return conversations


# What is judged, what a pleased and what a displeased writer says of it.
REVIEWED = [
    ("the hotel room", "spotless and quiet", "damp and noisy"),
    ("the soup", "rich and comforting", "cold and watery"),
    ("the tour guide", "funny and well informed", "rude and always late"),
    ("the novel", "gripping to the last page", "slow and predictable"),
    ("the new phone", "light and very responsive", "sluggish and too hot to hold"),
    ("the concert", "thrilling from start to end", "badly organised and far too loud"),
    ("the delivery", "early and well packed", "late and half crushed"),
    ("the waiter", "attentive and warm", "careless and grumpy"),
    ("the jacket", "soft and beautifully cut", "itchy and poorly stitched"),
    ("the museum", "calm and full of surprises", "crowded and badly lit"),
    ("the dentist", "gentle and reassuring", "impatient and rough"),
    ("the app", "simple and a joy to use", "confusing and full of adverts"),
    ("the ferry", "clean and right on time", "filthy and hours behind"),
    ("the cake", "moist and not too sweet", "dry and tasteless"),
    ("the campsite", "green and peaceful", "muddy and overcrowded"),
    ("the language course", "lively and useful", "dull and overpriced"),
    ("the vacuum cleaner", "quiet and surprisingly strong", "feeble and falling apart"),
    ("the film", "moving and superbly acted", "silly and endless"),
]
GLAD = ["I would gladly go back for more.", "What a treat!", "I recommend it to everyone.", "I could not be happier."]
CROSS = ["Never again.", "I want my money back.", "What a disappointment.", "I regret it already."]
SENTIMENT_PROMPTS = [
    "Is this review positive, negative or mixed? {}",
    "Classify the sentiment: {}",
    "How does the writer feel? {}",
    "Label this comment as positive, negative or mixed: {}",
]


def _review(rng: Random, label: str, index: int) -> tuple[str, str]:
    """A review with that label and the judgement on it."""
    thing, good, bad = REVIEWED[index]
    if label == "Positive":
        return f"{capitalised(thing)} was {good}. {rng.choice(GLAD)}", f"Positive. The writer calls {thing} {good}."
    if label == "Negative":
        return f"{capitalised(thing)} was {bad}. {rng.choice(CROSS)}", f"Negative. The writer found {thing} {bad}."
    other, _, worse = REVIEWED[(index + 1) % len(REVIEWED)]
    review = f"{capitalised(thing)} was {good}, but {other} was {worse}."
    return review, f"Mixed. The writer liked {thing} but complains about {other}."


def sentiment(rng: Random, count: int) -> list[Conversation]:
    """Judge a short review, two of them with a question about the choice of words."""
    pairs = [(label, i) for label in ("Positive", "Negative", "Mixed") for i in range(len(REVIEWED))]
    exchanges: list[Exchange] = []
    questions: list[Exchange] = []
    for label, index in rng.sample(pairs, count):
        review, judgement = _review(rng, label, index)
        exchanges.append((rng.choice(SENTIMENT_PROMPTS).format(review), judgement))
        thing, good, bad = REVIEWED[index]
        words = bad if label == "Negative" else good
        questions.append((f"Which words about {thing} show that?", f'The telling words are "{words}".'))
    conversations = single(exchanges)
    for conversation, question in zip(conversations[:2], questions, strict=False):
        conversation.append(question)
    return conversations
