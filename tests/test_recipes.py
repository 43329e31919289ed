"""The table of names, its options as text, and what is said of those that are wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser

from hf_lightsam import LightSAMTrainingArguments
from hf_lightsam.errors import UsageError, report_usage_errors
from hf_lightsam.optim import SAM, LightSAM
from hf_lightsam.optim.recipes import RECIPES, get_recipe, optimizer_cls_and_kwargs
from hf_lightsam.optim.rules import AdaGradNorm, Adam

NAN, INF = float("nan"), float("inf")


def weight() -> list[torch.Tensor]:
    return [torch.zeros(2, requires_grad=True)]


def light(**options: Any) -> Callable[[], Any]:
    return lambda: LightSAM(weight(), **options)


def sam(*positional: Any, **options: Any) -> Callable[[], Any]:
    return lambda: SAM(weight(), *positional, **options)


def parse(text: str, recipe: str = "lightsam_adam") -> Callable[[], Any]:
    return partial(get_recipe(recipe).parse, text)


def kwargs(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: optimizer_cls_and_kwargs(name, **options)


NON_NEGATIVE = "expected a finite number that is at least 0"
POSITIVE = "expected a finite number above 0"
VARIANTS = "expected one of 'adam', 'adagrad', 'adagrad_norm'"
FORM = "is not of the form name=value"

BAD: dict[str, tuple[Callable[[], Any], list[str]]] = {
    # The classes
    **{
        f"LightSAM {name}={value}": (light(**{name: value}), [f"{name}={value!r}", NON_NEGATIVE])
        for name in ("lr", "rho", "weight_decay")
        for value in (-1e-3, NAN, INF, "0.1", None, True)
        if (name, value) != ("lr", None)  # the default
    },
    **{
        f"LightSAM {variant} eps={value}": (light(variant=variant, eps=value), [f"eps={value!r}", POSITIVE])
        for variant in ("adam", "adagrad", "adagrad_norm")
        for value in (0.0, -1e-8, NAN, INF)
    },
    "betas above": (light(betas=(1.0, 0.9)), ["betas=(1.0, 0.9)", "1.0 is not in [0, 1)"]),
    "betas below": (light(betas=(0.9, -0.1)), ["betas=(0.9, -0.1)", "-0.1 is not in [0, 1)"]),
    "betas nan": (light(betas=(0.9, NAN)), ["betas=(0.9, nan)", "nan is not in [0, 1)"]),
    "betas one": (light(betas=(0.9,)), ["betas=(0.9,)", "a pair of numbers, each in [0, 1)"]),
    "betas number": (light(betas=0.9), ["betas=0.9", "a pair of numbers"]),
    "variant": (light(variant="iii"), ["variant='iii'", VARIANTS]),
    "variant case": (light(variant="Adam"), ["variant='Adam'", VARIANTS]),
    "rho_scale": (light(rho_scale="layer"), ["rho_scale='layer'", "expected one of 'global', 'coordinate'"]),
    "bias_correction": (light(bias_correction="yes"), ["bias_correction='yes'", "expected one of None, True, False"]),
    "foreach": (light(foreach="yes"), ["foreach='yes'", "expected one of None, True, False"]),
    "fused": (sam(fused=2), ["fused=2", "expected one of None, True, False"]),
    "foreach and fused": (light(foreach=True, fused=True), ["foreach=True, fused=True", "choose one"]),
    "foreach and fused of SAM": (sam(foreach=True, fused=True), ["foreach=True, fused=True", "choose one"]),
    "group": (
        lambda: LightSAM([{"params": weight(), "rho": 0.1}, {"params": weight(), "rho": -2.0}]),
        ["rho=-2.0", NON_NEGATIVE],
    ),
    "group lr": (lambda: LightSAM([{"params": weight(), "lr": NAN}]), ["lr=nan", NON_NEGATIVE]),
    "group betas": (lambda: LightSAM([{"params": weight(), "betas": (2, 0)}]), ["betas=(2, 0)", "2 is not in [0, 1)"]),
    **{
        f"SAM {name}={value}": (sam(**{name: value}), [f"{name}={value!r}", NON_NEGATIVE])
        for name in ("lr", "rho", "weight_decay", "eps")
        for value in (-1e-3, NAN, INF)
    },
    "SAM betas": (sam(betas=(0.9, 1.5)), ["betas=(0.9, 1.5)", "1.5 is not in [0, 1)"]),
    "SAM descent": (sam("lion"), ["descent='lion'", "expected one of 'adamw', 'adam', 'sgd', 'adagrad'"]),
    "SAM descent type": (sam(3), ["descent=3", "expected an optimizer class or one of adamw, adam, sgd, adagrad"]),
    "SAM option": (sam("sgd", beta=1), ["descent='sgd'", "unexpected keyword argument 'beta'"]),
    "SAM nesterov": (sam("sgd", nesterov=True), ["descent='sgd'", "Nesterov momentum requires a momentum"]),
    # optim_args
    **{
        f"optim_args {text}": (parse(text), [f"optim_args={text!r}", FORM])
        for text in ("rho", "rho=", "=1", "=", ",", "rho=1,", ",rho=1", "rho=1,,eps=1", "rho:1")
    },
    "option": (parse("rho=1,radius=2"), ["optim_args='rho=1,radius=2'", "'radius' is not an option", "rho, foreach"]),
    "option case": (parse("Rho=1"), ["'Rho' is not an option of lightsam_adam", "beta1"]),
    "option of another": (parse("beta1=0.9", "lightsam_adagrad"), ["'beta1' is not an option of lightsam_adagrad"]),
    "twice": (parse("rho=1,eps=1,rho=1"), ["optim_args='rho=1,eps=1,rho=1'", "'rho' is given twice; expected once"]),
    "number": (parse("rho=large"), ["optim_args='rho=large'", "rho='large'", "expected a number"]),
    "two signs": (parse("rho==1"), ["rho='=1'", "expected a number"]),
    "other separator": (parse("rho=1;eps=1"), ["rho='1;eps=1'", "expected a number"]),
    "flag": (parse("fused=maybe"), ["fused='maybe'", "expected true or false"]),
    "choice": (parse("rho_scale=layer"), ["rho_scale='layer'", "expected global or coordinate"]),
    "descent": (parse("descent=lion", "sam"), ["descent='lion'", "expected adamw or adam or sgd or adagrad"]),
    # Names and keyword arguments
    "name": (partial(get_recipe, "lightsam_sgd"), ["optim='lightsam_sgd'", "expected one of", *RECIPES]),
    "name of kwargs": (kwargs("adam"), ["optim='adam'", "expected one of lightsam_adam"]),
    "kwargs option": (kwargs("lightsam_adam", radius=1), ["radius", "lightsam_adam, which takes rho"]),
    **{f"kwargs {name} rho": (kwargs(name, rho=-1.0), ["rho=-1.0", NON_NEGATIVE]) for name in RECIPES},
    **{f"kwargs {name} lr": (kwargs(name, lr=-1.0), ["lr=-1.0", NON_NEGATIVE]) for name in RECIPES},
    "kwargs beta2": (kwargs("lightsam_adam", beta2=1.0), ["betas=(0.9, 1.0)", "1.0 is not in [0, 1)"]),
    "kwargs beta1 of sgd": (
        kwargs("sam", descent="sgd", beta1=0.8),
        ["beta1=0.8", "no option of sam", "descent='sgd'"],
    ),
    "kwargs eps of adafactor": (kwargs("asam", descent="adafactor", eps=1e-6), ["eps=1e-06", "descent='adafactor'"]),
    "kwargs beta2 without Adam": (
        kwargs("lightsam", ascent="adagrad", descent="adagrad", beta2=0.9),
        ["beta2=0.9", "ascent='adagrad', descent='adagrad'"],
    ),
    "kwargs beta1 of sam": (kwargs("sam", beta1=-0.5), ["betas=(-0.5, 0.999)", "-0.5 is not in [0, 1)"]),
    "kwargs momentum": (
        kwargs("sam", momentum=0.9),
        ["momentum=0.9", "descent='adamw'", "'sgd' and 'rmsprop' have it"],
    ),
    "kwargs negative momentum": (kwargs("sam", descent="sgd", momentum=-1.0), ["momentum=-1.0", NON_NEGATIVE]),
    "kwargs descent": (kwargs("sam", descent="lion"), ["descent='lion'", "expected one of"]),
    "kwargs foreach and fused": (kwargs("lightsam_adagrad", foreach=True, fused=True), ["foreach=True, fused=True"]),
}


@pytest.mark.parametrize(("call", "parts"), BAD.values(), ids=BAD)
def test_message_names_the_argument_its_value_and_what_is_accepted(
    call: Callable[[], Any], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    with pytest.raises(SystemExit) as left, report_usage_errors("program"):
        call()
    assert left.value.code == 2
    assert re.fullmatch(r"program: error: .+\n", capsys.readouterr().err)


# ---- Good values ----------------------------------------------------------------------------------------------

GOOD: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rho": ("lightsam_adam", "rho=1e-3", {"rho": 1e-3}),
    "all of III": (
        "lightsam_adam",
        " rho = 0.2, rho_scale=coordinate ,beta1=0.8,beta2=0.99,eps=1e-6,bias_correction=True,foreach=no,fused=1",
        {
            "rho": 0.2,
            "rho_scale": "coordinate",
            "betas": (0.8, 0.99),
            "eps": 1e-6,
            "bias_correction": True,
            "foreach": False,
            "fused": True,
        },
    ),
    "one beta": ("lightsam_adam", "beta2=0.95", {"betas": (0.9, 0.95)}),
    "to the letter": ("lightsam_adam", "rho_scale=coordinate", {"rho_scale": "coordinate", "bias_correction": False}),
    "II": ("lightsam_adagrad", "eps=1e-4,foreach=true", {"eps": 1e-4, "foreach": True, "fused": None}),
    "I": ("lightsam_adagrad_norm", "rho_scale=coordinate,rho=2", {"rho": 2.0, "lr_scale": "global"}),
    "I by default": ("lightsam_adagrad_norm", "", {"rho": 0.05, "lr_scale": "coordinate"}),
    "sam": ("sam", "rho=0.1,beta1=0.5,eps=1e-7", {"rho": 0.1, "betas": (0.5, 0.999), "eps": 1e-7}),
    "sam of sgd": ("sam", "descent=sgd,momentum=0.9", {"momentum": 0.9, "rho": 0.05}),
    "spaces": ("sam", "  ", {"rho": 0.05}),
}


@pytest.mark.parametrize(("name", "text", "expected"), GOOD.values(), ids=GOOD)
def test_good_values_reach_the_optimizer(name: str, text: str, expected: dict[str, Any]) -> None:
    recipe = get_recipe(name)
    optimizer = recipe.optimizer(weight(), **recipe.arguments(3e-4, recipe.parse(text)))
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in expected} == expected
    assert group["lr"] == 3e-4
    for key in ("foreach", "fused"):
        if key in expected:
            assert optimizer.ascent.param_groups[0][key] == expected[key]


DEFAULT_RATES = {
    "lightsam_adam": 5e-5,
    "lightsam_adagrad": 5e-4,
    "lightsam_adagrad_norm": 5e-4,
    "lightsam": 5e-5,
    "sam": 5e-5,
    "adamw_torch": 5e-5,
}


@pytest.mark.parametrize("name", DEFAULT_RATES)
def test_default_learning_rate_is_the_methods(name: str, tmp_path: Path) -> None:
    rate = DEFAULT_RATES[name]
    options: dict[str, Any] = {"output_dir": str(tmp_path), "optim": name, "use_cpu": True, "report_to": "none"}
    assert LightSAMTrainingArguments(**options).learning_rate == rate
    assert LightSAMTrainingArguments(**options, learning_rate=1e-3).learning_rate == 1e-3
    (parsed,) = HfArgumentParser(LightSAMTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--optim", name, "--use_cpu", "--report_to", "none"]
    )
    assert parsed.learning_rate == rate
    if name != "adamw_torch":
        assert optimizer_cls_and_kwargs(name)[1]["lr"] == rate


def test_default_learning_rate_is_that_of_the_descent(tmp_path: Path) -> None:
    options: dict[str, Any] = {"output_dir": str(tmp_path), "optim": "lightsam", "use_cpu": True, "report_to": "none"}
    assert LightSAMTrainingArguments(**options, descent="adagrad").learning_rate == 5e-4
    assert LightSAMTrainingArguments(**options, optim_args="descent=adagrad_norm,ascent=adam").learning_rate == 5e-4
    assert LightSAMTrainingArguments(**options, ascent="adagrad").learning_rate == 5e-5
    weight = torch.zeros(1, requires_grad=True)
    assert [LightSAM([weight], variant=v).param_groups[0]["lr"] for v in ("adam", "adagrad", "adagrad_norm")] == [
        5e-5,
        5e-4,
        5e-4,
    ]


@pytest.mark.parametrize("text", [None, ""])
def test_no_options(text: str | None) -> None:
    assert get_recipe("lightsam_adam").parse(text) == {}


@pytest.mark.parametrize(
    ("name", "ascent", "descent"),
    [
        ("lightsam_adam", "Adam", "Adam"),
        ("lightsam_adagrad", "AdaGrad", "AdaGrad"),
        ("lightsam_adagrad_norm", "AdaGradNorm", "AdaGradNorm"),
        ("sam", "NormalizedGradient", "AdamW"),
    ],
)
def test_names_make_what_they_say(name: str, ascent: str, descent: str) -> None:
    cls, arguments = optimizer_cls_and_kwargs(name, lr=1e-3, rho=0.3)
    optimizer = cls(weight(), **arguments)
    assert (type(optimizer.ascent).__name__, type(optimizer.descent).__name__) == (ascent, descent)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["rho"]) == (1e-3, 0.3)
    assert RECIPES[name].summary


def test_defaults_of_the_function_are_those_of_the_class() -> None:
    cls, arguments = optimizer_cls_and_kwargs()
    assert cls is LightSAM
    assert cls(weight(), **arguments).param_groups[0]["lr"] == LightSAM(weight()).param_groups[0]["lr"] == 5e-5


@pytest.mark.parametrize("rule", [Adam, AdaGradNorm])
def test_rules_check_their_own_options(rule: Any) -> None:
    with pytest.raises(UsageError, match=f"lr=-1: {NON_NEGATIVE}"):
        rule(weight(), -1)
    optimizer = rule(weight(), 0.1)
    with pytest.raises(UsageError, match=f"eps=0: {POSITIVE}"):
        optimizer.add_param_group({"params": weight(), "eps": 0})
    assert len(optimizer.param_groups) == 1
