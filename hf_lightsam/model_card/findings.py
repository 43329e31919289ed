"""What came out, as a card tells it: tables, and judgements that are read off the numbers."""

from __future__ import annotations

import math
import statistics

from ..glue.suite import Summary
from ..glue.suite.flatness import RHO, M
from ..glue.suite.tables import difference, markdown, number
from .measured import Measured

FEW_SEEDS = 4
"""Below so many an interval is no more than the range of the differences, and nothing is said to be better."""


def results_table(found: Measured) -> str:
    """Return the Markdown table of scores over seeds, beside the baseline's."""
    header = ["split", "metric", "seeds", "mean", "sd", "median"]
    header += [f"{found.baseline.label}: mean", "sd", "difference [95 %]"] if found.baseline else []
    lines = []
    for (split, metric), (own, reference) in found.scores().items():
        cells = [split, metric, str(len(own.scores))]
        cells += [number(value, 4) for value in (own.mean, own.deviation, own.median)]
        if reference is not None:
            cells += [number(reference.mean, 4), number(reference.deviation, 4), difference(own)]
        lines.append(cells)
    return markdown(header, lines, numbers_from=2)


def _judgement(own: Summary) -> str:
    """Return ``better``, ``worse``, ``level`` (the interval holds 0) or ``open`` (too few pairs for an interval)."""
    if len(own.differences) < FEW_SEEDS:
        return "open"
    low, high = own.interval()
    return "better" if low > 0 else "worse" if high < 0 else "level"


def verdicts(found: Measured) -> str:
    """Return what the paired differences say, a sentence for each score."""
    if found.baseline is None:
        return "There is no baseline: these numbers compare nothing."
    told = {
        "better": "better than {}: the interval of the difference lies above 0",
        "worse": "worse than {}: the interval of the difference lies below 0",
        "level": "not told apart from {}: the interval of the difference holds 0",
        "open": f"open against {{}}: fewer than {FEW_SEEDS} seeds in common are too few to tell",
    }
    lines = [
        f"- {split}, {metric}: {told[_judgement(own)].format(found.baseline.label)} ({difference(own)})."
        for (split, metric), (own, _) in found.scores().items()
    ]
    pairs = min(len(own.differences) for own, _ in found.scores().values())
    lines += [
        "",
        "Differences are paired: with one seed both have the same rows in the same order, the same initial head and "
        "the same dropout seed. "
        + (
            f"The interval is a percentile bootstrap over {pairs} seeds."
            if pairs >= FEW_SEEDS
            else "The interval is the range of the differences, which covers less than 95 %."
        ),
    ]
    return "\n".join(lines)


def limits(found: Measured) -> str:
    """Return intended use and limits; whether it was better than the baseline is read off the numbers."""
    lines = []
    if found.baseline is not None:
        by_judgement: dict[str, list[str]] = {}
        for (split, metric), (own, _) in found.scores().items():
            by_judgement.setdefault(_judgement(own), []).append(f"{metric} ({split})")
        name = found.baseline.label
        better, worse = (", ".join(by_judgement.get(kind, [])) for kind in ("better", "worse"))
        if better:
            lines.append(f"It beat {name} on {better}.")
        elif set(by_judgement) == {"open"}:
            lines.append(f"**Whether it beats {name} is open: the seeds are too few to tell.**")
        else:
            lines.append(f"**It did not beat {name} in these runs.**")
        if worse:
            lines.append(f"**It was worse than {name} on {worse}.**")
        ratio = found.ratio("step_seconds")
        if not math.isnan(ratio):
            lines.append(f"A step took {ratio:.2f} times {name}'s.")
    lines.append(
        f"It is for seeing what {found.method.label} does on {found.task.folder} under the settings above, and for "
        "setting it against other optimizers; it was not made to be used as it is."
    )
    scores = "Scores are of the development set, whose labels are public, and not of GLUE's test set."
    limit = found.settings.get("max_train_samples")
    lines.append(scores if limit is None else f"No run saw more than {limit} training rows. {scores}")
    lines.append("English only; what biases the base model and GLUE's texts have was not looked at.")
    return "\n".join(f"- {line}" for line in lines)


def sharpness_text(found: Measured) -> str:
    """Return the table of m-sharpness before and after training; empty where it was not measured."""
    lines = []
    for label, index in ((found.method.label, 0), (found.baseline.label if found.baseline else "", 1)):
        before, after = (found.by_seed(f"sharpness_{when}")[index] for when in ("before", "after"))
        if before and after:
            values = [f"{statistics.fmean(each.values()):.4g}" for each in (before, after)]
            spread = "-" if len(after) < 2 else f"{statistics.stdev(after.values()):.2g}"
            lines.append([label, str(len(after)), *values, spread])
    if not lines:
        return ""
    table = markdown(["method", "seeds", "before", "after", "sd (after)"], lines, numbers_from=1)
    asked = found.settings["sharpness_samples"]
    return (
        "Rise of the training loss in the worst direction to first order (m-sharpness, arXiv 2010.01412, section 4.1), "
        f"at the radius {RHO} over groups of {M} rows, on the first {asked} training rows of each seed "
        f"(all, where they are fewer), the same for all methods:\n\n{table}"
    )


def cost_table(found: Measured) -> str:
    """Return the Markdown table of costs: medians over seeds, and as multiples of the baseline's."""
    place = "of the process" if found.settings.get("device") == "cpu" else "of the accelerator's allocator"
    mebi = 2**20
    kinds = {
        "rows whose gradient was taken": ("row_gradients", 1, 0),
        "seconds a step": ("step_seconds", 1, 4),
        f"peak memory {place}, MiB": ("peak_memory", mebi, 0),
        "optimizer state / weights": ("state_over_weights", 1, 2),
    }
    lines = []
    for kind, (column, unit, digits) in kinds.items():
        values = [statistics.median(each.values()) / unit if each else math.nan for each in found.by_seed(column)]
        lines.append([kind, *(number(value, digits) for value in values), number(found.ratio(column), 2)])
    header = ["", found.method.label, *([found.baseline.label, "ratio"] if found.baseline else [])]
    table = markdown(header, [line[: len(header)] for line in lines], numbers_from=1)
    told = "Medians over seeds" + ("; the ratio is that of runs of the same seed." if found.baseline else ".")
    return f"{told}\n\n{table}"
