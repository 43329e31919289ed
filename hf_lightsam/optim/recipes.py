"""The table of the family: each name of the ``optim`` flag, the optimizer that it makes and the options it takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..errors import UsageError
from ..passes.learned_radius import HYPERGRADIENTS
from .adasam import AdaSAM
from .asam import ASAM
from .esam import ESAM
from .lets import LETSASAM, LETSSAM
from .lightsam import ASCENT_STATES, VARIANTS, LightSAM
from .monge_sam import MongeSAM
from .msam import MSAM
from .mup2 import SPLPSAM, MuP2SAM
from .radius import RHO_SCHEDULES
from .roles import ROLES, parse_roles
from .sam import DESCENTS, SAM
from .sampa import SAMPa
from .sharpness_aware import RHO_SCALES, SharpnessAwareOptimizer
from .ssam import DROPS, GROWTHS, SSAM


@dataclass(frozen=True)
class Option:
    """How one option is written in ``optim_args``.

    Attributes:
        parse: Makes the value from its text; raises ``ValueError`` for another text.
        accepted: What is accepted, for messages.
    """

    parse: Callable[[str], Any]
    accepted: str


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _choice(accepted: tuple[str, ...]) -> Option:
    def parse(text: str) -> str:
        if text not in accepted:
            raise ValueError(text)
        return text

    return Option(parse, " or ".join(accepted))


_NUMBER = Option(float, "a number")
_COUNT = Option(int, "a whole number")
_FLAG = Option(_boolean, "true or false")
_RADIUS = {"rho": _NUMBER, "foreach": _FLAG, "fused": _FLAG}
_CHANGING = {"rho_schedule": _choice(RHO_SCHEDULES), "adaptive_rho": _FLAG}
_ADAPTIVE = {**_RADIUS, **_CHANGING, "rho_scale": _choice(RHO_SCALES), "eps": _NUMBER}
_STATE = {"ascent_state": _choice(ASCENT_STATES)}
_LEARNED = {"rho_lr": _NUMBER, "rho_update_steps": _COUNT, "hypergradient": _choice(HYPERGRADIENTS)}
_REFRESH = {"update_steps": _COUNT, "update_epochs": _COUNT}
_ROLES = Option(parse_roles, f"pattern:role pairs parted by ';', each role one of {', '.join(ROLES)}")
_LAYERWISE = {"base_width": _COUNT, "width": _COUNT, "roles": _ROLES}
_MOMENTS = {"beta1": _NUMBER, "beta2": _NUMBER}


@dataclass(frozen=True)
class Recipe:
    """One row of the table.

    Attributes:
        name: The value of the ``optim`` flag.
        optimizer: The optimizer class; its ``plan_class`` says which gradients a step takes.
        summary: One line for help texts.
        paper: Where the method comes from.
        copies: Memory beyond weights and gradients, in copies of the trainable weights.
        options: The options of ``optim_args`` by name; the typed fields of ``LightSAMTrainingArguments`` among them.
        fixed: Arguments of the class that the name implies.
        prepare: Turns options into the arguments of the class.
    """

    name: str
    optimizer: type[SharpnessAwareOptimizer]
    summary: str
    options: Mapping[str, Option]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict
    paper: str = ""
    copies: str = ""

    def arguments(
        self, lr: float | None, options: Mapping[str, Any], *, implied: Collection[str] = ()
    ) -> dict[str, Any]:
        """Return the keyword arguments of :attr:`optimizer`, beside ``params``.

        Args:
            lr: Learning rate; None for the method's default.
            options: Values by the names in :attr:`options`.
            implied: Those of them that nobody asked for: they are left out where neither movement has them.

        Raises:
            UsageError: For an option that the recipe does not take, or a value out of range.
        """
        for name in options:
            if name not in self.options:
                raise UsageError(f"{name}: not an option of {self.name}, which takes {', '.join(self.options)}")
        prepared = self.prepare(join_betas(dict(options)))
        for name, value in options.items():
            if name not in implied and name not in prepared and not (name in _MOMENTS and "betas" in prepared):
                movements = [f"{each}={options[each]!r}" for each in ("ascent", "descent") if each in options]
                raise UsageError(
                    f"{name}={value!r}: no option of {self.name} with {', '.join(movements)}; expected none"
                )
        arguments = {**self.fixed, **prepared}
        arguments = {"lr": self.optimizer.default_lr(**arguments) if lr is None else lr, **arguments}
        self.example(arguments)  # the optimizer checks its own arguments
        return arguments

    def example(self, arguments: Mapping[str, Any]) -> SharpnessAwareOptimizer:
        """Return an optimizer of one weight, made with what :meth:`arguments` gave, to be asked what it can do."""
        return self.optimizer([torch.zeros(1, requires_grad=True)], **arguments)

    def parse(self, text: str | None, argument: str = "optim_args") -> dict[str, Any]:
        """Parse ``"rho=1e-3,rho_scale=coordinate"``.

        Args:
            text: Comma-separated ``name=value`` pairs; spaces do not count. None or empty: no options.
            argument: What to call the text in messages.

        Raises:
            UsageError: If the text is no such list, names an unknown option or one twice, or a value does not parse.
        """
        options: dict[str, Any] = {}
        pairs = (text or "").replace(" ", "")
        for pair in pairs.split(",") if pairs else ():
            name, separator, value = pair.partition("=")
            if not (name and separator and value):
                raise UsageError(f"{argument}={text!r}: {pair!r} is not of the form name=value (pairs part by commas)")
            if name not in self.options:
                raise UsageError(
                    f"{argument}={text!r}: {name!r} is not an option of {self.name}, which takes "
                    f"{', '.join(self.options)}"
                )
            if name in options:
                raise UsageError(f"{argument}={text!r}: {name!r} is given twice; expected once")
            try:
                options[name] = self.options[name].parse(value)
            except ValueError:
                accepted = self.options[name].accepted
                raise UsageError(f"{argument}={text!r}: {name}={value!r}: expected {accepted}") from None
        return options


def join_betas(options: dict[str, Any]) -> dict[str, Any]:
    """Replace ``beta1`` and ``beta2`` by ``betas``."""
    if "beta1" in options or "beta2" in options:
        options["betas"] = (options.pop("beta1", 0.9), options.pop("beta2", 0.999))
    return options


_DESCENT_OPTIONS: dict[str, tuple[str, ...]] = {
    "adamw": ("betas", "eps"),
    "adam": ("betas", "eps"),
    "sgd": ("momentum",),
    "adagrad": ("eps",),
    "adafactor": (),  # its eps is a pair
    "adamax": ("betas", "eps"),
    "nadam": ("betas", "eps"),
    "radam": ("betas", "eps"),
    "rmsprop": ("momentum", "eps"),
}


def _prepare_sam(options: dict[str, Any], own: tuple[str, ...] = ()) -> dict[str, Any]:
    """Hand each descent the options that it has: Adam's defaults come with every ``TrainingArguments``.

    Args:
        options: Of the recipe.
        own: Names of those that are the method's own.
    """
    descent = options.get("descent", "adamw")
    taken = _DESCENT_OPTIONS.get(descent, ())
    if "momentum" in options and "momentum" not in taken:
        raise UsageError(
            f"momentum={options['momentum']!r}: not an option of descent={descent!r}; "
            "descent='sgd' and 'rmsprop' have it"
        )
    shared = ("descent", "rho", "foreach", "fused", *own)
    return {name: value for name, value in options.items() if name in shared or name in taken}


def _prepare_lightsam(options: dict[str, Any]) -> dict[str, Any]:
    """Leave Adam's betas, which come with every ``TrainingArguments``, to pairs with a movement of that form."""
    if "adam" not in (options.get("ascent") or "adam", options.get("descent") or "adam"):
        options.pop("betas", None)
    return options


def over_a_descent(name: str, optimizer: type[SAM], summary: str, own: Mapping[str, Option], **row: Any) -> Recipe:
    """Return the row of a method that is SAM with another ascent or plan, over any of the descents.

    Args:
        name: See :class:`Recipe`.
        optimizer: See :class:`Recipe`.
        summary: See :class:`Recipe`.
        own: The options that it has beyond SAM's.
        **row: Further attributes of :class:`Recipe`.
    """
    options = {**_RADIUS, "descent": _choice(tuple(DESCENTS)), **_MOMENTS, "eps": _NUMBER, "momentum": _NUMBER, **own}
    return Recipe(name, optimizer, summary, options, prepare=partial(_prepare_sam, own=tuple(own)), **row)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "lightsam_adam",
            LightSAM,
            "LightSAM-III: both movements are Adam's (the default)",
            {**_ADAPTIVE, **_MOMENTS, "bias_correction": _FLAG, **_STATE},
            {"variant": "adam"},
            paper="arXiv 2505.24399",
            copies="5",
        ),
        Recipe(
            "lightsam_adagrad",
            LightSAM,
            "LightSAM-II: both movements are AdaGrad's",
            {**_ADAPTIVE, **_STATE},
            {"variant": "adagrad"},
            paper="arXiv 2505.24399",
            copies="3",
        ),
        Recipe(
            "lightsam_adagrad_norm",
            LightSAM,
            "LightSAM-I: both movements are AdaGrad-Norm's",
            _ADAPTIVE,
            {"variant": "adagrad_norm"},
            paper="arXiv 2505.24399",
            copies="1",
        ),
        Recipe(
            "lightsam",
            LightSAM,
            "LightSAM with an ascent and a descent of any two of its forms",
            {
                **_ADAPTIVE,
                **_MOMENTS,
                "bias_correction": _FLAG,
                "ascent": _choice(tuple(VARIANTS)),
                "descent": _choice(tuple(VARIANTS)),
                **_STATE,
            },
            prepare=_prepare_lightsam,
            paper="arXiv 2505.24399",
            copies="1 to 5",
        ),
        over_a_descent(
            "sam",
            SAM,
            "SAM: a fixed radius along the normalised gradient, over a torch optimizer",
            _CHANGING,
            paper="arXiv 2010.01412",
            copies="1 + the descent's",
        ),
        over_a_descent(
            "asam",
            ASAM,
            "ASAM: SAM with steps in proportion to the weights' own sizes",
            {"eta": _NUMBER, **_CHANGING},
            paper="arXiv 2102.11600",
            copies="1 + the descent's",
        ),
        Recipe(
            "adasam",
            AdaSAM,
            "AdaSAM: SAM's ascent, AMSGrad's descent without bias correction",
            {**_RADIUS, **_CHANGING, **_MOMENTS, "eps": _NUMBER},
            paper="arXiv 2303.00565",
            copies="4",
        ),
        over_a_descent(
            "monge_sam",
            MongeSAM,
            "Monge SAM: SAM's perturbation, measured along the loss surface",
            {"alpha": _NUMBER, **_CHANGING},
            paper="arXiv 2502.08448",
            copies="1 + the descent's",
        ),
        over_a_descent(
            "mup2",
            MuP2SAM,
            "muP^2: SAM with the perturbation scaled by layer, for models initialised and trained in muP",
            _LAYERWISE,
            paper="arXiv 2411.00075",
            copies="1 + the descent's",
        ),
        over_a_descent(
            "sp_lp",
            SPLPSAM,
            "SP-LP: SAM with the perturbation scaled by layer, for the standard parametrisation (pretrained models)",
            _LAYERWISE,
            paper="arXiv 2411.00075",
            copies="1 + the descent's",
        ),
        over_a_descent(
            "ssam_fisher",
            SSAM,
            "SSAM-F: SAM that perturbs the weights of largest Fisher information only",
            {"sparsity": _NUMBER, "n_of_m": Option(str, "n:m, like 2:4"), "num_samples": _COUNT, **_REFRESH},
            fixed={"mask": "fisher"},
            paper="arXiv 2210.05177",
            copies="1.25 + the descent's",
        ),
        over_a_descent(
            "ssam_dynamic",
            SSAM,
            "SSAM-D: SAM that perturbs a selection of the weights, a part of it exchanged at each refresh",
            {
                "sparsity": _NUMBER,
                "drop_rate": _NUMBER,
                "drop": _choice(DROPS),
                "grow": _choice(GROWTHS),
                "mask_seed": _COUNT,
                **_REFRESH,
            },
            fixed={"mask": "dynamic"},
            paper="arXiv 2210.05177",
            copies="1.25 + the descent's",
        ),
        over_a_descent(
            "msam",
            MSAM,
            "mSAM: SAM with a perturbation of its own for each of num_micro_batches shards of the rows",
            {"num_micro_batches": _COUNT},
            paper="arXiv 2302.09693",
            copies="2 + the descent's",
        ),
        over_a_descent(
            "esam",
            ESAM,
            "ESAM: SAM over a random part of the tensors, descending on the rows that mind the perturbation most",
            {"beta": _NUMBER, "gamma": _NUMBER, "draw_seed": _COUNT},
            paper="arXiv 2110.03141",
            copies="1 + the descent's",
        ),
        over_a_descent(
            "sampa",
            SAMPa,
            "SAMPa: the two gradients do not wait for one another, and are taken on two processes at the same time",
            {"interpolation": _NUMBER},
            paper="arXiv 2410.10683",
            copies="3 + the descent's",
        ),
        over_a_descent(
            "lets_sam",
            LETSSAM,
            "LETS-SAM: SAM whose radius is learned on validation rows",
            _LEARNED,
            paper="arXiv 2408.08222",
            copies="3 to 5 + the descent's",
        ),
        over_a_descent(
            "lets_asam",
            LETSASAM,
            "LETS-ASAM: ASAM whose radius is learned on validation rows",
            {"eta": _NUMBER, **_LEARNED},
            paper="arXiv 2408.08222",
            copies="3 to 5 + the descent's",
        ),
    )
}
"""Name of the ``optim`` flag to recipe."""


def get_recipe(name: str) -> Recipe:
    """Return the recipe of a name.

    Raises:
        UsageError: For a name that is not in :data:`RECIPES`.
    """
    if name not in RECIPES:
        raise UsageError(f"optim={name!r}: expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


def optimizer_cls_and_kwargs(
    name: str = "lightsam_adam", *, lr: float | None = None, **options: Any
) -> tuple[type[SharpnessAwareOptimizer], dict[str, Any]]:
    """Return what the Trainer's argument ``optimizer_cls_and_kwargs`` takes.

    .. code-block:: python

        LightSAMTrainer(model, args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs("lightsam_adam", rho=0.1))

    Args:
        name: A name of :data:`RECIPES`.
        lr: Learning rate. Default: the method's, which is 5e-5, and 5e-4 for LightSAM's forms I and II.
        **options: Options of the recipe: ``rho``, ``rho_scale``, ``beta1``, ``beta2``, ``eps``, ...

    Raises:
        UsageError: For an unknown name or option, or a value out of range.
    """
    recipe = get_recipe(name)
    return recipe.optimizer, recipe.arguments(lr, options)
