"""``LightSAMTrainingArguments``: the options of the family as typed fields, and so as command-line flags."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .errors import UsageError
from .optim.recipes import RECIPES, Recipe, get_recipe
from .optim.validation import check_number
from .optim_flag import is_registered, optim_name, register
from .passes import CheaperAscent

register()  # before the parser asks the enum for its choices

_FIELDS = (
    "rho",
    "rho_scale",
    "rho_schedule",
    "adaptive_rho",
    "bias_correction",
    "ascent",
    "descent",
    "eta",
    "alpha",
    "base_width",
    "width",
    "roles",
    "num_micro_batches",
    "sparsity",
    "n_of_m",
    "num_samples",
    "update_steps",
    "update_epochs",
    "drop_rate",
    "drop",
    "grow",
    "mask_seed",
    "beta",
    "gamma",
    "draw_seed",
    "interpolation",
    "rho_lr",
    "rho_update_steps",
    "hypergradient",
)
"""Typed fields that are options of recipes, under the same names."""


@dataclass
class LightSAMTrainingArguments(TrainingArguments):
    """``TrainingArguments`` with the options of sharpness-aware methods; ``optim`` is ``"lightsam_adam"`` by default.

    ``weight_decay``, ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` keep their meaning. A field
    left at None takes the default of the method. Fields below that the chosen ``optim`` does not have are refused.

    > Method

    Args:
        optim: A name of the family (``hf-lightsam methods`` lists them), or any name that Transformers knows, which
            then trains as ever.
        learning_rate: As ever; at None the method's default, which it then holds: 5e-4 for ``lightsam_adagrad`` and
            ``lightsam_adagrad_norm`` (and ``lightsam`` with such a descent), else 5e-5. (Plain ``TrainingArguments``
            have 5e-5 for all.)
        rho: Radius of the perturbation, at least 0; 0 makes none. Default: the method's, 0.05 (``asam`` and
            ``lets_asam``: 0.5).
        rho_scale: LightSAM only. ``"global"``: ``rho`` is the length of the whole perturbation, for any model size.
            ``"coordinate"``: the paper's letter, where in forms II and III ``rho`` is a length for each weight.
            Default: ``"global"``.
        rho_schedule: LightSAM, ``sam``, ``asam``, ``adasam`` and ``monge_sam`` only. ``"lr"``: the radius follows the
            learning rate's schedule, warm-up and decay. Default: ``"constant"``.
        adaptive_rho: The same methods only. Keep the perturbation no longer than 3 % of the last descent step, so
            that a ``rho`` that is too large does no harm; the radius in use is logged as ``rho``. Default: false.
        bias_correction: ``lightsam_adam`` and ``lightsam`` only. Correct the bias of the moments, as Adam does, in
            movements of that form. Default: true, except with ``rho_scale="coordinate"``, which is the paper to the
            letter.
        ascent: ``lightsam`` only. Form of the ascent: ``"adam"``, ``"adagrad"`` or ``"adagrad_norm"``. Default:
            ``"adam"``.
        descent: ``lightsam``: form of the descent, as for ``ascent``. ``sam`` and the methods that are SAM with another
            perturbation: the optimizer that descends, ``"adamw"``, ``"sgd"``, ``"adafactor"`` or another of torch's.
            Default: ``"adam"`` and ``"adamw"``.
        eta: ``asam`` and ``lets_asam`` only. Added to the weights' absolute values, at least 0. Default: 0.01.
        alpha: ``monge_sam`` only. Length on the loss surface of a unit of the loss, at least 0. Default: 1; 0 is SAM.
        base_width: ``mup2`` and ``sp_lp`` only. Width (hidden size) at which they are SAM: that of the model on which
            ``rho`` was tuned. Default: 768.
        width: ``mup2`` and ``sp_lp`` only. The model's width. Default: its config's.
        roles: ``mup2`` and ``sp_lp`` only. Roles by pattern of parameter names, ``"pattern:role;pattern:role"``, each
            role one of input, hidden, output, fixed. Default: found from the model's modules.

        num_micro_batches: ``msam`` only. Shards of a step's rows, over all ranks together, each of which perturbs along
            its own gradient: a multiple of the number of ranks. Default: 2.
        sparsity: ``ssam_*`` only. Share of the weights that is not perturbed, in [0, 1). Default: 0.5.
        n_of_m: ``ssam_fisher`` only. ``"2:4"`` perturbs 2 of each 4 consecutive weights, instead of ``sparsity``.
        num_samples: ``ssam_fisher`` only. Rows of a step, or all it has, whose gradients renew the mask. Default: 16.
        update_steps: ``ssam_*`` only. Renew the mask every so many steps. Default: 100.
        update_epochs: ``ssam_*`` only. Renew the mask every so many epochs instead.
        drop_rate: ``ssam_dynamic`` only. Share of the selection exchanged at a refresh, at the start of the training,
            in [0, 1]. Default: 0.5.
        drop: ``ssam_dynamic`` only. What keeps a weight selected: its ``"gradient"`` (default) or the ``"weight"``.
        grow: ``ssam_dynamic`` only. What selects another: ``"random"`` (default), ``"gradient"`` or ``"weight"``.
        mask_seed: ``ssam_dynamic`` only. Seed of the random choices. Default: 0.
        beta: ``esam`` only. Share of the weight tensors that a step perturbs, in (0, 1]. Default: 0.6.
        gamma: ``esam`` only. Share of the rows that a step descends on, in (0, 1]. Default: 0.5.
        draw_seed: ``esam`` only. Seed of the draw of the tensors. Default: 0.
        interpolation: ``sampa`` only. The paper's lambda: share of the gradient at the look-ahead, from 0 to 1.
            Default: 0.2.
        rho_lr: ``lets_*`` only. Learning rate of the radius (of its logarithm, by Adam). Default: 0.01.
        rho_update_steps: ``lets_*`` only. Learn every so many steps: learning takes two more gradients. Default: 1.
        hypergradient: ``lets_*`` only. ``"diagonal"`` (the paper's approximation, the default) or ``"exact"`` (a
            Hessian-vector product).
        validation_fraction: ``lets_*`` only. Share of the training rows, between 0 and 1, that is kept apart to learn
            the radius on, where the trainer is not given a ``validation_dataset``. Default: 0.1.

    > Passes

    Args:
        replay_rng: Give the descent pass the random numbers of the ascent pass, so that both see the same dropout
            masks. Default: true.
        sync_ascent: Average the ascent gradient over all ranks, so that the step is that of one large batch. False:
            each rank perturbs by the gradient of its own rows (m-sharpness), which spares half of the communication;
            not with FSDP. Default: true.
        ascent_rows: Share of the rows of each micro-batch that the ascent gradient is taken on, in (0, 1]: a step costs
            ``1 + ascent_rows`` gradients. This and the next five are beyond the papers; see
            :class:`~hf_lightsam.passes.CheaperAscent`. Default: 1.
        ascent_every: Take a new ascent gradient in every so many steps only; those between perturb along the last one
            again. Default: 1.
        ascent_start: Share of the training, in [0, 1), that passes without a perturbation. Default: 0.
        ascent_gradient: ``"fresh"``, or ``"previous"``: perturb along the gradient of the last step's descent, so that
            a step costs one gradient. Default: ``"fresh"``.
        ascent_dtype: ``"bfloat16"``: take the ascent gradient alone under autocast to it. Default: None.
        ascent_embeddings: Whether the ascent has gradients for embeddings, and so perturbs them. Default: true.
        saved_weights: Where the weights are kept while they are perturbed: ``"device"``, or ``"host"``, which takes one
            copy of them off the GPU and sends it there and back in each step
            (:meth:`~hf_lightsam.optim.SharpnessAwareOptimizer.keep_saved_weights`). Not with FSDP, nor ``lets_*``.
            Default: ``"device"``, or as an optimizer that the trainer is given has it.
        ascent_kernels: Whose kernels perturb the weights: ``"torch"``, or ``"native"``, for training on CPUs: this
            package's own, which a C compiler builds in the first second and which copy and perturb in one pass
            (:meth:`~hf_lightsam.optim.SharpnessAwareOptimizer.use_ascent_kernels`). ``lightsam_*``, ``sam``,
            ``adasam``, ``msam``, ``sampa`` and ``lets_sam`` only. Default: ``"torch"``, or likewise.

    Raises:
        UsageError: At construction, for an option that is out of range, does not parse (``optim_args``), is given
            twice, or is not one of the chosen method's.
    """

    optim: str = field(
        default="lightsam_adam",
        metadata={
            "help": "The optimizer: "
            + "; ".join(f"{name} ({recipe.summary})" for name, recipe in RECIPES.items())
            + "; or any optimizer name of transformers."
        },
    )
    learning_rate: float | None = field(  # type: ignore[assignment]  # a number from __post_init__ on
        default=None,
        metadata={
            "help": "Peak learning rate. Default: the method's, 5e-5, and 5e-4 for lightsam_adagrad(_norm), whose "
            "steps shrink as they go on."
        },
    )
    rho: float | None = field(
        default=None,
        metadata={
            "help": "Radius of the perturbation, at least 0; 0 makes none. Default: that of the method, 0.05 or (asam, "
            "lets_asam) 0.5."
        },
    )
    rho_scale: Literal["global", "coordinate"] | None = field(
        default=None,
        metadata={
            "help": "LightSAM only. global (default): rho is the length that the whole perturbation would have if all "
            "weights moved alike. coordinate: the paper's letter, a length for each weight in forms II and III."
        },
    )
    rho_schedule: Literal["constant", "lr"] | None = field(
        default=None,
        metadata={
            "help": "LightSAM, sam, asam, adasam, monge_sam only. lr: the radius follows the learning rate's schedule. "
            "Default: constant."
        },
    )
    adaptive_rho: bool | None = field(
        default=None,
        metadata={
            "help": "LightSAM, sam, asam, adasam, monge_sam only. Keep the perturbation no longer than 0.03 times the "
            "last descent step, so that a rho that is too large does no harm. Default: false."
        },
    )
    bias_correction: bool | None = field(
        default=None,
        metadata={
            "help": "lightsam_adam and lightsam only. Correct the bias of the moments, as Adam does. Default: true, "
            "except with --rho_scale coordinate."
        },
    )
    ascent: str | None = field(
        default=None,
        metadata={"help": "lightsam only. Form of the ascent: adam (default), adagrad or adagrad_norm."},
    )
    descent: str | None = field(
        default=None,
        metadata={
            "help": "The optimizer that descends. Under sam and its kind: adamw (default), sgd, adafactor, ...; under "
            "lightsam: adam (default), adagrad or adagrad_norm."
        },
    )
    eta: float | None = field(
        default=None, metadata={"help": "asam, lets_asam only. Added to the weights' absolute values. Default: 0.01."}
    )
    alpha: float | None = field(
        default=None,
        metadata={"help": "monge_sam only. Length on the loss surface of a unit of the loss. Default: 1; 0 is SAM."},
    )
    base_width: int | None = field(
        default=None,
        metadata={"help": "mup2, sp_lp only. Width of the model on which rho was tuned. Default: 768."},
    )
    width: int | None = field(
        default=None, metadata={"help": "mup2, sp_lp only. The model's width. Default: its config's hidden size."}
    )
    roles: str | None = field(
        default=None,
        metadata={"help": "mup2, sp_lp only. pattern:role;pattern:role with roles input, hidden, output, fixed."},
    )
    num_micro_batches: int | None = field(
        default=None,
        metadata={"help": "msam only. Shards of a step's rows, each with a perturbation of its own. Default: 2."},
    )
    sparsity: float | None = field(
        default=None,
        metadata={"help": "ssam_* only. Share of the weights that is not perturbed, in [0, 1). Default: 0.5."},
    )
    n_of_m: str | None = field(
        default=None,
        metadata={"help": "ssam_fisher only. Perturb n of each m consecutive weights, like 2:4, instead of sparsity."},
    )
    num_samples: int | None = field(
        default=None, metadata={"help": "ssam_fisher only. Rows whose gradients renew the mask. Default: 16."}
    )
    update_steps: int | None = field(
        default=None, metadata={"help": "ssam_* only. Renew the mask every so many steps. Default: 100."}
    )
    update_epochs: int | None = field(
        default=None, metadata={"help": "ssam_* only. Renew the mask every so many epochs instead."}
    )
    drop_rate: float | None = field(
        default=None,
        metadata={"help": "ssam_dynamic only. Share of the selection exchanged at a first refresh. Default: 0.5."},
    )
    drop: str | None = field(
        default=None, metadata={"help": "ssam_dynamic only. What keeps a weight selected: gradient (default), weight."}
    )
    grow: str | None = field(
        default=None, metadata={"help": "ssam_dynamic only. What selects another: random (default), gradient, weight."}
    )
    mask_seed: int | None = field(
        default=None, metadata={"help": "ssam_dynamic only. Seed of the random choices. Default: 0."}
    )
    beta: float | None = field(
        default=None, metadata={"help": "esam only. Share of the weight tensors that a step perturbs. Default: 0.6."}
    )
    gamma: float | None = field(
        default=None, metadata={"help": "esam only. Share of the rows that a step descends on. Default: 0.5."}
    )
    draw_seed: int | None = field(
        default=None, metadata={"help": "esam only. Seed of the draw of the tensors. Default: 0."}
    )
    interpolation: float | None = field(
        default=None, metadata={"help": "sampa only. Share of the gradient at the look-ahead, 0 to 1. Default: 0.2."}
    )
    rho_lr: float | None = field(
        default=None, metadata={"help": "lets_* only. Learning rate of the radius's logarithm. Default: 0.01."}
    )
    rho_update_steps: int | None = field(
        default=None, metadata={"help": "lets_* only. Learn the radius every so many steps. Default: 1."}
    )
    hypergradient: str | None = field(
        default=None, metadata={"help": "lets_* only. diagonal (default) or exact (a Hessian-vector product)."}
    )
    validation_fraction: float | None = field(
        default=None,
        metadata={"help": "lets_* only. Share of the training rows kept apart to learn the radius on. Default: 0.1."},
    )
    replay_rng: bool = field(
        default=True,
        metadata={"help": "Give the descent pass the ascent pass's random numbers: the same dropout masks in both."},
    )
    sync_ascent: bool = field(
        default=True,
        metadata={
            "help": "Average the ascent gradient over ranks. False: each perturbs by its own rows' gradient, which "
            "spares half of the communication."
        },
    )

    ascent_rows: float = field(
        default=1.0,
        metadata={
            "help": "Share of the rows that the ascent gradient is taken on; a step costs 1 + so many gradients."
        },
    )
    ascent_every: int = field(
        default=1,
        metadata={"help": "Take a new ascent gradient in every so many steps, and perturb along the last one between."},
    )
    ascent_start: float = field(
        default=0.0, metadata={"help": "Share of the training that passes without a perturbation."}
    )
    ascent_gradient: Literal["fresh", "previous"] = field(
        default="fresh",
        metadata={"help": "previous: perturb along the gradient of the last descent; a step costs one gradient."},
    )
    ascent_dtype: Literal["bfloat16"] | None = field(
        default=None, metadata={"help": "bfloat16: take the ascent gradient, and that alone, under autocast to it."}
    )
    ascent_embeddings: bool = field(
        default=True, metadata={"help": "Whether the ascent has gradients for embeddings, and so perturbs them."}
    )
    saved_weights: Literal["device", "host"] | None = field(
        default=None,
        metadata={
            "help": "Where the weights are kept while they are perturbed. host: in the host's memory, which takes a "
            "copy of them off the GPU and sends it there and back in each step."
        },
    )
    ascent_kernels: Literal["torch", "native"] | None = field(
        default=None,
        metadata={
            "help": "Whose kernels perturb the weights. native: this package's own for CPUs, built by a C compiler, "
            "which copy and perturb in one pass."
        },
    )

    def __post_init__(self) -> None:
        """Check the method's options after Transformers has checked its own."""
        if self.learning_rate is None:
            self.learning_rate = self._default_learning_rate()
        super().__post_init__()
        cheaper = CheaperAscent.from_arguments(self)
        if is_registered(self.optim):
            recipe, arguments = optimizer_arguments(self)
            recipe.optimizer.plan_class.check_cheaper(cheaper)
            recipe.optimizer.check_saved_weights(self.saved_weights or "device")
            if self.ascent_kernels is not None:
                recipe.example(arguments).use_ascent_kernels(self.ascent_kernels)
            if self.validation_fraction is not None and not recipe.optimizer.plan_class.needs_validation:
                raise UsageError(
                    f"validation_fraction={self.validation_fraction!r}: optim={recipe.name!r} learns on no rows kept "
                    "apart; expected None, or lets_sam or lets_asam"
                )
        else:
            names = (*_FIELDS, "validation_fraction", "saved_weights", "ascent_kernels")
            given = [name for name in names if getattr(self, name) is not None]
            given += [f"ascent_{name}" for name in cheaper.changed]
            given += [name for name in ("replay_rng", "sync_ascent") if not getattr(self, name)]
            if given:
                raise UsageError(
                    f"{given[0]}={getattr(self, given[0])!r}: not an option of "
                    f"optim={optim_name(self.optim)!r}; expected with one of {', '.join(RECIPES)}"
                )

    def _default_learning_rate(self) -> float:
        if not is_registered(self.optim):
            return float(TrainingArguments.learning_rate)
        recipe, options, implied = _method_options(self)
        return float(recipe.arguments(None, options, implied=implied)["lr"])


@dataclass
class LightSAMSeq2SeqTrainingArguments(LightSAMTrainingArguments, Seq2SeqTrainingArguments):
    """``Seq2SeqTrainingArguments`` with the options of :class:`LightSAMTrainingArguments`."""


def optimizer_arguments(args: TrainingArguments) -> tuple[Recipe, dict[str, Any]]:
    """Gather a sharpness-aware method and its options from training arguments, plain ones or ours.

    Options come from, the later winning: ``adam_beta1``, ``adam_beta2``, ``adam_epsilon``; ``optim_args``; the typed
    fields. The learning rate is ``learning_rate``.

    Args:
        args: Arguments whose ``optim`` is one of the family's names.

    Returns:
        The recipe, and the keyword arguments of its optimizer class.

    Raises:
        UsageError: As for :class:`LightSAMTrainingArguments`.
    """
    recipe, options, implied = _method_options(args)
    check_number("learning_rate", args.learning_rate)
    check_number("weight_decay", args.weight_decay)
    return recipe, recipe.arguments(args.learning_rate, options, implied=implied)


def _method_options(args: TrainingArguments) -> tuple[Recipe, dict[str, Any], set[str]]:
    """Return the method of training arguments, its options by their names in the recipe, and which are only implied.

    Those come from fields that all ``TrainingArguments`` have, and ask for nothing.
    """
    recipe = get_recipe(optim_name(args.optim))
    shared = {"beta1": args.adam_beta1, "beta2": args.adam_beta2, "eps": args.adam_epsilon}
    parsed = recipe.parse(args.optim_args)
    fields = {name: getattr(args, name, None) for name in _FIELDS}
    fields = {name: value for name, value in fields.items() if value is not None}
    for name in fields:
        if name in parsed:
            raise UsageError(
                f"{name}: given both as a field ({fields[name]!r}) and in optim_args ({args.optim_args!r})"
            )
    if isinstance(fields.get("roles"), str):  # the one option that is text on a command line and more in Python
        fields |= recipe.parse(f"roles={fields['roles']}", "roles")
    implied = {name: value for name, value in shared.items() if name in recipe.options}
    return recipe, implied | parsed | fields, implied.keys() - parsed.keys() - fields.keys()
