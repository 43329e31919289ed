"""muP^2 and SP-LP: roles of parameters, multipliers, and perturbations that keep their size as the width grows."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
import transformers
from peft import LoraConfig, get_peft_model
from reference import PROBLEMS, norm
from reference_mup2 import LayerwiseSAM as Reference
from torch import Tensor, nn

from hf_lightsam.errors import UsageError
from hf_lightsam.optim import SAM
from hf_lightsam.optim.mup2 import SPLPSAM, LayerwiseSAM, MuP2SAM
from hf_lightsam.optim.roles import ROLES, parameter_roles, parse_roles

METHODS: dict[str, type[LayerwiseSAM]] = {"mup2": MuP2SAM, "sp_lp": SPLPSAM}
KERNELS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "single": {"foreach": False},
}
methods = pytest.mark.parametrize("method", METHODS)

# ---- Roles -----------------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 97,
    "max_position_embeddings": 24,
}
BERT_LAYER = {
    "embeddings.word_embeddings.weight": "input",
    "embeddings.LayerNorm.weight": "input",
    "encoder.layer.0.attention.output.dense.weight": "hidden",
    "encoder.layer.0.attention.output.dense.bias": "input",
    "encoder.layer.0.attention.output.LayerNorm.bias": "input",
    "encoder.layer.0.intermediate.dense.weight": "hidden",
    "encoder.layer.0.intermediate.dense.bias": "input",
    "encoder.layer.0.output.dense.weight": "hidden",
}
DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 2}
GPT2 = {
    "transformer.wte.weight": "input",
    "transformer.wpe.weight": "input",
    "transformer.h.0.ln_1.weight": "input",
    "transformer.h.0.attn.c_attn.weight": "hidden",
    "transformer.h.0.attn.c_attn.bias": "input",
    "transformer.h.0.mlp.c_fc.weight": "hidden",
    "transformer.h.0.mlp.c_proj.weight": "hidden",
    "transformer.ln_f.bias": "input",
}
GPT2_SIZES = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 97, "n_positions": 24}
T5_SIZES = {"d_model": 16, "d_kv": 4, "num_heads": 2, "d_ff": 48, "num_layers": 1, "vocab_size": 97}
T5 = {
    "encoder.block.0.layer.0.SelfAttention.q.weight": "hidden",  # 2 heads of 4: 8 rows, not 16
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "input",
    "encoder.block.0.layer.0.layer_norm.weight": "input",
    "decoder.block.0.layer.1.EncDecAttention.o.weight": "hidden",
    "decoder.block.0.layer.2.DenseReluDense.wi.weight": "hidden",
    "decoder.final_layer_norm.weight": "input",
}
LLAMA = {
    "model.embed_tokens.weight": "input",
    "model.layers.0.self_attn.q_proj.weight": "hidden",
    "model.layers.0.self_attn.k_proj.weight": "hidden",
    "model.layers.0.mlp.down_proj.weight": "hidden",
    "model.layers.0.input_layernorm.weight": "input",
    "model.norm.weight": "input",
}
LABELS = {"classifier.weight": "output", "classifier.bias": "fixed"}


def prefixed(prefix: str, roles: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}.{name}": role for name, role in roles.items()}


ARCHITECTURES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "BertForSequenceClassification": (
        "BertConfig",
        {**SIZES, "num_labels": 3},
        prefixed("bert", {**BERT_LAYER, "embeddings.position_embeddings.weight": "input"})
        | {"bert.pooler.dense.weight": "hidden", "bert.pooler.dense.bias": "input"}
        | LABELS,
    ),
    "BertForMaskedLM": (  # the decoder is the embedding; its bias has the vocabulary's size
        "BertConfig",
        SIZES,
        {"cls.predictions.transform.dense.weight": "hidden", "cls.predictions.bias": "fixed"},
    ),
    "RobertaForSequenceClassification": (
        "RobertaConfig",
        SIZES,
        prefixed("roberta", BERT_LAYER)
        | {"classifier.dense.weight": "hidden", "classifier.dense.bias": "input"}
        | {"classifier.out_proj.weight": "output", "classifier.out_proj.bias": "fixed"},
    ),
    "DebertaForSequenceClassification": (
        "DebertaConfig",
        {**SIZES, **DEBERTA},
        prefixed("deberta", BERT_LAYER)
        | {
            "deberta.encoder.rel_embeddings.weight": "input",
            "deberta.encoder.layer.0.attention.self.in_proj.weight": "hidden",
            "deberta.encoder.layer.0.attention.self.q_bias": "input",
            "deberta.encoder.layer.0.attention.self.pos_proj.weight": "hidden",
        }
        | LABELS,
    ),
    "DebertaV2ForSequenceClassification": (
        "DebertaV2Config",
        {**SIZES, **DEBERTA, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3},
        prefixed("deberta", BERT_LAYER)
        | {
            "deberta.encoder.rel_embeddings.weight": "input",
            "deberta.encoder.LayerNorm.weight": "input",
            "deberta.encoder.conv.conv.weight": "hidden",
            "deberta.encoder.layer.0.attention.self.pos_key_proj.weight": "hidden",
        }
        | LABELS,
    ),
    "T5ForConditionalGeneration": ("T5Config", T5_SIZES, {"shared.weight": "input", **T5}),
    "T5ForSequenceClassification": (
        "T5Config",
        T5_SIZES,
        prefixed("transformer", T5)
        | {"classification_head.dense.weight": "hidden", "classification_head.out_proj.weight": "output"},
    ),
    "GPT2LMHeadModel": ("GPT2Config", GPT2_SIZES, GPT2),
    "GPT2ForSequenceClassification": ("GPT2Config", GPT2_SIZES, {**GPT2, "score.weight": "output"}),
    "LlamaForCausalLM": ("LlamaConfig", {**SIZES, "num_key_value_heads": 1}, {**LLAMA, "lm_head.weight": "output"}),
    "LlamaForSequenceClassification": ("LlamaConfig", SIZES, {**LLAMA, "score.weight": "output"}),
    "Qwen3ForCausalLM": (
        "Qwen3Config",
        {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True},
        {**LLAMA, "model.layers.0.self_attn.q_norm.weight": "fixed"},  # over one head, whose size stays
    ),
}


def make_model(name: str) -> Any:
    config, sizes, _ = ARCHITECTURES[name]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**sizes))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_roles_of_architectures(name: str) -> None:
    model = make_model(name)
    found = parameter_roles(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    expected = ARCHITECTURES[name][2]
    assert {parameter: found[parameter] for parameter in expected} == expected
    matrices = {parameter for parameter, role in found.items() if role in ("hidden", "output")}
    assert all(model.get_parameter(parameter).dim() >= 2 for parameter in matrices)


def test_a_head_that_is_tied_is_the_embedding() -> None:
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    found = parameter_roles(transformers.LlamaForCausalLM(config))
    assert "lm_head.weight" not in found
    assert found["model.embed_tokens.weight"] == "input"


def test_the_vocabulary_may_have_the_size_of_a_layer() -> None:
    config = transformers.BertConfig(**{**SIZES, "vocab_size": 48}, tie_word_embeddings=False)
    found = parameter_roles(transformers.BertForMaskedLM(config))
    assert found["cls.predictions.decoder.weight"] == "output"
    assert found["cls.predictions.decoder.bias"] == "fixed"


@pytest.mark.parametrize(
    ("name", "targets", "kept", "down", "up"),
    [
        ("BertForSequenceClassification", ["query", "classifier"], None, "attention.self.query", None),
        ("GPT2ForSequenceClassification", ["c_attn"], ["score"], "attn.c_attn", "score.modules_to_save"),
        ("LlamaForCausalLM", ["k_proj", "lm_head", "embed_tokens"], None, "self_attn.k_proj", None),
    ],
)
def test_roles_of_lora(name: str, targets: list[str], kept: list[str] | None, down: str, up: str | None) -> None:
    model = get_peft_model(make_model(name), LoraConfig(r=4, target_modules=targets, modules_to_save=kept))
    found = parameter_roles(model)
    trained = {n: found[n] for n, p in model.named_parameters() if p.requires_grad}
    for parameter, role in trained.items():
        is_readout = "classifier" in parameter or "lm_head" in parameter
        if "lora_A" in parameter:
            assert role == "output", parameter
        elif "lora_B" in parameter:
            assert role == ("fixed" if is_readout else "input"), parameter
        elif "lora_embedding_A" in parameter:
            assert role == "fixed"
        elif "lora_embedding_B" in parameter:
            assert role == "input"
        else:
            assert up is not None
            assert up in parameter
            assert role == "output"
    assert any(down in parameter for parameter in trained)


def test_roles_without_a_configuration() -> None:
    model = nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(3, 3))
    roles = list(parameter_roles(model, width=8).values())
    assert roles == ["input", "input", "input", "input", "hidden", "input", "output", "fixed", "fixed", "fixed"]
    with pytest.raises(UsageError, match=r"'0\.weight' of shape \(8, 24\) in Linear"):  # 24 features, or 3 layers of 8
        parameter_roles(nn.Sequential(nn.Linear(24, 8)), width=8)
    with pytest.raises(UsageError, match=r"width=None: Linear has no config.*width=\.\.\."):
        parameter_roles(nn.Linear(2, 2))


def test_what_is_not_explained_is_refused_and_can_be_given() -> None:
    model = make_model("BertForSequenceClassification")
    model.router = nn.Linear(16, 5, bias=False)
    with pytest.raises(UsageError, match=r"'router\.weight' of shape \(5, 16\) in Linear.*'output' where fan_in grows"):
        parameter_roles(model)
    found = parameter_roles(model, {"router.*": "output", "*.word_embeddings.weight": "fixed"})
    assert found["router.weight"] == "output"
    assert found["bert.embeddings.word_embeddings.weight"] == "fixed"  # an override comes before what is found
    optimizer = SPLPSAM(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"router\.weight"):
        optimizer.bind(model)
    model.router.requires_grad_(False)  # it is not perturbed: its role does not matter
    optimizer.bind(model)
    labels = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=32))
    with pytest.raises(UsageError, match=r"classifier\.weight"):  # 32 labels, or two layers of 16
        parameter_roles(labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"roles": {"*.bias": "bias"}}, r"roles\['\*\.bias'\]='bias': expected one of 'input', 'hidden'"),
        ({"roles": "hidden"}, "roles='hidden': expected a mapping"),
        ({"roles": {1: "hidden"}}, "1 is not a pattern"),
        ({"base_width": 0}, "base_width=0: expected a whole number above 0"),
        ({"base_width": 1.5}, r"base_width=1\.5: expected a whole number above 0"),
        ({"width": True}, "width=True: expected a whole number above 0"),
        ({"rho": -1.0}, r"rho=-1\.0"),
        ({"descent": "nothing"}, "descent='nothing'"),
    ],
)
@methods
def test_bad_options(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        METHODS[method](nn.Linear(2, 2).parameters(), lr=0.1, **options)


def test_patterns_are_of_names_before_compilation() -> None:
    model = make_model("BertForSequenceClassification")
    found = parameter_roles(torch.compile(model), {"classifier.weight": "hidden"})
    expected = parameter_roles(model, {"classifier.weight": "hidden"})
    assert list(found.values()) == list(expected.values())
    assert expected["classifier.weight"] == "hidden"


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    model = make_model("BertForSequenceClassification")
    with pytest.raises(UsageError, match=r"'\*\.rooter\.\*' matches no parameter of the model.*bert\.embeddings"):
        SPLPSAM(model.parameters(), lr=0.1, roles={"*.rooter.*": "output"}).bind(model)


def test_parse_roles() -> None:
    assert parse_roles("*.router.weight:output;a.b:hidden") == {"*.router.weight": "output", "a.b": "hidden"}
    for text in ("", "a", "a:bias", ":hidden", "a:hidden;"):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            parse_roles(text)


# ---- The equations ---------------------------------------------------------------------------------------------------


class Parameters(nn.Module):
    """A problem's parameters as a model whose roles are given."""

    def __init__(self, problem: reference.Problem, dtype: torch.dtype) -> None:
        super().__init__()
        self.all = nn.ParameterList([torch.tensor(p, dtype=dtype) for p in problem.params])


def run(problem: reference.Problem, model: Parameters, optimizer: SAM, expected: Any = None) -> float:
    worst = 0.0

    def error(wanted: reference.Arrays) -> float:
        difference = [p.detach().double().numpy() - e for p, e in zip(model.all, wanted, strict=True)]
        return norm(difference) / norm(wanted)

    for step, arrays in enumerate(problem.batches):
        batch = [torch.from_numpy(array).to(model.all[0].dtype) for array in arrays]
        optimizer.zero_grad()
        problem.loss(model.all, batch, torch).backward()
        before = [p.detach().clone() for p in model.all]
        if expected is not None:
            expected.step(problem.grad_at(step))
        with optimizer.perturbed():
            if expected is not None:
                worst = max(worst, error(expected.perturbed))
            optimizer.zero_grad()
            problem.loss(model.all, batch, torch).backward()
        assert all(torch.equal(a, b) for a, b in zip(before, model.all, strict=True))
        optimizer.step()
        if expected is not None:
            worst = max(worst, error(expected.params))
    return worst


TEN_ROLES = {
    "noisy_least_squares": ["output", "hidden"],
    "small_network": ["input", "fixed", "output", "hidden"],
}


@methods
@pytest.mark.parametrize("problem_name", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("width", [96, 1536])
def test_ten_steps(method: str, problem_name: str, dtype: torch.dtype, kernel: dict[str, Any], width: int) -> None:
    problem = PROBLEMS[problem_name](steps=10)
    model = Parameters(problem, dtype)
    roles = TEN_ROLES[problem_name]
    optimizer = METHODS[method](
        model.parameters(),
        rho=0.05,
        width=width,
        base_width=384,
        roles={f"all.{i}": role for i, role in enumerate(roles)},
        lr=0.05,
        weight_decay=0.1,
        **kernel,
    )
    optimizer.bind(model)
    descent = reference.AdamW(0.05, weight_decay=0.1)
    expected = Reference(problem.params, method, roles, width / 384, 0.05, descent)
    assert run(problem, model, optimizer, expected) <= {torch.float64: 1e-9, torch.float32: 1e-5}[dtype]


@methods
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_at_base_width_it_is_sam(method: str, dtype: torch.dtype) -> None:
    problem = PROBLEMS["small_network"](steps=10)
    ours, sam = Parameters(problem, dtype), Parameters(problem, dtype)
    roles = {f"all.{i}": role for i, role in enumerate(ROLES)}
    optimizer = METHODS[method](ours.parameters(), "sgd", 0.1, lr=0.1, width=32, base_width=32, roles=roles)
    optimizer.bind(ours)
    run(problem, ours, optimizer)
    run(problem, sam, SAM(sam.parameters(), "sgd", 0.1, lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(ours.all, sam.all, strict=True))
    assert any(not torch.equal(p, torch.tensor(q).to(dtype)) for p, q in zip(ours.all, problem.params, strict=True))


# ---- The width -------------------------------------------------------------------------------------------------------

WIDTHS = (64, 128, 256, 512, 1024)
INITS = {"mup2": "mup", "sp_lp": "sp"}
MakeOptimizer = Callable[[nn.Module, int], SAM]


def make_mlp(width: int, init: str, seed: int) -> nn.Sequential:
    """Three layers; both parametrisations are the same at width 64."""
    torch.manual_seed(seed)
    layers = [nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)]
    output = width**-0.5 if init == "sp" else 64**0.5 / width
    for index, deviation in ((0, 20**-0.5), (2, width**-0.5), (4, output)):
        nn.init.normal_(layers[index].weight, std=deviation)
        nn.init.zeros_(layers[index].bias)
    return nn.Sequential(*layers)


def rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def effects(model: nn.Module, optimizer: SAM, compute_loss: Callable[[], Tensor]) -> dict[str, float]:
    """Return, for each layer, the root mean square of what its perturbation adds to its outputs."""
    inputs: dict[str, Tensor] = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding | nn.LayerNorm)}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].detach()))
        for name, layer in layers.items()
    ]
    optimizer.zero_grad()
    compute_loss().backward()
    for hook in hooks:
        hook.remove()
    clean = {name: p.detach().clone() for name, p in model.named_parameters()}
    with optimizer.perturbed(), torch.no_grad():
        moved = {name: p - clean[name] for name, p in model.named_parameters()}
    result = {name: rms(difference) for name, difference in moved.items()}  # of norms and biases
    for name, layer in layers.items():
        weight = f"{name}.weight"
        if isinstance(layer, nn.Linear):
            result[weight] = rms(inputs[name] @ moved[weight].T)
        elif isinstance(layer, nn.Embedding):
            result[weight] = rms(moved[weight][inputs[name]])
    return result


def mlp_effects(init: str, make: MakeOptimizer) -> np.ndarray:
    """Return the effects by width and (weight, bias of each layer), means over three seeds."""
    rows = []
    for width in WIDTHS:
        seeds = []
        for seed in range(3):
            model = make_mlp(width, init, seed)
            generator = torch.Generator().manual_seed(100 + seed)
            inputs, labels = torch.randn(16, 20, generator=generator), torch.randint(0, 4, (16,), generator=generator)
            loss = lambda m=model, x=inputs, y=labels: nn.functional.cross_entropy(m(x), y)  # noqa: E731
            seeds.append(list(effects(model, make(model, width), loss).values()))
        rows.append(np.mean(seeds, axis=0))
    return np.array(rows)


def make_layerwise(method: str, base_width: int = 64) -> MakeOptimizer:
    def make(model: nn.Module, width: int) -> SAM:
        optimizer = METHODS[method](model.parameters(), "sgd", 0.1, lr=0.1, base_width=base_width, width=width)
        optimizer.bind(model)
        return optimizer

    return make


def make_sam(radius_power: float, base_width: int = 64) -> MakeOptimizer:
    return lambda model, width: SAM(model.parameters(), "sgd", 0.1 * (width / base_width) ** radius_power, lr=0.1)


def spread(effect: np.ndarray) -> np.ndarray:
    return effect.max(axis=0) / effect.min(axis=0)


def relative(effect: np.ndarray) -> np.ndarray:
    """Return each layer's effect over the first layer's: the norm that they share drops out."""
    return effect / effect[:, :1]


@methods
def test_every_layer_s_effect_is_independent_of_the_width(method: str) -> None:
    """Weights and biases of all three layers, the last one's bias (a parameter of fixed size) too.

    The common factor is the norm, to which the last layer adds a part that falls as 1/m: at width 64 it is most of it,
    from 256 on little, so that the effects settle after rising by about 2.
    """
    effect = mlp_effects(INITS[method], make_layerwise(method))
    assert spread(effect).max() <= 3.0  # over 16 times the width
    assert spread(effect[2:]).max() <= 1.5  # from 256 to 1024
    assert spread(relative(effect)).max() <= 1.5


@pytest.mark.parametrize("init", ["mup", "sp"])
def test_plain_sam_s_effect_is_not(init: str) -> None:
    effect = mlp_effects(init, make_sam(0.0))
    assert effect[0, 0] / effect[-1, 0] > 10  # the first layer's vanishes
    assert effect[-1, 4] / effect[0, 4] > 3  # the last layer's grows, as sqrt(m)
    shrunk = mlp_effects(init, make_sam(-0.5))
    assert spread(shrunk[:, 4:5]).max() <= 1.5  # a smaller radius keeps the last layer's
    assert shrunk[0, 0] / shrunk[-1, 0] > 40  # and no other
    assert shrunk[0, 2] / shrunk[-1, 2] > 3


@methods
def test_factors_of_the_other_parametrisation_are_wrong(method: str) -> None:
    wrong = mlp_effects({"mup": "sp", "sp": "mup"}[INITS[method]], make_layerwise(method))
    assert spread(relative(wrong))[4] > 3


def make_wide_bert(width: int, init: str, seed: int) -> Any:
    """One layer whose heads grow in number, initialised by role; both parametrisations are the same at width 32."""
    torch.manual_seed(seed)
    sizes = {**SIZES, "hidden_size": width, "num_attention_heads": width // 16, "intermediate_size": 4 * width}
    config = transformers.BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = transformers.BertForSequenceClassification(config)
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        if roles[name] == "hidden":
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif roles[name] == "output":
            nn.init.normal_(parameter, std=width**-0.5 if init == "sp" else 32**0.5 / width)
        elif "embeddings.weight" in name:
            nn.init.normal_(parameter)
    return model


def bert_effects(init: str, make: MakeOptimizer) -> dict[str, np.ndarray]:
    """Return the effects of each weight and bias by width, means over three seeds."""
    widths = []
    for width in (32, 128, 512):
        seeds = []
        for seed in range(3):
            model = make_wide_bert(width, init, seed)
            tokens = torch.randint(1, 97, (16, 8), generator=torch.Generator().manual_seed(seed))
            labels = torch.tensor([0] * 12 + [1] * 4)
            loss = lambda m=model, x=tokens, y=labels: m(input_ids=x, labels=y).loss  # noqa: E731
            seeds.append(effects(model, make(model, width), loss))
        widths.append({name: np.mean([seed[name] for seed in seeds]) for name in seeds[0]})
    return {name: np.array([width[name] for width in widths]) for name in widths[0]}


@methods
def test_a_transformer_s_effects_are_independent_of_the_width(method: str) -> None:
    """Embeddings, attention, norms, pooler, classifier; from 32 to 512 all rise by the same 2 to 4, the norm's factor.

    The keys' bias is left out: softmax takes no notice of it, and its gradient is rounding.
    """
    init = INITS[method]
    ours, sam = bert_effects(init, make_layerwise(method, 32)), bert_effects(init, make_sam(0.0, 32))
    names = [name for name in ours if "key.bias" not in name]
    assert max(spread(ours[name]) for name in names) <= 4.5
    growth = np.array([ours[name][-1] / ours[name][0] for name in names])
    assert spread(growth) <= 2.5
    of_sam = {name: sam[name][-1] / sam[name][0] for name in names}
    assert of_sam["bert.embeddings.word_embeddings.weight"] < 1 / 10
    assert of_sam["bert.encoder.layer.0.output.LayerNorm.bias"] < 1 / 10
    assert of_sam["classifier.weight"] > 4
    assert spread(np.array(list(of_sam.values()))) > 60


# ---- The optimizer's protocol ----------------------------------------------------------------------------------------


def bert_loss(model: Any) -> Tensor:
    tokens = torch.randint(1, 97, (4, 8), generator=torch.Generator().manual_seed(0))
    return model(input_ids=tokens, labels=torch.tensor([0, 1, 0, 1])).loss


def moves(model: nn.Module, optimizer: SAM) -> list[Tensor]:
    clean = [p.detach().clone() for p in model.parameters()]
    with optimizer.perturbed():
        moved = [p.detach() - c for p, c in zip(model.parameters(), clean, strict=True)]
    assert all(torch.equal(p, c) for p, c in zip(model.parameters(), clean, strict=True))
    return moved


def make_bound(method: str = "sp_lp") -> tuple[Any, LayerwiseSAM]:
    model = make_model("BertForSequenceClassification").eval()
    optimizer = METHODS[method](model.parameters(), lr=1e-3, base_width=64)
    optimizer.bind(model)
    bert_loss(model).backward()
    return model, optimizer


def test_the_width_is_the_model_s() -> None:
    model, optimizer = make_bound("mup2")
    roles = parameter_roles(model)
    m = 16 / 64
    factors = {"input": m**0.5, "hidden": m**-0.5, "output": m**-1.5, "fixed": m**-0.5}
    scaled = [factors[roles[n]] * p.grad for n, p in model.named_parameters()]
    length = torch.cat([v.flatten() for v in scaled]).norm()
    for moved, v in zip(moves(model, optimizer), scaled, strict=True):
        torch.testing.assert_close(moved, 0.05 * m**0.5 * v / length, rtol=1e-3, atol=1e-6)


@methods
def test_without_bind(method: str) -> None:
    model = make_model("BertForSequenceClassification")
    optimizer = METHODS[method](model.parameters(), lr=1e-3)
    bert_loss(model).backward()
    with pytest.raises(RuntimeError, match=r"call optimizer\.bind\(model\) before the first step"):
        optimizer.perturb()
    assert not optimizer.is_perturbed
    for group in optimizer.param_groups:
        group["rho"] = 0.0
    optimizer.perturb()  # nothing is perturbed: no role is asked for
    optimizer.step()


def test_bind_to_another_model_is_refused() -> None:
    model, optimizer = make_bound()
    before = moves(model, optimizer)
    with pytest.raises(UsageError, match="is not one of the model's"):
        optimizer.bind(make_model("BertForSequenceClassification"))
    assert all(torch.equal(a, b) for a, b in zip(before, moves(model, optimizer), strict=True))  # nothing changed


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_keep_the_multipliers(how: str) -> None:
    model, optimizer = make_bound()
    if how == "deepcopy":
        other, copied = copy.deepcopy((model, optimizer))
    else:
        buffer = io.BytesIO()
        torch.save((model, optimizer), buffer)
        buffer.seek(0)
        other, copied = torch.load(buffer, weights_only=False)
    bert_loss(other).backward()
    model.zero_grad()
    other.zero_grad()
    bert_loss(model).backward()
    bert_loss(other).backward()
    for a, b in zip(moves(model, optimizer), moves(other, copied), strict=True):
        assert torch.equal(a, b)
    assert copied.base_width == 64


def test_parameters_may_be_replaced_in_their_places() -> None:
    """As ``fully_shard`` does: others of the same shapes stand in the groups and in the model."""
    model, optimizer = make_bound()
    expected = moves(model, optimizer)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    optimizer.param_groups[0]["params"] = list(model.parameters())
    bert_loss(model).backward()
    assert all(torch.equal(a, b) for a, b in zip(expected, moves(model, optimizer), strict=True))
    optimizer.bind(model)
    assert all(torch.equal(a, b) for a, b in zip(expected, moves(model, optimizer), strict=True))


def test_groups_and_a_group_that_is_added_after_bind() -> None:
    model, whole = make_bound()
    expected = moves(model, whole)
    parameters = list(model.parameters())
    optimizer = SPLPSAM(parameters[:5], lr=1e-3, base_width=64)
    optimizer.bind(model)
    optimizer.add_param_group({"params": parameters[5:]})
    for a, b in zip(expected, moves(model, optimizer), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(UsageError, match="is not one of the model's"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 2
    loaded = SPLPSAM([{"params": parameters[:5]}, {"params": parameters[5:]}], lr=1e-3, base_width=64)
    loaded.bind(model)
    loaded.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(moves(model, optimizer), moves(model, loaded), strict=True))


def test_a_group_without_radius_is_left_and_needs_no_role() -> None:
    model = make_model("BertForSequenceClassification")
    model.router = nn.Linear(16, 5, bias=False)  # of unknown role
    router = list(model.router.parameters())
    rest = [p for n, p in model.named_parameters() if "router" not in n]
    optimizer = SPLPSAM([{"params": rest}, {"params": router, "rho": 0.0}], lr=1e-3, base_width=64)
    optimizer.bind(model)
    (bert_loss(model) + router[0].sum()).backward()
    before = router[0].detach().clone()
    with optimizer.perturbed():
        assert torch.equal(router[0], before)
    optimizer.param_groups[1]["rho"] = 0.1
    with pytest.raises(RuntimeError, match=r"parameter of shape \(5, 16\): call optimizer\.bind"):
        optimizer.perturb()


@methods
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_useless_gradient_perturbs_nothing(method: str, kernel: dict[str, Any], value: float) -> None:
    model = make_mlp(64, "sp", 0)
    optimizer = METHODS[method](model.parameters(), lr=0.1, width=64, base_width=16, **kernel)
    optimizer.bind(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model[2].weight.grad[0, 0] = value
    assert all(not moved.any() for moved in moves(model, optimizer))
    model[2].weight.grad[0, 0] = 1.0
    assert any(moved.any() for moved in moves(model, optimizer))


def test_lora_perturbs_the_adapters_alone() -> None:
    base = make_model("BertForSequenceClassification")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"))
    optimizer = SPLPSAM([p for p in model.parameters() if p.requires_grad], lr=1e-3, base_width=64)
    optimizer.bind(model)
    bert_loss(model).backward()
    for parameter, moved in zip(model.parameters(), moves(model, optimizer), strict=True):
        assert bool(moved.any()) == (parameter.grad is not None and bool(parameter.grad.any()))
