"""Which dimensions of a parameter grow with the width of a model: its role, found from the model's own modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UsageError
from .validation import check_choice, check_count

ROLES: dict[str, str] = {
    "input": "fan_out grows with the width, fan_in does not: embeddings, norm gains, biases of layers that grow",
    "hidden": "both grow: attention and feed-forward matrices, poolers",
    "output": "fan_in grows, fan_out does not: classifiers, an untied language-model head",
    "fixed": "neither grows: biases of classifiers",
}
"""Role to what it says. The first three are the muP papers'; see :class:`RoleFinder` for the fourth."""

_FEED_FORWARD = (
    "intermediate_size",
    "d_ff",
    "n_inner",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "hidden_dim",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "pooler_hidden_size",
)
"""Names under which Transformers' configurations keep sizes that are chosen in proportion to ``hidden_size``."""

_FUSED = (1, 2, 3, 4)
"""Several such matrices in one: gate and up (2), query, key and value (3); 4 is GPT-2's feed-forward layer."""

_Growth = tuple[bool | None, bool | None]


def find_width(model: nn.Module, width: int | None = None) -> int:
    """Return the width of a model: ``width`` if given, else ``hidden_size`` (``d_model``, ``n_embd``) of its config.

    Raises:
        UsageError: If ``width`` is no positive integer, or None and the model does not say.
    """
    if width is None:
        config = _text_config(model)
        width = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
        if width is None:
            raise UsageError(
                f"width=None: {type(model).__name__} has no config with a hidden_size; expected the size of its hidden "
                "layers, width=..."
            )
    return check_count("width", width)


def check_roles(roles: Mapping[str, str] | None) -> dict[str, str]:
    """Return ``roles`` as a dict if it maps strings to roles."""
    if roles is None:
        return {}
    if not isinstance(roles, Mapping):
        raise UsageError(f"roles={roles!r}: expected a mapping from patterns of parameter names to {_one_of_roles()}")
    for pattern, role in roles.items():
        if not isinstance(pattern, str):
            raise UsageError(f"roles: {pattern!r} is not a pattern of parameter names; expected a string")
        check_choice(f"roles[{pattern!r}]", role, tuple(ROLES))
    return dict(roles)


def parse_roles(text: str) -> dict[str, str]:
    """Parse ``"*.router.weight:output;*.gate.weight:hidden"``, the way in which ``optim_args`` can hold a mapping.

    Raises:
        ValueError: If the text is not of that form, or names an unknown role.
    """
    roles: dict[str, str] = {}
    for pair in text.split(";"):
        pattern, separator, role = pair.rpartition(":")
        if not pattern or not separator or role not in ROLES:
            raise ValueError(text)
        roles[pattern] = role
    return roles


def parameter_roles(
    model: nn.Module, roles: Mapping[str, str] | None = None, width: int | None = None
) -> dict[str, str]:
    """Return the role of every parameter by its name, to look at before training.

    Args:
        model: The model, with adapters if it has any, without wrappers.
        roles: Overrides; see :class:`RoleFinder`.
        width: Size of the hidden layers; see :func:`find_width`.

    Raises:
        UsageError: If a parameter's role cannot be told; the message names it.
    """
    finder = RoleFinder(model, roles, width)
    return {name: finder.role(parameter) for name, parameter in model.named_parameters()}


class RoleFinder:
    """Finds roles of parameters from module types and from the sizes that the model's configuration explains.

    - ``nn.Linear``, ``Conv1D`` (whose weight is transposed) and convolutions: by their numbers of inputs and outputs.
      A size grows with the width if it is ``hidden_size``, the size of all heads or of all key-value heads, a
      feed-forward size, or two to four of these in one matrix; it does not if it is ``num_labels``, ``vocab_size``,
      the number of image channels, 1 or 2. ``get_output_embeddings()`` is a readout whatever its size.
    - Their biases: ``"input"`` if the outputs grow, else ``"fixed"``.
    - ``nn.Embedding``: ``"input"``, also where it is tied to a language-model head. A table of relative positions with
      a number for each head (T5) is ``"input"`` too: wider models have more heads, of the same size.
    - Norms: ``"input"``; ``"fixed"`` over the size of one head (query and key norms).
    - Other vectors (DeBERTa's query and value biases) by their size; other matrices only if both sizes grow.
    - LoRA: ``A`` reads all inputs of its layer into r numbers, ``"output"`` (of an embedding: ``"fixed"``); ``B``
      writes r numbers to all outputs, ``"input"`` (of a readout: ``"fixed"``).
    - A model without a configuration: a size grows if it is ``width``, and does not if it is no multiple of it.

    Neither guess nor default is made for what these rules do not explain (a size that is in both lists or in none, as
    ALBERT's factorised embeddings or a router over experts): its role must be given.

    ``"fixed"`` is beside the papers' three roles. Tensor Programs V counts the bias of the output layer among "input
    weights and all biases" with a scale of fan_out, which for that bias is constant; "fixed" is that constant.

    Args:
        model: The model, with adapters if it has any, without wrappers.
        roles: Roles by name pattern (``fnmatch``, as ``"*.router.weight"``), before what the rules find; the first
            match counts. Each pattern must match a parameter.
        width: Size of the hidden layers; see :func:`find_width`.

    Attributes:
        width: The width of the model.

    Raises:
        UsageError: For a bad override, or a model that does not tell its width.
    """

    def __init__(self, model: nn.Module, roles: Mapping[str, str] | None = None, width: int | None = None) -> None:
        self.width = find_width(model, width)
        self._sizes = _Sizes(_text_config(model), self.width)
        self._overrides = check_roles(roles)
        self._names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name.replace("_orig_mod.", ""))  # torch.compile's
        self._uses: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                self._uses.setdefault(id(parameter), []).append((module, attribute))
        self._readout = _readout(model)
        self._adapters: dict[int, _Growth] = {}
        self._adapter_roles: dict[int, str] = {}
        for module in model.modules():
            self._read_adapters(module)
        self._check_patterns_match()

    def _check_patterns_match(self) -> None:
        names = [name for names in self._names.values() for name in names]
        for pattern in self._overrides:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UsageError(
                    f"roles: {pattern!r} matches no parameter of the model; expected a pattern of names like "
                    f"{', '.join(names[:3])}, ..., {names[-1]}"
                )

    def role(self, parameter: Tensor) -> str:
        """Return the role of one of the model's parameters.

        Raises:
            UsageError: If it is not one of the model's, or its role cannot be told.
        """
        names = self._names.get(id(parameter))
        if names is None:
            raise UsageError(
                f"params: a parameter of shape {tuple(parameter.shape)} is not one of the model's; expected the "
                "parameters of the model that bind(model) was given, after it was sharded or converted"
            )
        for pattern, role in self._overrides.items():
            if any(fnmatchcase(name, pattern) for name in names):
                return role
        found = [self._role_of_use(module, attribute, parameter) for module, attribute in self._uses[id(parameter)]]
        known = [role for role in found if role is not None]
        if not known:
            owner = type(self._uses[id(parameter)][0][0]).__name__
            raise UsageError(
                f"roles: no role found for parameter {names[0]!r} of shape {tuple(parameter.shape)} in {owner}, at "
                f"width {self.width}; expected roles={{{names[0]!r}: role}}, the role being {_one_of_roles()}: "
                + "; ".join(f"{role!r} where {meaning}" for role, meaning in ROLES.items())
            )
        return "input" if "input" in known else known[0]  # a head that is tied to an embedding

    def _role_of_use(self, module: nn.Module, attribute: str, parameter: Tensor) -> str | None:
        if id(parameter) in self._adapter_roles:
            return self._adapter_roles[id(parameter)]
        growth = self._growth(module)
        if growth is not None and attribute == "weight":
            return _role(*growth)
        if growth is not None and attribute == "bias" and not isinstance(module, nn.Embedding):
            return _role(False, growth[1])
        shape = [size for size in parameter.shape if size > 1]
        if len(shape) < 2:
            is_norm = "norm" in type(module).__name__.lower()
            return _role(False, (self._sizes.norm_grows if is_norm else self._sizes.grows)(parameter.numel()))
        if self._sizes.grows(shape[-1]) and self._sizes.grows(shape[-2]):
            return "hidden"
        return None

    def _growth(self, module: nn.Module) -> _Growth | None:
        """Return whether inputs and outputs of a layer grow (None: not known), or None for another kind of module."""
        if id(module) in self._adapters:
            return self._adapters[id(module)]
        if isinstance(module, nn.Embedding):
            return False, self._sizes.embedding_grows(module.embedding_dim)
        if isinstance(module, nn.modules.conv._ConvNd):  # a depthwise one reads one channel
            inputs, outputs = module.in_channels // module.groups, module.out_channels
        elif isinstance(module, nn.Linear):
            inputs, outputs = module.in_features, module.out_features
        elif isinstance(module, Conv1D):
            inputs, outputs = module.nx, module.nf
        else:
            return None
        return self._sizes.grows(inputs), False if module is self._readout else self._sizes.grows(outputs)

    def _read_adapters(self, module: nn.Module) -> None:
        """Note what the pieces of a LoRA layer read and write (recognised by PEFT's attributes, PEFT not imported)."""
        base = getattr(module, "base_layer", None)
        if not isinstance(base, nn.Module) or not hasattr(module, "lora_A"):
            return
        growth = self._growth(base)
        if growth is None:
            return
        inputs, outputs = growth
        for down in _children(module, "lora_A"):
            self._adapters[id(down)] = (inputs, False)
        for up in _children(module, "lora_B"):
            self._adapters[id(up)] = (False, outputs)
        for name, grows in (("lora_embedding_A", False), ("lora_embedding_B", outputs)):
            for parameter in getattr(module, name, nn.ParameterDict()).values():
                role = _role(False, grows)
                if role is not None:
                    self._adapter_roles[id(parameter)] = role


class _Sizes:
    """Tells of a number of inputs or outputs whether it grows with the width (None: cannot be told)."""

    def __init__(self, config: Any, width: int) -> None:
        self.width = width
        self.growing = {width}
        self.fixed = {1}
        self.heads: int | None = None
        self.head: int | None = None
        self.is_explained = config is not None
        if config is None:
            return

        def get(name: str) -> int | None:
            value = getattr(config, name, None)
            return value if isinstance(value, int) and not isinstance(value, bool) else None

        growing = {width, get("hidden_size"), *map(get, _FEED_FORWARD)}
        self.heads = get("num_attention_heads") or get("num_heads")
        if self.heads:
            self.head = get("head_dim") or get("d_kv") or width // self.heads
            pairs = (get("num_key_value_heads") or self.heads) * self.head
            growing |= {self.heads * self.head, pairs, self.heads * self.head + 2 * pairs}
        self.growing = {factor * size for size in growing if size for factor in _FUSED}
        self.fixed = {1, 2} | {size for size in map(get, ("num_labels", "num_channels")) if size}
        # Where it coincides with the size of a layer it is the layer: heads over the vocabulary are known without it.
        self.fixed |= {get("vocab_size") or 1} - self.growing

    def grows(self, size: int) -> bool | None:
        if not self.is_explained:
            return True if size == self.width else None if size % self.width == 0 else False
        grows, is_fixed = size in self.growing, size in self.fixed
        return None if grows == is_fixed else grows

    def embedding_grows(self, size: int) -> bool | None:
        return True if size in self.growing or size == self.heads else self.grows(size)

    def norm_grows(self, size: int) -> bool | None:
        if size == self.width:
            return True
        return False if size == self.head else self.grows(size)


def _role(fan_in_grows: bool | None, fan_out_grows: bool | None) -> str | None:
    if fan_in_grows is None or fan_out_grows is None:
        return None
    if fan_in_grows:
        return "hidden" if fan_out_grows else "output"
    return "input" if fan_out_grows else "fixed"


def _text_config(model: nn.Module) -> Any:
    """Return the configuration that has the sizes: of a model that reads more than text, its language model's."""
    config = getattr(model, "config", None)
    if config is None or isinstance(config, dict):
        return None
    if not hasattr(config, "hidden_size") and hasattr(config, "get_text_config"):
        return config.get_text_config()
    return config


def _readout(model: nn.Module) -> nn.Module | None:
    """Return the language-model head, within an adapter's layer if it has one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return getattr(head, "base_layer", head)


def _children(module: nn.Module, name: str) -> Iterator[nn.Module]:
    container = getattr(module, name, None)
    return iter(container.values() if isinstance(container, nn.ModuleDict) else ())


def _one_of_roles() -> str:
    return "one of " + ", ".join(map(repr, ROLES))
