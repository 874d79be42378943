"""Words for small tasks: common English words of three to seven letters, and made-up ones that nobody has seen."""

from __future__ import annotations

import random

WORDS: tuple[str, ...] = tuple(
    """
    able acid actor after again agree alarm album amber angle ankle apple april apron arena arrow aside atlas attic
    autumn bacon badge baker banana barn basin basket battle beach beard beast bell berry bike bird blade blanket blue
    board boat bone book boot border bottle bottom bowl branch brave bread breeze brick bridge bright broom brother
    brown brush bucket bundle butter button cabin cable cactus camel camera candle canyon captain carpet carrot castle
    cattle cave cellar chain chair chalk cheese cherry chess chicken child circle city clay clean cliff clock cloud
    coast coat cobra coffee coin cold color comet copper coral corner cotton couch cousin cradle crane cream crow crown
    curtain dance danger dawn deep deer desert desk diamond dinner dolphin donkey door dragon drawer dream dress drum
    duck eagle early earth east edge eight elbow empty engine evening fabric falcon family farm father feather fence
    field finger fire fish flag flame flock floor flour flower forest fork fossil fox frame frog frost fruit garden
    garlic gate ghost giant ginger glass globe glove goat gold goose grape grass gravel green guitar hammer harbor hat
    hawk heart hedge helmet hill honey hook horse hotel house ice igloo ink iron island ivory jacket jar jelly jewel
    jungle kettle key king kitchen kite kitten knee knife ladder lake lamp lantern leaf leather lemon lettuce light
    lion lizard lobster lock lunch magnet mango maple marble market meadow melon metal milk mirror monkey moon morning
    mother motor mouse museum music napkin needle nest night north novel nurse oak oasis ocean olive onion orange orbit
    otter oven owl paint palace panda paper parade parrot pasture peach pearl pencil penguin pepper piano pillow pilot
    pine planet plate pocket pond pony potato prince prize puzzle quiet quilt rabbit radio rain ranch raven ribbon rice
    ring river road robin rocket roof rope rose saddle sail salad salt sand school scissor sea seed shadow shark sheep
    shell ship shirt shoe silver sister sky sleep snail snake snow soap sock song soup south spider spoon spring square
    star station stone storm street sugar summer sun swan table tailor tea temple tent thunder tiger timber toast
    tomato tower town train tree truck tunnel turtle uncle valley velvet village violin wagon wall walnut water whale
    wheat wheel whistle window winter wolf wood wool yard yellow zebra
    """.split()  # noqa: SIM905
)
NAMES: tuple[str, ...] = (
    *("Anna", "Ben", "Carl", "Dora", "Emma", "Finn", "Greta", "Hugo", "Ida", "Jack", "Kate", "Leo", "Mia", "Nina"),
    *("Otto", "Paul", "Rosa", "Sam", "Tom", "Uma", "Vera", "Will", "Yara", "Zoe"),
)


def made_up(rng: random.Random, syllables: int) -> str:
    """A word that can be spoken and means nothing, two letters to a syllable."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables))


def a_word(rng: random.Random, *, longest: int = 7) -> str:
    """A real word two times out of three, else a made-up one of four or six letters."""
    if rng.random() < 1 / 3:
        return made_up(rng, rng.randint(2, 3 if longest >= 6 else 2))
    word = rng.choice(WORDS)
    while len(word) > longest:
        word = rng.choice(WORDS)
    return word
