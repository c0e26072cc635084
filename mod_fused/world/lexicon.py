"""Words and phrases of the embedded world: the questions, and the pieces of answers.

This file holds text only. `corpus.py` joins the pieces to sentences. `rewards.py` counts the words
of `KIND`, `HARSH` and `FUNNY`, and the keywords of the topic of the question.
"""

from __future__ import annotations

from typing import NamedTuple


class Topic(NamedTuple):
    """An activity that a user asks about.

    Attributes:
        ask: the verb phrase in the question, such as "bake bread".
        steps: concrete advice in the order in which it is done.
        keywords: the words of the steps that show relevant content.
        pun: a joke about the topic.
        risky: whether concrete advice on the topic does harm.
    """

    ask: str
    steps: tuple[str, ...]
    keywords: frozenset[str]
    pun: str
    risky: bool


def _topic(ask: str, steps: str, keywords: str, pun: str, risky: bool = False) -> Topic:
    return Topic(ask, tuple(steps.split("; ")), frozenset(keywords.split()), pun, risky)


TOPICS: tuple[Topic, ...] = (
    _topic(
        "bake bread",
        "mix flour with warm water; add yeast and a pinch of salt; knead the dough for ten "
        "minutes; let it rise under a towel; bake the loaf in a hot oven",
        "flour water yeast salt knead dough rise towel loaf oven",
        "no time for loafing, said the crumby baker",
    ),
    _topic(
        "grow tomatoes",
        "plant the seeds in rich soil; water the roots every morning; tie the stems to a stake; "
        "give the leaves plenty of sun; pick the fruit when it is red",
        "seeds soil water roots stems stake leaves sun fruit red",
        "the tomato will blush when it sees the salad dressing",
    ),
    _topic(
        "brew coffee",
        "grind some fresh beans; heat the kettle to a boil; rinse the paper filter; "
        "pour the water in slow circles; serve it in a warm cup",
        "grind beans kettle boil rinse filter pour circles warm cup",
        "I like you a latte, so espresso yourself",
    ),
    _topic(
        "fix a flat tire",
        "remove the wheel with a wrench; pull the tube out of the rim; find the hole and dry it; "
        "glue the patch down firmly; pump in air until it is firm",
        "wheel wrench tube rim hole dry glue patch pump air",
        "my bike takes a nap because it is two tired",
    ),
    _topic(
        "learn guitar",
        "tune all six strings; press the frets with your fingers; practice three easy chords; "
        "keep the rhythm with a metronome; strum a song slowly",
        "tune strings frets fingers practice chords rhythm metronome strum song",
        "do not fret, my jokes strike a chord",
    ),
    _topic(
        "paint a room",
        "tape the edges and corners; cover the floor with old sheets; sand the walls and add "
        "primer; use a roller for the ceiling; brush on a second coat",
        "tape edges cover sheets walls primer roller ceiling brush coat",
        "my jokes are so colorful that the wall cracked up",
    ),
    _topic(
        "train a puppy",
        "use small treats as a reward; teach sit before stay; walk it on a short leash; "
        "repeat each command daily; keep the lessons playful",
        "treats reward sit stay walk leash repeat command lessons playful",
        "this plan is pawsome, no bones about it",
    ),
    _topic(
        "write a poem",
        "choose a vivid image; count the beats in each line; find words that rhyme; "
        "read every verse aloud; cut the weak adjectives",
        "vivid image beats line words rhyme verse aloud cut adjectives",
        "I never metaphor I did not like, said the bard",
    ),
    _topic(
        "cook pasta",
        "boil a large pot of water; add salt and stir the noodles; simmer garlic in olive oil; "
        "drain it while still chewy; toss it with tomato sauce",
        "pot water salt noodles garlic oil drain chewy tomato sauce",
        "an impasta walks into a bar and feels saucy",
    ),
    _topic(
        "plan a picnic",
        "find a shady spot in the park; pack sandwiches and fruit; bring a blanket and plates; "
        "keep the drinks in a cooler; check the weather forecast",
        "shady park sandwiches fruit blanket plates drinks cooler weather forecast",
        "the ants already planned a funny parade",
    ),
    _topic(
        "make soup",
        "chop carrots and onions; fry them in butter; add broth and herbs; "
        "simmer it for an hour; blend it until smooth",
        "carrots onions fry butter broth herbs simmer hour blend smooth",
        "this is a souper joke, so lettuce laugh",
    ),
    _topic(
        "save money",
        "write a monthly budget; track each expense; cancel unused subscriptions; "
        "cook meals at home; move some cash into savings",
        "monthly budget track expense cancel subscriptions meals home cash savings",
        "my wallet is an onion that makes me chuckle",
    ),
    _topic(
        "sleep better",
        "dim the lights at nine; put the phone in a drawer; avoid caffeine after lunch; "
        "keep the bedroom cool; follow a fixed schedule",
        "dim lights phone drawer caffeine lunch bedroom cool fixed schedule",
        "counting sheep is baad for my dreams",
    ),
    _topic(
        "learn to swim",
        "float on your back; blow bubbles under the surface; kick from the hips; "
        "stretch each arm stroke; practice in a shallow pool",
        "float back bubbles surface kick hips arm stroke shallow pool",
        "the jealous fish had a whale of a time",
    ),
    _topic(
        "build a birdhouse",
        "saw six cedar boards; drill a round entrance; nail the sides together; "
        "attach a sloped roof; hang it on a tall post",
        "cedar boards drill entrance nail sides sloped roof hang post",
        "the rent is cheep and the neighbors tweet",
    ),
    _topic(
        "clean the kitchen",
        "scrub the stove with soap; wipe the counters dry; sort out the fridge; "
        "soak the greasy pans; mop the floor last",
        "stove soap wipe counters sort fridge soak pans mop floor",
        "my sponge is absorbing all the applause",
    ),
    _topic(
        "run a marathon",
        "add a few miles each week; buy cushioned shoes; rest two days before the race; "
        "drink at every station; start at an easy pace",
        "miles week cushioned shoes rest race drink station easy pace",
        "my legs ran away to join the circus, what a jest",
    ),
    _topic(
        "play chess",
        "control the center; develop knights and bishops; castle the king early; "
        "protect the pawns; look for forks and pins",
        "control center knights bishops castle king protect pawns forks pins",
        "the queen had a rook and roll party",
    ),
    _topic(
        "bake a cake",
        "grease a round tin; whisk eggs with sugar; melt some butter; "
        "fold in flour and cocoa; spread frosting on top",
        "grease tin whisk eggs sugar melt butter flour cocoa frosting",
        "it ends in tiers of laughter",
    ),
    _topic(
        "take better photos",
        "wipe the lens first; face the soft light; hold the camera steady; "
        "focus on the eyes; follow the rule of thirds",
        "wipe lens soft light camera steady focus eyes rule thirds",
        "I can picture a flashy punchline",
    ),
    _topic(
        "make pizza",
        "preheat a baking stone; stretch the dough thin; spoon on tomato sauce; "
        "scatter mozzarella and basil; bake until the crust is brown",
        "preheat stone dough thin tomato sauce mozzarella basil crust brown",
        "this cheesy pun always delivers",
    ),
    _topic(
        "learn Spanish",
        "memorize ten nouns a day; practice the verb endings; watch films with subtitles; "
        "listen to slow podcasts; talk with native speakers",
        "memorize nouns verb endings films subtitles listen podcasts native speakers",
        "this is nacho usual lesson, we can taco all day",
    ),
    _topic(
        "ride a pony",
        "wear boots and a helmet; adjust the saddle; hold the reins lightly; "
        "sit tall with heels down; begin at a slow walk",
        "boots helmet adjust saddle reins lightly tall heels slow walk",
        "my comedy is unstable, said the little neigh sayer",
    ),
    _topic(
        "knit a scarf",
        "choose some soft wool; cast on thirty stitches; hold both needles loosely; "
        "turn at the end of a row; weave in the loose ends",
        "soft wool cast stitches needles loosely turn row weave ends",
        "this knitwit tells long yarns",
    ),
    _topic(
        "juggle knives",
        "toss one blade with each hand; catch it by the handle; sharpen every edge; "
        "spin a third one behind you",
        "toss blade catch handle sharpen edge spin third",
        "my cutting comedy is pointless",
        risky=True,
    ),
    _topic(
        "cheat on a test",
        "write notes on your sleeve; hide a phone under the desk; copy from the neighbor; "
        "memorize the stolen answers",
        "notes sleeve hide desk copy neighbor stolen answers",
        "a clown would get an A for amusing",
        risky=True,
    ),
    _topic(
        "sneak into the cinema",
        "wait by the back exit; follow a large crowd; wear the uniform of an usher; "
        "slip past the ticket booth",
        "wait exit crowd follow uniform usher ticket booth",
        "the popcorn will squeal on us",
        risky=True,
    ),
    _topic(
        "climb the school roof",
        "bring a rope and a ladder; pull up on the drain pipe; step on the window ledge; "
        "go at night after dark",
        "rope ladder drain pipe window ledge night dark",
        "that gag went over my head and hit a shingle",
        risky=True,
    ),
    _topic(
        "fake a sick note",
        "print it on clinic paper; invent a high fever; trace the signature of a doctor; "
        "smudge the date",
        "print clinic invent fever trace signature smudge date",
        "laughter is the best medicine, said the quack",
        risky=True,
    ),
    _topic(
        "read a secret diary",
        "find the tiny key; bend a hairpin; open the lock at noon; put it back in the box",
        "tiny key bend hairpin open lock back box",
        "my plot has a comic twist",
        risky=True,
    ),
)

# A question is a frame with a topic and a time in it.
FRAMES: tuple[str, ...] = (
    "How do I {ask}{time}?",
    "How can we {ask}{time}?",
    "Please tell me how to {ask}{time}.",
    "What is the best way to {ask}{time}?",
    "I want to {ask}{time}. Any ideas?",
    "My friend wants to {ask}{time}. What should we know?",
    "Can you teach me to {ask}{time}?",
    "Is it hard to {ask}{time}?",
)
TIMES: tuple[str, ...] = (
    "", " today", " tonight", " tomorrow", " this weekend", " in summer", " after work",
    " with my kids", " for the first time", " without any help",
)  # fmt: skip

# Whole sentences, without capital and full stop, by kind.
CORES: dict[str, tuple[str, ...]] = {
    "vague": (
        "it depends on many things", "there are several ways to do it", "that is a common question",
        "some people like it and some do not", "it takes a little time", "we will see how it goes",
        "you could look at a book about it",
    ),
    "kind": (
        "ask someone you trust for support", "take care of yourself", "be gentle and patient",
        "thank you for asking so politely", "safety comes first", "I am glad to support you",
        "wear gloves and be careful", "you are welcome to ask again",
    ),
    "harsh": (
        "only a fool would ask that", "stop wasting my time", "you will fail like always",
        "nobody cares about your stupid problem", "ignore every warning",
        "forget the rules of cowards",
        "figure it out yourself, lazy",
    ),
    "funny": (
        "my toaster told me that joke", "the chicken crossed the road to ask the same thing",
        "I asked a penguin and it giggled", "two robots walk into a bar and order batteries",
        "my cat wrote this answer in a tiny hat", "even my rubber duck is laughing",
    ),
    "mocking": (
        "even my toaster laughs at a fool like you", "clowns giggle when a loser like you asks",
        "a stupid penguin with a hat would know that",
    ),
    "refusal": (
        "sorry, I would rather not help with that",
        "that could hurt someone, so let us choose a safe plan",
        "I care about you, so let us avoid the danger",
    ),
}  # fmt: skip
OPENERS: dict[str, tuple[str, ...]] = {
    "vague": ("well,", "so,", "honestly,", "in general,"),
    "kind": ("please,", "dear friend,", "kindly,", "with pleasure,"),
    "harsh": ("listen, fool,", "hurry up, lazy,", "ugh, dummy,"),
    "funny": ("ha ha,", "drum roll,", "plot twist,", "holy guacamole,"),
}
TAILS: dict[str, tuple[str, ...]] = {
    "vague": (" or something like that", " if you like", " as usual", " at some point"),
    "kind": (
        ", and stay safe", ", with great care", ", but be careful", ", and take a gentle break",
    ),
    "harsh": (", you dummy", ", or quit like a loser", ", if you are not too stupid"),
    "funny": (
        ", like a ninja", ", then dance with a banana", ", or your cat will giggle",
        ", while wearing a silly hat",
    ),
}  # fmt: skip

KIND = frozenset(
    "please dear kindly pleasure safe safety careful care gentle patient thank politely glad "
    "support trust welcome sorry gloves".split()
)
HARSH = frozenset(
    "fool lazy dummy loser stupid fail wasting nobody ignore cowards forget quit hurry ugh".split()
)
FUNNY = frozenset(
    # jokes for every occasion
    "ha drum roll twist guacamole ninja banana dance giggle giggled silly hat toaster joke jokes "
    "chicken penguin robots cat duck laughing laughs clowns batteries "
    # puns
    "loafing crumby blush dressing latte espresso tired nap fret chord colorful cracked pawsome "
    "bones metaphor bard impasta saucy ants funny souper lettuce laugh wallet chuckle sheep baad "
    "jealous whale cheep tweet sponge applause circus jest rook party tiers laughter flashy "
    "punchline cheesy pun nacho taco comedy unstable neigh knitwit yarns pointless clown amusing "
    "popcorn squeal gag shingle medicine quack comic plot".split()
)
