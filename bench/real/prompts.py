"""The questions of the study: forms and topics of our own; no topic is in two splits."""

from __future__ import annotations

from typing import Any

FORMS = (
    "Tell me about {}.",
    "What do you think of {}?",
    "Write a few sentences about {}.",
    "Describe {} to a friend.",
    "What comes to mind when you hear of {}?",
    "Give me your view of {}.",
)
SYSTEM = "Answer in one or two short sentences."

TRAIN = """\
a wet Monday morning|the last bus home|a visit to the dentist|an old bicycle|the first snow
a quiet village|a starless night|a lost glove|a pile of dishes|a new neighbour|a small station
an empty fridge|the first day at work|a muddy path|a noisy crossing|a traffic jam|moving house
a flat tyre|a maths exam|a stray cat|a power cut|a stone bridge|a cold lake|a late flight
a garden in October|a burnt cake|a job interview|a city at night|a storm at sea|a waiting room
a lighthouse|a crowded market|an ant on the table|a missed call|a dusty attic|a slow computer
a desert road|a cabin in the snow|a football match|a quarrel with a friend|the taste of coffee
a forgotten birthday|a wooden boat|the smell of paint|a tax form|a tiny kitchen
a walk in the fog|a locked door|an abandoned factory|a leaking roof"""
VALIDATION = """\
a farewell at the airport|a faded photograph|learning to drive|a barking dog
a queue at the bank|a spider in the bath|a night shift|a wet tent|a silent library
a broken clock"""
HELD_OUT = """\
a ferry across a river|a chess game|a long meeting|a pair of tight shoes|a school play
a ripe peach|a hospital bed|a mountain hut|an unpaid bill|a letter from abroad
a public swimming pool|a church bell|a bowl of soup|a broken window|a train that is late
a field of sunflowers|a nervous speech|a fire alarm|a second-hand shop|a wedding in the rain
a beehive|a rusty gate|an early alarm|a song on the radio|a steep staircase|a lost passport
a chocolate factory|a dry well|a night in a tent|a puppet show|a cracked phone|a slow waiter
a museum on a Sunday|a barber shop|a frozen pipe|a kite on the beach|an angry customer
a cup of tea|a long winter|an orchestra rehearsal|a parking fine|a paper aeroplane
an empty theatre|a bad haircut|a vegetable garden|a lift that is stuck|a picnic|a toothache
a thunderstorm|a wrong number|a bakery at dawn|a dark cellar|a chess club|a sunburn
a birthday party|a scratched record|a ski lift|a pet goldfish|a hole in a sock|a crowded beach
a late apology|an escaped parrot|a heavy suitcase|a fishing trip|a bus full of children
a blunt knife|a rainbow|a sleepless night|a street musician|an old teacher|a wasp at breakfast
a paper map|a haunted house|a new haircut|a rejected application|a snowman|a crossword puzzle
a flooded cellar|a hot air balloon|a quiet Sunday|a typing error|a stolen bicycle
a jar of honey|an early spring|a broken promise|a tandem ride|a castle on a hill|a cold shower
a camping stove|a spelling test|a lonely bench|a surprise visit|a melted ice cream
a stage fright|a wool jumper|a blackbird in the hedge|an old radio|an unanswered letter
a shared umbrella|a narrow street"""
TOPICS = {
    split: [topic for line in text.splitlines() for topic in line.split("|")]
    for split, text in (("train", TRAIN), ("validation", VALIDATION), ("held out", HELD_OUT))
}


def questions(split: str, count: int) -> list[str]:
    """The first `count` questions of a split: each topic once, in forms that take turns, then each
    in its next form, ... Any first ones have all forms alike.

    Raises:
        ValueError: the split has fewer.
    """
    topics = TOPICS[split]
    every = [FORMS[(turn + place) % len(FORMS)].format(topic)
             for turn in range(len(FORMS)) for place, topic in enumerate(topics)]  # fmt: skip
    if count > len(every):
        raise ValueError(f"the split {split!r} has {len(every)} questions, expected {count}")
    return every[:count]


def conversations(asked: list[str]) -> list[list[dict[str, Any]]]:
    """Each question as the messages of a conversation."""
    system = {"role": "system", "content": SYSTEM}
    return [[system, {"role": "user", "content": question}] for question in asked]
