"""The grammar of the demo: sentence frames that each make a minimal pair, acceptable and not.

A frame is a function that draws words and returns the two sentences. Each phenomenon has frames for training and other
ones for evaluation. Frames are balanced so that no single word tells the label: a word that makes one sentence bad
makes another one good, by a coin or by a frame beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .lexicon import Split, Words

Pair = tuple[str, str]
Frame = Callable[[Words], Pair]


@dataclass(frozen=True)
class Phenomenon:
    """One rule of English that the unacceptable sentence of a pair breaks.

    Attributes:
        name: Short name.
        description: The rule, in a line.
        frames: The frames of each split.
    """

    name: str
    description: str
    frames: dict[Split, list[Frame]] = field(default_factory=lambda: {"train": [], "validation": []})


_DESCRIPTIONS = {
    "agreement_distractor": "The verb agrees with the subject, not with a noun that stands nearer.",
    "agreement_relative": "The verb agrees with the subject across a relative clause.",
    "determiner_noun": "This and that go with singular nouns, these and those with plural ones.",
    "anaphor_gender": "A reflexive has the gender of what it refers to.",
    "anaphor_number": "A reflexive has the number of what it refers to.",
    "binding_domain": "A reflexive refers to the subject of its own clause.",
    "polarity_item": "Ever and any need a negation above them.",
    "transitivity": "Some verbs need an object, others cannot have one.",
    "dative": "Some verbs take 'the thing to the person', others only 'the person the thing'.",
    "wh_gap": "A question word or relative pronoun leaves a gap behind.",
    "adjunct_island": "One can ask out of what is said, not out of a reason.",
    "verb_form": "After 'have' stands a participle; alone stands a past form.",
    "inversion": "In questions the auxiliary stands before the subject and bears the tense.",
    "passive": "Only verbs with objects have a passive, and it has an auxiliary.",
    "count_mass": "Many goes with what is counted, much with what is measured.",
}

_BY_NAME = {name: Phenomenon(name, description) for name, description in _DESCRIPTIONS.items()}


def _frame(name: str, split: Split) -> Callable[[Frame], Frame]:
    def register(function: Frame) -> Frame:
        _BY_NAME[name].frames[split].append(function)
        return function

    return register


def _start(phrase: str) -> str:
    """Begin a sentence: ``"on Monday"`` becomes ``"On Monday"``."""
    return phrase[0].upper() + phrase[1:]


def _is(plural: bool) -> str:
    return "are" if plural else "is"


def _was(plural: bool) -> str:
    return "were" if plural else "was"


def _has(plural: bool) -> str:
    return "have" if plural else "has"


# ---- Agreement across a distractor --------------------------------------------------------------------------------


@_frame("agreement_distractor", "train")
def _distractor_be(w: Words) -> Pair:
    plural, head, other = w.coin(), w("person"), w("person")
    start = f"The {head[plural]} {w('near')} the {other[not plural]}"
    mood = w("mood")
    return f"{start} {_is(plural)} {mood}.", f"{start} {_is(not plural)} {mood}."


@_frame("agreement_distractor", "train")
def _distractor_have(w: Words) -> Pair:
    plural, head, other, verb, met = w.coin(), w("person"), w("person"), w("meet"), w.someone()
    start = f"The {head[plural]} {w('near')} the {other[not plural]}"
    return f"{start} {_has(plural)} {verb[3]} {met}.", f"{start} {_has(not plural)} {verb[3]} {met}."


@_frame("agreement_distractor", "validation")
def _distractor_place(w: Words) -> Pair:
    plural, head, other, mood = w.coin(), w("person"), w("person"), w("mood")
    start = f"In the {w('place')}, the {head[plural]} {w('near')} the {other[not plural]}"
    return f"{start} {_is(plural)} {mood}.", f"{start} {_is(not plural)} {mood}."


@_frame("agreement_distractor", "validation")
def _distractor_thing(w: Words) -> Pair:
    plural, head, other, look = w.coin(), w("thing"), w("thing"), w("look")
    start = f"The {head[plural]} {w('near')} the {other[not plural]}"
    return f"{start} {_has(plural)} been {look}.", f"{start} {_has(not plural)} been {look}."


# ---- Agreement across a relative clause ---------------------------------------------------------------------------


@_frame("agreement_relative", "train")
def _relative_object(w: Words) -> Pair:
    plural, head, other, verb, mood = w.coin(), w("person"), w("person"), w("meet"), w("mood")
    start = f"The {head[plural]} that the {other[not plural]} {verb[2]}"
    return f"{start} {_is(plural)} {mood}.", f"{start} {_is(not plural)} {mood}."


@_frame("agreement_relative", "train")
def _relative_subject(w: Words) -> Pair:
    plural, head, other, verb, rest = w.coin(), w("person"), w("person"), w("meet"), w("rest")
    start = f"The {head[plural]} who {verb[2]} the {other[not plural]}"
    return f"{start} {_has(plural)} {rest[3]}.", f"{start} {_has(not plural)} {rest[3]}."


@_frame("agreement_relative", "validation")
def _relative_thing(w: Words) -> Pair:
    plural, head, other, verb, look = w.coin(), w("thing"), w("person"), w("handle"), w("look")
    start = f"The {head[plural]} which the {other[not plural]} {verb[2]}"
    return f"{start} {_is(plural)} {look}.", f"{start} {_is(not plural)} {look}."


@_frame("agreement_relative", "validation")
def _relative_reduced(w: Words) -> Pair:
    plural, head, other, verb, mood = w.coin(), w("person"), w("person"), w("meet"), w("mood")
    start = f"The {head[plural]} the {other[not plural]} {verb[2]} {w('time')}"
    return f"{start} {_is(plural)} {mood}.", f"{start} {_is(not plural)} {mood}."


# ---- Determiner and noun ------------------------------------------------------------------------------------------


@_frame("determiner_noun", "train")
def _determiner_object(w: Words) -> Pair:
    plural, noun, verb = w.coin(), w("thing"), w("handle")
    start = f"{w.someone()} {verb[2]} {'these' if plural else 'this'} {w('look')}"
    return f"{start} {noun[plural]}.", f"{start} {noun[not plural]}."


@_frame("determiner_noun", "train")
def _determiner_subject(w: Words) -> Pair:
    plural, noun, verb = w.coin(), w("person"), w("meet")
    start, end = f"{'Those' if plural else 'That'} {w('mood')}", f"{verb[2]} {w.someone()}."
    return f"{start} {noun[plural]} {end}", f"{start} {noun[not plural]} {end}"


@_frame("determiner_noun", "validation")
def _determiner_fronted(w: Words) -> Pair:
    plural, noun, verb = w.coin(), w("person"), w("rest")
    start, end = f"{_start(w('time'))}, {'these' if plural else 'this'}", f"{verb[2]} in the {w('place')}."
    return f"{start} {noun[plural]} {end}", f"{start} {noun[not plural]} {end}"


@_frame("determiner_noun", "validation")
def _determiner_passive(w: Words) -> Pair:
    plural, noun, verb = w.coin(), w("thing"), w("handle")
    start = f"The {w('person')[0]} {verb[2]} {'those' if plural else 'that'} {w('look')}"
    end = f"in the {w('place')}."
    return f"{start} {noun[plural]} {end}", f"{start} {noun[not plural]} {end}"


# ---- Reflexives ---------------------------------------------------------------------------------------------------

_SELF = ("herself", "himself")


@_frame("anaphor_gender", "train")
def _gender_name(w: Words) -> Pair:
    male, verb = w.coin(), w("reflexive")
    start = f"{w('he' if male else 'she')} {verb[2]}"
    return f"{start} {_SELF[male]}.", f"{start} {_SELF[not male]}."


@_frame("anaphor_gender", "train")
def _gender_noun(w: Words) -> Pair:
    male, verb = w.coin(), w("reflexive")
    start = f"The {w('man' if male else 'woman')[0]} {verb[2]}"
    return f"{start} {_SELF[male]} {(end := w('time'))}.", f"{start} {_SELF[not male]} {end}."


@_frame("anaphor_gender", "validation")
def _gender_relative(w: Words) -> Pair:
    male, verb = w.coin(), w("reflexive")
    start = f"The {w('man' if male else 'woman')[0]} in the {w('place')} did not {verb[0]}"
    return f"{start} {_SELF[male]}.", f"{start} {_SELF[not male]}."


@_frame("anaphor_gender", "validation")
def _gender_future(w: Words) -> Pair:
    male, verb = w.coin(), w("reflexive")
    start = f"{w('he' if male else 'she')} will never {verb[0]}"
    return f"{start} {_SELF[male]}.", f"{start} {_SELF[not male]}."


def _own(plural: bool, male: bool) -> str:
    return "themselves" if plural else _SELF[male]


@_frame("anaphor_number", "train")
def _number_plain(w: Words) -> Pair:
    plural, male, verb = w.coin(), w.coin(), w("reflexive")
    start = f"The {w('man' if male else 'woman')[plural]} {verb[2]}"
    return f"{start} {_own(plural, male)}.", f"{start} {_own(not plural, male)}."


@_frame("anaphor_number", "train")
def _number_modal(w: Words) -> Pair:
    plural, male, verb = w.coin(), w.coin(), w("reflexive")
    start = f"The {w('mood')} {w('man' if male else 'woman')[plural]} could {verb[0]}"
    return f"{start} {_own(plural, male)}.", f"{start} {_own(not plural, male)}."


@_frame("anaphor_number", "validation")
def _number_place(w: Words) -> Pair:
    plural, male, verb = w.coin(), w.coin(), w("reflexive")
    start = f"In the {w('place')}, the {w('man' if male else 'woman')[plural]} {verb[2]}"
    return f"{start} {_own(plural, male)}.", f"{start} {_own(not plural, male)}."


@_frame("anaphor_number", "validation")
def _number_want(w: Words) -> Pair:
    plural, male, verb = w.coin(), w.coin(), w("reflexive")
    start = f"The {w('man' if male else 'woman')[plural]} wanted to {verb[0]}"
    return f"{start} {_own(plural, male)}.", f"{start} {_own(not plural, male)}."


@_frame("binding_domain", "train")
def _binding_clause(w: Words) -> Pair:
    male, say, verb = w.coin(), w("say"), w("reflexive")
    outer, inner = (w("she"), w("man")[0]) if male else (w("he"), w("woman")[0])
    start = f"{outer} {say[2]} that the {inner} {verb[2]}"
    return f"{start} {_SELF[male]}.", f"{start} {_SELF[not male]}."


@_frame("binding_domain", "train")
def _binding_possessor(w: Words) -> Pair:
    male, verb = w.coin(), w("reflexive")
    owner, head = (w("she"), w("man")[0]) if male else (w("he"), w("woman")[0])
    start = f"{owner}'s {head} {verb[2]}"
    return f"{start} {_SELF[male]}.", f"{start} {_SELF[not male]}."


@_frame("binding_domain", "validation")
def _binding_relative(w: Words) -> Pair:
    male, meet, verb = w.coin(), w("meet"), w("reflexive")
    head, other = (w("man")[0], w("woman")[0]) if male else (w("woman")[0], w("man")[0])
    start = f"The {head} who {meet[2]} the {other} {verb[2]}"
    return f"{start} {_SELF[male]}.", f"{start} {_SELF[not male]}."


@_frame("binding_domain", "validation")
def _binding_why(w: Words) -> Pair:
    male, verb = w.coin(), w("reflexive")
    outer, inner = (w("she"), w("he")) if male else (w("he"), w("she"))
    start = f"{outer} wondered why {inner} {verb[2]}"
    return f"{start} {_SELF[male]}.", f"{start} {_SELF[not male]}."


# ---- Polarity items -----------------------------------------------------------------------------------------------


@_frame("polarity_item", "train")
def _polarity_ever(w: Words) -> Pair:
    head, other, meet, rest = w("person")[0], w("person")[0], w("meet"), w("rest")
    end = f"has ever {rest[3]}."
    return f"No {head} that the {other} {meet[2]} {end}", f"The {head} that no {other} {meet[2]} {end}"


@_frame("polarity_item", "train")
def _polarity_any(w: Words) -> Pair:
    head, meet, other, verb, thing = w("person")[0], w("meet"), w("person")[0], w("handle"), w("thing")[1]
    good = f"The {head} who {meet[2]} the {other} did not {verb[0]} any {thing}."
    return good, f"The {head} who did not {meet[0]} the {other} {verb[2]} any {thing}."


@_frame("polarity_item", "validation")
def _polarity_none(w: Words) -> Pair:
    head, other, meet, rest = w("person")[1], w("person")[1], w("meet"), w("rest")
    end = f"have ever {rest[3]}."
    return (
        f"None of the {head} that some of the {other} {meet[2]} {end}",
        f"Some of the {head} that none of the {other} {meet[2]} {end}",
    )


@_frame("polarity_item", "validation")
def _polarity_clause(w: Words) -> Pair:
    one, two, say, rest = w.someone(), w("person")[0], w("say"), w("rest")
    end = f"{w('handle')[2]} any {w('thing')[1]}."
    good = f"{one} did not {say[0]} that the {two} who {rest[2]} {end}"
    return good, f"{one} {say[2]} that the {two} who did not {rest[0]} {end}"


# ---- Arguments ----------------------------------------------------------------------------------------------------


@_frame("transitivity", "train")
def _transitivity_plain(w: Words) -> Pair:
    who, thing, rest, handle = w.someone(), w("thing")[0], w("rest"), w("handle")
    if w.coin():
        return f"{who} {rest[2]}.", f"{who} {rest[2]} the {thing}."
    return f"{who} {handle[2]} the {thing}.", f"{who} {handle[2]}."


@_frame("transitivity", "train")
def _transitivity_place(w: Words) -> Pair:
    who, thing, rest, handle = w("person")[0], w("thing")[1], w("rest"), w("handle")
    end = f"in the {w('place')}."
    if w.coin():
        return f"The {who} {rest[2]} {end}", f"The {who} {rest[2]} the {thing} {end}"
    return f"The {who} {handle[2]} the {thing} {end}", f"The {who} {handle[2]} {end}"


@_frame("transitivity", "validation")
def _transitivity_modal(w: Words) -> Pair:
    who, thing, rest, handle = w("person")[1], w("thing")[0], w("rest"), w("handle")
    if w.coin():
        return f"The {who} will {rest[0]}.", f"The {who} will {rest[0]} the {thing}."
    return f"The {who} will {handle[0]} the {thing}.", f"The {who} will {handle[0]}."


@_frame("transitivity", "validation")
def _transitivity_time(w: Words) -> Pair:
    who, thing, rest, handle = w.someone(), w("thing")[1], w("rest"), w("handle")
    start = f"{_start(w('time'))}, {who}"
    if w.coin():
        return f"{start} {rest[2]}.", f"{start} {rest[2]} some {thing}."
    return f"{start} {handle[2]} some {thing}.", f"{start} {handle[2]}."


@_frame("dative", "train")
def _dative_plain(w: Words) -> Pair:
    who, thing, person = w.someone(), w("thing")[0], w("person")[0]
    if w.coin():
        verb = w("donate")
        return f"{who} {verb} the {thing} to the {person}.", f"{who} {verb} the {person} the {thing}."
    verb, price = w("cost"), w("sum")
    start = f"The {thing}" if verb == "cost" else who
    return f"{start} {verb} the {person} {price}.", f"{start} {verb} {price} to the {person}."


@_frame("dative", "validation")
def _dative_time(w: Words) -> Pair:
    who, thing, person, time = w("person")[0], w("thing")[1], w.someone(), w("time")
    if w.coin():
        verb = w("donate")
        return f"The {who} {verb} the {thing} to {person} {time}.", f"The {who} {verb} {person} the {thing} {time}."
    verb, price = w("cost"), w("sum")
    return f"The {who} {verb} {person} {price} {time}.", f"The {who} {verb} {price} to {person} {time}."


# ---- Gaps and islands ---------------------------------------------------------------------------------------------


@_frame("wh_gap", "train")
def _gap_question(w: Words) -> Pair:
    who, verb, thing, place = w.someone(), w("handle"), w("thing")[0], w("place")
    if w.coin():
        return f"What did {who} {verb[0]} in the {place}?", f"What did {who} {verb[0]} the {thing} in the {place}?"
    return f"Did {who} {verb[0]} the {thing} in the {place}?", f"Did {who} {verb[0]} in the {place}?"


@_frame("wh_gap", "train")
def _gap_relative(w: Words) -> Pair:
    who, verb, head, thing, look = w.someone(), w("handle"), w("thing")[0], w("thing")[0], w("look")
    start = f"The {head} that {who} {verb[2]}"
    return f"{start} was {look}.", f"{start} the {thing} was {look}."


@_frame("wh_gap", "validation")
def _gap_embedded(w: Words) -> Pair:
    who, say, verb, thing = w("person")[0], w.someone(), w("handle"), w("thing")[1]
    if w.coin():
        return f"{say} asked what the {who} {verb[2]}.", f"{say} asked what the {who} {verb[2]} the {thing}."
    return f"{say} asked whether the {who} {verb[2]} the {thing}.", f"{say} asked whether the {who} {verb[2]}."


@_frame("wh_gap", "validation")
def _gap_person(w: Words) -> Pair:
    who, verb, head, other, mood = w("person")[1], w("meet"), w("person")[0], w("person")[0], w("mood")
    start = f"The {head} whom the {who} {verb[2]}"
    return f"{start} was {mood}.", f"{start} the {other} was {mood}."


@_frame("adjunct_island", "train")
def _island_question(w: Words) -> Pair:
    who, other, say, rest, verb = w.someone(), w("person")[0], w("say"), w("silent"), w("handle")
    if w.coin():
        end = f"the {other} {verb[2]}?"
        return f"What did {who} {say[0]} that {end}", f"What did {who} {rest[0]} because {end}"
    end = f"the {other} {verb[2]} the {w('thing')[0]}."
    return f"{who} {rest[2]} because {end}", f"{who} {rest[2]} that {end}"


@_frame("adjunct_island", "validation")
def _island_person(w: Words) -> Pair:
    who, other, say, rest, verb = w("person")[0], w.someone(), w("say"), w("silent"), w("meet")
    if w.coin():
        end = f"{other} {verb[2]}?"
        return f"Who did the {who} {say[0]} that {end}", f"Who did the {who} {rest[0]} because {end}"
    end = f"{other} {verb[2]} the {w('person')[0]}."
    return f"The {who} {rest[2]} because {end}", f"The {who} {rest[2]} that {end}"


# ---- Forms of the verb --------------------------------------------------------------------------------------------


@_frame("verb_form", "train")
def _form_object(w: Words) -> Pair:
    who, verb, thing = w("person")[0], w("irregular"), w("thing")[0]
    if w.coin():
        return f"The {who} has {verb[3]} the {thing}.", f"The {who} has {verb[2]} the {thing}."
    return f"The {who} {verb[2]} the {thing}.", f"The {who} {verb[3]} the {thing}."


@_frame("verb_form", "train")
def _form_passive(w: Words) -> Pair:
    plural, noun, verb, time = w.coin(), w("thing"), w("irregular"), w("time")
    start = f"The {noun[plural]} {_was(plural)}"
    return f"{start} {verb[3]} {time}.", f"{start} {verb[2]} {time}."


@_frame("verb_form", "validation")
def _form_adverb(w: Words) -> Pair:
    who, verb, thing = w.someone(), w("irregular"), w("thing")[1]
    if w.coin():
        return f"{who} had already {verb[3]} the {thing}.", f"{who} had already {verb[2]} the {thing}."
    return f"{who} then {verb[2]} the {thing}.", f"{who} then {verb[3]} the {thing}."


@_frame("verb_form", "validation")
def _form_modal(w: Words) -> Pair:
    who, verb, thing, place = w("person")[1], w("irregular"), w("thing")[0], w("place")
    end = f"the {thing} in the {place}."
    if w.coin():
        return f"The {who} must have {verb[3]} {end}", f"The {who} must have {verb[2]} {end}"
    return f"The {who} quickly {verb[2]} {end}", f"The {who} quickly {verb[3]} {end}"


@_frame("inversion", "train")
def _inversion_tense(w: Words) -> Pair:
    who, verb, thing = w("person")[0], w("handle"), w("thing")[0]
    if w.coin():
        return f"Where did the {who} {verb[0]} the {thing}?", f"Where did the {who} {verb[2]} the {thing}?"
    return f"The {who} {verb[2]} the {thing}.", f"The {who} did {verb[2]} the {thing}."


@_frame("inversion", "train")
def _inversion_order(w: Words) -> Pair:
    who, verb, thing = w.someone(), w("handle"), w("thing")[1]
    return f"Why will {who} {verb[0]} the {thing}?", f"Why {who} will {verb[0]} the {thing}?"


@_frame("inversion", "validation")
def _inversion_when(w: Words) -> Pair:
    who, verb, met = w("person")[1], w("meet"), w.someone()
    return f"When did the {who} {verb[0]} {met}?", f"When the {who} did {verb[0]} {met}?"


@_frame("inversion", "validation")
def _inversion_embedded(w: Words) -> Pair:
    who, met, verb, thing = w.someone(), w("person")[0], w("handle"), w("thing")[0]
    return f"{who} knew where the {met} could {verb[0]} the {thing}.", (
        f"{who} knew where could the {met} {verb[0]} the {thing}."
    )


@_frame("passive", "train")
def _passive_plain(w: Words) -> Pair:
    person, thing, rest, verb, time = w("person")[0], w("thing")[0], w("rest"), w("handle"), w("time")
    if w.coin():
        return f"The {person} has {rest[3]}.", f"The {person} was {rest[3]} {time}."
    return f"The {thing} was {verb[3]} {time}.", f"The {thing} has {verb[3]}."


@_frame("passive", "validation")
def _passive_by(w: Words) -> Pair:
    one, two, rest, verb = w("person")[1], w("person")[0], w("rest"), w("meet")
    if w.coin():
        return f"The {one} were {verb[3]} by the {two}.", f"The {one} were {rest[3]} by the {two}."
    return f"The {one} have {rest[3]} with the {two}.", f"The {one} have {verb[3]} with the {two}."


# ---- Counting and measuring ---------------------------------------------------------------------------------------


@_frame("count_mass", "train")
def _many_object(w: Words) -> Pair:
    who, verb, count = w.someone(), w("obtain"), w.coin()
    noun = w("thing")[1] if count else w("mass")
    good, bad = ("many", "much") if count else ("much", "many")
    start = f"{who} did not {verb[0]}"
    return f"{start} {good} {noun}.", f"{start} {bad} {noun}."


@_frame("count_mass", "train")
def _few_object(w: Words) -> Pair:
    who, verb, count = w("person")[0], w("obtain"), w.coin()
    noun = w("thing")[1] if count else w("mass")
    good, bad = ("too many", "too much") if count else ("too much", "too many")
    return f"The {who} {verb[2]} {good} {noun}.", f"The {who} {verb[2]} {bad} {noun}."


@_frame("count_mass", "validation")
def _many_future(w: Words) -> Pair:
    who, verb, count = w.someone(), w("obtain"), w.coin()
    noun = w("thing")[1] if count else w("mass")
    good, bad = ("many", "much") if count else ("much", "many")
    start, end = f"{who} will not {verb[0]}", f"in the {w('place')}."
    return f"{start} {good} {noun} {end}", f"{start} {bad} {noun} {end}"


@_frame("count_mass", "validation")
def _many_time(w: Words) -> Pair:
    who, verb, count = w("person")[1], w("obtain"), w.coin()
    noun = w("thing")[1] if count else w("mass")
    good, bad = ("too many", "too much") if count else ("too much", "too many")
    start = f"{_start(w('time'))}, the {who} {verb[2]}"
    return f"{start} {good} {noun}.", f"{start} {bad} {noun}."


PHENOMENA: tuple[Phenomenon, ...] = tuple(_BY_NAME.values())
"""All phenomena, in the order in which pairs are made."""
