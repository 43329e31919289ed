"""The words of the demo's sentences: no content word of training occurs in evaluation.

Each entry holds the words of the training sentences, then those of the evaluation sentences. Nouns are (singular,
plural); verbs are (base, third person, past, participle).
"""

from __future__ import annotations

import random
from typing import Any, Literal

Split = Literal["train", "validation"]

Noun = tuple[str, str]
Verb = tuple[str, str, str, str]


def _regular_nouns(words: str) -> tuple[Noun, ...]:
    return tuple((word, word + "s") for word in words.split())


def _regular_verbs(words: str) -> tuple[Verb, ...]:
    """Verbs that take -s and -ed as they are, or -d after an e."""
    past = {word: word + ("d" if word.endswith("e") else "ed") for word in words.split()}
    return tuple((word, word + "s", past[word], past[word]) for word in words.split())


LEXICON: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "person": (
        _regular_nouns("teacher doctor singer farmer pilot lawyer student baker guard neighbor gardener plumber judge"),
        _regular_nouns(
            "nurse painter driver banker soldier writer dancer sailor barber tailor senator librarian hunter"
        ),
    ),
    "man": (_regular_nouns("boy king uncle monk grandfather"), _regular_nouns("brother prince father duke grandson")),
    "woman": (_regular_nouns("girl queen aunt nun grandmother"), _regular_nouns("sister mother daughter niece bride")),
    "he": (
        ("John", "Peter", "David", "Robert", "Thomas", "Kevin"),
        ("Michael", "Daniel", "George", "Steven", "Brian", "Frank"),
    ),
    "she": (
        ("Mary", "Susan", "Laura", "Helen", "Emma", "Nancy"),
        ("Alice", "Julia", "Sarah", "Karen", "Linda", "Diana"),
    ),
    "thing": (
        _regular_nouns("book letter picture lamp table basket bottle ticket hammer ring"),
        _regular_nouns("map coin chair mirror bucket poster key blanket guitar necklace"),
    ),
    "place": (
        ("garden", "kitchen", "station", "village", "park", "hotel"),
        ("office", "forest", "market", "theater", "hospital", "library"),
    ),
    "mass": (
        ("water", "sand", "furniture", "bread", "money", "advice"),
        ("milk", "rice", "luggage", "butter", "equipment", "information"),
    ),
    "mood": (
        ("tired", "happy", "angry", "hungry", "famous", "polite"),
        ("nervous", "proud", "lonely", "cheerful", "careful", "rich"),
    ),
    "look": (
        ("old", "heavy", "expensive", "green", "beautiful", "dirty"),
        ("new", "cheap", "round", "blue", "strange", "clean"),
    ),
    # verbs with a person for an object
    "meet": (
        _regular_verbs("visit thank help greet follow admire praise trust"),
        _regular_verbs("call respect interview love protect welcome consult support"),
    ),
    # what one can do to oneself
    "reflexive": (
        _regular_verbs("admire praise defend introduce"),
        _regular_verbs("describe protect criticize embarrass"),
    ),
    # verbs with a thing for an object, which they cannot do without
    "handle": (
        (
            *_regular_verbs("mention repair remove purchase"),
            ("find", "finds", "found", "found"),
            ("keep", "keeps", "kept", "kept"),
        ),
        (
            *_regular_verbs("discover replace describe damage"),
            ("make", "makes", "made", "made"),
            ("get", "gets", "got", "got"),
        ),
    ),
    # verbs without an object
    "rest": (
        (
            *_regular_verbs("arrive laugh disappear sneeze shiver"),
            ("sleep", "sleeps", "slept", "slept"),
        ),
        (
            *_regular_verbs("yawn smile cough retire"),
            ("vanish", "vanishes", "vanished", "vanished"),
            ("kneel", "kneels", "knelt", "knelt"),
        ),
    ),
    # verbs without an object that are no manner of speaking either ("smiled that ..." is heard)
    "silent": (
        (
            *_regular_verbs("arrive disappear shiver"),
            ("sleep", "sleeps", "slept", "slept"),
        ),
        (
            *_regular_verbs("retire"),
            ("vanish", "vanishes", "vanished", "vanished"),
            ("kneel", "kneels", "knelt", "knelt"),
        ),
    ),
    # verbs that go with both what is counted and what is measured
    "obtain": (
        (
            *_regular_verbs("purchase"),
            ("find", "finds", "found", "found"),
            ("keep", "keeps", "kept", "kept"),
        ),
        (
            *_regular_verbs("need store"),
            ("get", "gets", "got", "got"),
        ),
    ),
    # verbs whose past is not their participle
    "irregular": (
        (
            ("take", "takes", "took", "taken"),
            ("break", "breaks", "broke", "broken"),
            ("hide", "hides", "hid", "hidden"),
            ("choose", "chooses", "chose", "chosen"),
            ("throw", "throws", "threw", "thrown"),
        ),
        (
            ("steal", "steals", "stole", "stolen"),
            ("draw", "draws", "drew", "drawn"),
            ("see", "sees", "saw", "seen"),
            ("give away", "gives away", "gave away", "given away"),
            ("forget", "forgets", "forgot", "forgotten"),
        ),
    ),
    # verbs with a clause for an object
    "say": (
        (
            *_regular_verbs("claim believe"),
            ("say", "says", "said", "said"),
            ("hear", "hears", "heard", "heard"),
        ),
        (
            *_regular_verbs("suggest assume imagine"),
            ("think", "thinks", "thought", "thought"),
        ),
    ),
    # give the thing to the person, never give the person the thing
    "donate": (
        ("donated", "explained", "revealed"),
        ("described", "demonstrated"),
    ),
    # cost the person the sum, never cost the sum to the person
    "cost": (("cost", "fined"), ("saved", "bet")),
    "sum": (
        ("ten dollars", "fifty dollars", "a fortune"),
        ("twenty euros", "a hundred euros", "thirty pounds"),
    ),
    "time": (
        ("yesterday", "on Monday", "last week"),
        ("this morning", "on Friday", "last year"),
    ),
    # prepositions, which are frame more than content, but these make distractors
    "near": (("near", "behind"), ("beside", "opposite")),
}
"""Kind of word to (training words, evaluation words)."""


class Words:
    """Draws words of one split, none twice in a sentence.

    Args:
        split: ``"train"`` or ``"validation"``.
        chooser: Source of randomness.
    """

    def __init__(self, split: Split, chooser: random.Random) -> None:
        self._column = 0 if split == "train" else 1
        self._chooser = chooser
        self._used: set[Any] = set()

    def __call__(self, kind: str) -> Any:
        """Draw a word of a kind of :data:`LEXICON`."""
        free = [word for word in LEXICON[kind][self._column] if word not in self._used]
        word = self._chooser.choice(free)
        self._used.add(word)
        return word

    def coin(self) -> bool:
        """Toss a coin."""
        return self._chooser.random() < 0.5

    def someone(self) -> str:
        """Draw a name."""
        name: str = self("he") if self.coin() else self("she")
        return name
