"""``hf-lightsam methods``: what it prints is what the classes do, and the documentation holds the same table."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lightsam import LightSAMTrainingArguments
from hf_lightsam.cli import main
from hf_lightsam.docstrings import arguments, description, plain_math
from hf_lightsam.methods_table import MethodInfo, as_markdown, as_text, method_info, shown, table
from hf_lightsam.optim.recipes import RECIPES, Option, Recipe, get_recipe
from hf_lightsam.optim.sam import DESCENTS, SAM
from hf_lightsam.training_args import optimizer_arguments

PAGES = Path(__file__).parents[1] / "docs" / "methods"


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("COLUMNS", "110")

    def tell(*argv: str) -> str:
        main(["methods", *argv])
        return capsys.readouterr().out

    return tell


@pytest.mark.parametrize("name", RECIPES)
def test_a_default_given_as_an_option_changes_nothing(name: str) -> None:
    recipe = get_recipe(name)
    method = method_info(recipe)
    assert [option.name for option in method.options] == list(recipe.options)
    for option in method.options:
        if option.default is None:
            continue
        descent = next(iter(option.of_descent), None)
        others = {} if descent in (None, "adamw") else {"descent": descent}
        recipe.parse(f"{option.name}={option.default}")  # it is a value that is accepted
        assert made(recipe, {**others, option.name: option.default}) == made(recipe, others), option.name


@pytest.mark.parametrize("name", RECIPES)
def test_another_value_than_the_default_changes_the_optimizer(name: str) -> None:
    """So the comparison with the default would notice a wrong one."""
    recipe = get_recipe(name)
    for option in method_info(recipe).options:
        if isinstance(option.default, float):
            descent = next(iter(option.of_descent), None)
            others = {} if descent in (None, "adamw") else {"descent": descent}
            assert made(recipe, {**others, option.name: option.default / 2 + 0.01}) != made(recipe, others), option.name


def made(recipe: Recipe, options: dict[str, Any]) -> tuple[Any, ...]:
    """What an optimizer with these options is like: its groups, its ascent's, its own plain attributes, its classes."""
    cls = recipe.optimizer
    optimizer = cls([torch.zeros(2, requires_grad=True)], **recipe.arguments(0.1, options))
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in (*optimizer.param_groups, *optimizer.ascent.param_groups)
    ]
    attributes = {key: value for key, value in vars(optimizer).items() if isinstance(value, (bool, int, float, str))}
    return groups, attributes, type(optimizer.ascent), type(optimizer.descent)


def test_options_of_the_descent_are_those_that_torch_has() -> None:
    options = {option.name: option for option in method_info(get_recipe("sam")).options}
    assert options["momentum"].of_descent == {"sgd": 0, "rmsprop": 0}
    assert options["eps"].of_descent["adagrad"] == 1e-10
    assert set(options["eps"].of_descent) == set(DESCENTS) - {"sgd", "adafactor"}
    assert options["beta2"].default == inspect.signature(torch.optim.AdamW).parameters["betas"].default[1]
    assert options["rho"].of_descent == {}


def test_engines_are_those_that_the_plans_do_not_refuse() -> None:
    methods = {method.name: method for method in table()}
    assert methods["sam"].engines == ["single process", "DDP", "FSDP2"]
    assert methods["msam"].engines == ["single process", "DDP"]
    assert methods["msam"].refused["FSDP2"] == get_recipe("msam").optimizer.plan_class.refused_engines["fsdp"]
    assert all("DeepSpeed" in method.refused for method in methods.values())


def test_options_are_found_through_what_a_recipe_makes_of_them() -> None:
    def prepare(options: dict[str, Any]) -> dict[str, Any]:
        return {"rho": options.pop("radius")} if "radius" in options else {}

    recipe = Recipe("other", SAM, "", {"radius": Option(float, "a number")}, {"descent": "sgd"}, prepare)
    (radius,) = method_info(recipe).options
    assert (radius.name, radius.default) == ("radius", 0.05)
    assert radius.description.startswith("Length of the perturbation")


@pytest.mark.parametrize("columns", [40, 100, 113, 120, 300])
def test_the_table_fits_a_terminal(columns: int) -> None:
    lines = as_text(table(), columns).splitlines()
    assert max(map(len, lines)) <= min(max(columns, 100), 120)
    firsts = [line.split()[0] for line in lines if line and not line.startswith((" ", "-"))]
    assert [first for first in firsts if first in RECIPES] == list(RECIPES)
    text = " ".join(" ".join(lines).split())
    for setting in ("eta=0.01", "num_micro_batches=2", "hypergradient=diagonal", "momentum=0 (sgd, rmsprop)"):
        assert setting in text


def test_json_holds_the_rows(told: Callable[..., str]) -> None:
    rows = json.loads(told("--json"))
    assert [row["name"] for row in rows] == list(RECIPES)
    assert rows[0]["url"] == "https://arxiv.org/abs/2505.24399"
    assert json.loads(told("asam", "--json")) == [row for row in rows if row["name"] == "asam"]


def test_the_documentation_holds_the_table(told: Callable[..., str]) -> None:
    text = (PAGES / "README.md").read_text()
    assert told("--markdown").strip() in text
    for method in table():
        assert len(as_markdown([method]).splitlines()[2].split(" | ")) == 6


@pytest.mark.parametrize("name", RECIPES)
def test_one_method(name: str, told: Callable[..., str]) -> None:
    out = told(name)
    assert max(map(len, out.splitlines())) <= 110
    assert out.startswith(f"{name}  {RECIPES[name].summary}")
    for markup in ("\\", ":math:", ":class:", "``", "{", "}"):
        assert markup not in out, markup
    method: MethodInfo = method_info(RECIPES[name])
    assert method.url in out
    assert all(f"\n  {option.name}" in out for option in method.options)
    assert " = " in out


def test_every_option_is_told_in_words() -> None:
    silent = {(m.name, o.name) for m in table() for o in m.options if not (o.description or o.of_descent)}
    assert silent == set()


def test_unknown_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["methods", "lion"])
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-lightsam methods: error: NAME='lion': expected one of lightsam_adam, ")
    assert all(name in error for name in RECIPES)


def test_a_reader_that_leaves_early_gets_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        main(["methods", "--json"])
        stdout.write("what Python flushes at its end")  # raises nothing either


class Documented(SAM):
    r"""A method (Someone, arXiv 0000.00000): what it does, in ``code`` and :class:`~some.module.Class`.

    .. math:: w_t = x_t + \frac{\rho}{\beta} \, s_t / (\lVert s_t \rVert_2 + 10^{-12}), \qquad
        \hat v_{t+1} = \max(\hat v_t, \sqrt{v})

    With :math:`\tfrac12 x^{l-1}`.

    - A list, whose
      second line goes on.

    Args:
        rho: Length, of
            two lines. Default: 0.05.
        eta: Another.

    Raises:
        UsageError: Never.
    """


def test_docstrings_become_text() -> None:
    assert description(Documented, 60) == (
        "A method (Someone, arXiv 0000.00000): what it does, in code\n"
        "and Class.\n\n"
        "    w_t = x_t + (rho / beta) s_t / (||s_t||_2 + 10^-12)\n"
        "    vhat_(t+1) = max(vhat_t, sqrt(v))\n\n"
        "With (1 / 2) x^(l-1).\n\n"
        "- A list, whose second line goes on."
    )
    assert arguments(Documented) == {"rho": "Length, of two lines. Default: 0.05.", "eta": "Another."}


@pytest.mark.parametrize(
    ("latex", "text"),
    [
        (r"\rho \, T^2 s_t / (\lVert T s_t \rVert_2 + 10^{-16})", "rho T^2 s_t / (||T s_t||_2 + 10^-16)"),
        (r"\nabla L_{S_j}(x_t)", "grad L_(S_j)(x_t)"),
        (r"B^+ = \text{the } \lceil \gamma |B| \rceil \text{ rows}", "B^+ = the ceil(gamma |B|) rows"),
        (r"\frac{a + b}{\sqrt{1 + \alpha^2}}", "((a + b) / (sqrt(1 + alpha^2)))"),
    ],
)
def test_formulas_become_text(latex: str, text: str) -> None:
    assert plain_math(latex) == text


# ---- The pages under docs/methods -------------------------------------------------------------------------------


def pages() -> dict[str, list[str]]:
    """File name to the methods in its heading."""
    headings = {path.name: path.read_text().splitlines()[0] for path in sorted(PAGES.glob("*.md"))}
    return {name: re.findall(r"`(\w+)`", heading) for name, heading in headings.items() if name != "README.md"}


def test_every_method_has_one_page_and_the_index_names_it() -> None:
    told = [name for names in pages().values() for name in names]
    assert sorted(told) == sorted(RECIPES)
    index = (PAGES / "README.md").read_text()
    for page, names in pages().items():
        (row,) = re.findall(rf"^\| \[\w+\]\({page}\) \| (.*?) \|", index, re.MULTILINE)
        assert re.findall(r"`(\w+)`", row) == names


@pytest.mark.parametrize("page", sorted(path.name for path in PAGES.glob("*.md") if path.name != "README.md"))
def test_a_page_tells_the_options_that_there_are(page: str) -> None:
    text = (PAGES / page).read_text()
    expected: dict[str, list[str]] = {}
    for name in pages()[page]:
        for option in method_info(RECIPES[name]).options:
            if not option.of_descent and option.name not in ("foreach", "fused"):
                default = "-" if option.default is None else shown(option.default)
                defaults = expected.setdefault(option.name, [])
                defaults.extend([default] * (default not in defaults))
    assert dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \| [A-Z`]", text, re.MULTILINE)) == {
        name: " / ".join(defaults) for name, defaults in expected.items()
    }


@pytest.mark.parametrize("page", sorted(path.name for path in PAGES.glob("*.md") if path.name != "README.md"))
def test_a_page_can_be_called_as_it_says(page: str, tmp_path: Path) -> None:
    text = (PAGES / page).read_text()
    calls = re.findall(
        r'^    LightSAMTrainingArguments\(\.\.\., optim="(\w+)", optim_args="(.*)"\)$', text, re.MULTILINE
    )
    assert {name for name, _ in calls} <= set(pages()[page])
    assert calls
    for name, options in calls:
        args = LightSAMTrainingArguments(str(tmp_path), optim=name, optim_args=options, use_cpu=True, report_to="none")
        assert optimizer_arguments(args)[0].name == name
    for section in ("When it helps, and when not", "Options", "Cost", "Traps", "Call it", "Where it differs from the"):
        assert f"\n## {section}" in text
    assert RECIPES[pages()[page][0]].paper.removeprefix("arXiv ") in text


def test_the_readme_has_the_family_with_its_costs() -> None:
    text = (PAGES.parents[1] / "README.md").read_text().split("<!-- methods -->")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()[2:]]
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row[0])] == list(RECIPES)
    for names, method, _, gradients, copies in rows:
        for info in (method_info(RECIPES[name]) for name in re.findall(r"`(\w+)`", names)):
            assert info.url in method
            assert copies == info.copies
            assert gradients.split(" ")[0].rstrip(",") == info.evaluations.split(" ")[0]
