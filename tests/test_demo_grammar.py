"""The demo's sentences: balanced, new in evaluation, the same everywhere, and not to be told by their words alone."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from hf_lightsam import UsageError
from hf_lightsam.demo.dataset import DESCRIPTION, make_dataset, make_rows
from hf_lightsam.demo.lexicon import LEXICON, Words
from hf_lightsam.demo.phenomena import PHENOMENA

SPLITS = ("train", "validation")


def words_of(entry) -> set[str]:
    parts = [entry] if isinstance(entry, str) else entry
    return {word for part in parts for word in part.split()} - {"a", "on", "away"}


def test_content_words_of_evaluation_are_new() -> None:
    columns = [set().union(*(words_of(entry) for kind in LEXICON.values() for entry in kind[i])) for i in range(2)]
    # Units of counted sums and times recur; what is content is the rest.
    assert columns[0] & columns[1] <= {"last"}
    assert all(len(kind[0]) >= 2 <= len(kind[1]) for kind in LEXICON.values())


def test_frames_of_evaluation_are_new() -> None:
    """No evaluation sentence has the pattern of a training sentence, content words left out."""
    content = {word for kind in LEXICON.values() for column in kind for entry in column for word in words_of(entry)}

    def pattern(sentence: str) -> str:
        return " ".join(
            "_" if word.lower() in content or word in content else word for word in re.findall(r"\w+", sentence)
        )

    patterns = [{pattern(row["sentence"]) for row in make_rows(split, 900, 0)} for split in SPLITS]
    assert not patterns[0] & patterns[1]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("seed", [0, 1])
def test_pairs_are_balanced_and_unique(split: str, seed: int) -> None:
    rows = make_rows(split, 300, seed)
    assert len(rows) == 600
    assert len({row["sentence"] for row in rows}) == 600
    pairs = defaultdict(list)
    for row in rows:
        pairs[row["pair"], row["phenomenon"], row["frame"]].append(row)
    assert len(pairs) == 300
    assert all(sorted(row["label"] for row in pair) == [0, 1] for pair in pairs.values())
    counts = Counter(row["phenomenon"] for row in rows)
    assert set(counts) == {phenomenon.name for phenomenon in PHENOMENA}
    assert max(counts.values()) - min(counts.values()) <= 2
    assert len({row["frame"] for row in rows}) == sum(len(p.frames[split]) for p in PHENOMENA)


def test_a_dozen_phenomena_with_frames_in_both_splits() -> None:
    assert len(PHENOMENA) >= 12
    for phenomenon in PHENOMENA:
        assert phenomenon.description.endswith(".")
        names = [{frame.__name__ for frame in phenomenon.frames[split]} for split in SPLITS]
        assert names[0]
        assert names[1]
        assert not names[0] & names[1]


@pytest.mark.parametrize("split", SPLITS)
def test_pairs_are_minimal(split: str) -> None:
    """The sentences of a pair differ by a word or two, or by their order."""
    pairs = defaultdict(dict)
    for row in make_rows(split, 600, 0):
        pairs[row["pair"]][row["label"]] = Counter(re.findall(r"\w+", row["sentence"].lower()))
    for pair in pairs.values():
        only = (pair[0] - pair[1]).total(), (pair[1] - pair[0]).total()
        assert max(only) <= 4, pair


@pytest.mark.parametrize("split", SPLITS)
def test_sentences_are_well_spelled(split: str) -> None:
    for row in make_rows(split, 900, 3):
        text = row["sentence"]
        assert re.fullmatch(r"[A-Z][A-Za-z', ]*[.?]", text), text
        assert not re.search(r"  | [,.?]|\ba [aeiou]|\b(\w+) \1\b|ys\b(?<!boys)(?<!days)(?<!keys)(?<!always)", text), (
            text
        )


def test_same_rows_in_another_process() -> None:
    """Whose hashes are others."""
    code = "from hf_lightsam.demo.dataset import make_rows; print(make_rows('train', 40, 5)); print(hash('a'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True
    )
    rows, its_hash = done.stdout.splitlines()
    assert rows == str(make_rows("train", 40, 5))
    assert int(its_hash) != hash("a")
    assert make_rows("train", 40, 5) != make_rows("train", 40, 6)


def test_dataset() -> None:
    rows = make_dataset(seed=0)
    assert sum(split.num_rows for split in rows.values()) == 2040
    assert rows["train"].features["label"].names == ["unacceptable", "acceptable"]
    assert "made by a program" in DESCRIPTION
    assert rows["train"].info.description == DESCRIPTION
    assert not set(rows["train"]["sentence"]) & set(rows["validation"]["sentence"])


def test_words_alone_do_not_tell() -> None:
    """Logistic regression on bags of words stays near chance on the evaluation sentences."""
    train, validation = (make_rows(split, 600, 0) for split in SPLITS)
    vectorizer = CountVectorizer(token_pattern=r"[^ ]+")
    features = vectorizer.fit_transform([row["sentence"] for row in train])
    model = LogisticRegression(max_iter=1000).fit(features, [row["label"] for row in train])
    unseen = vectorizer.transform([row["sentence"] for row in validation])
    assert 0.42 < model.score(unseen, [row["label"] for row in validation]) < 0.58


def test_words_are_drawn_once_in_a_sentence() -> None:
    import random

    w = Words("train", random.Random(0))
    drawn = [w("man") for _ in range(5)]
    assert len(set(drawn)) == 5


@pytest.mark.parametrize(
    ("split", "num_pairs", "message"),
    [
        ("test", 10, "split='test': expected one of 'train', 'validation'"),
        ("train", 0, "num_pairs=0: expected a whole number above 0"),
        ("train", 100_000, "num_pairs=100000: the grammar has no more new train pairs"),
    ],
)
def test_bad_arguments(split: str, num_pairs: int, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        make_rows(split, num_pairs, 0)
