"""With libraries around Transformers: TRL, PEFT, a user's own optimizer and schedule, a loop with Accelerate."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from accelerate import Accelerator
from conftest import CORE, assert_same_weights, make_args, make_bert, make_rows, train
from tasks import TASKS, make_gpt2, make_task
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, default_data_collator, get_linear_schedule_with_warmup
from trl import SFTConfig, SFTTrainer

from hf_lightsam import (
    SAM,
    LightSAM,
    LightSAMTrainer,
    SharpnessAwareMixin,
    UsageError,
    optimizer_cls_and_kwargs,
)
from hf_lightsam.loop import SharpnessAwareLoop
from hf_lightsam.optim import AdaSAM
from hf_lightsam.passes import count_items

# ---- TRL ------------------------------------------------------------------------------------------------------------


class LightSAMSFTTrainer(SharpnessAwareMixin, SFTTrainer):
    pass


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=16
    )


def make_sft(
    folder: Path, batch: int, accumulation: int, peft_config: Any = None, kind: type[SFTTrainer] = LightSAMSFTTrainer
) -> SFTTrainer:
    texts = [" ".join(f"w{(7 * i + j) % 61}" for j in range(3 + i % 5)) for i in range(32)]
    args = SFTConfig(
        str(folder),
        optim="lightsam_adam" if kind is LightSAMSFTTrainer else "adamw_torch",
        optim_args="rho=0.1" if kind is LightSAMSFTTrainer else None,
        adam_epsilon=1e-5,
        max_steps=4,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        learning_rate=1e-3,
        max_length=16,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    return kind(
        make_gpt2(),
        args,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )


def test_sft_trainer_of_trl(tmp_path: Path) -> None:
    plain = make_sft(tmp_path / "plain", 8, 1, kind=SFTTrainer)
    plain.train()
    runs = [make_sft(tmp_path / str(batch), batch, 8 // batch) for batch in (8, 2)]
    for run in runs:
        run.train()
        logs = [log for log in run.state.log_history if "loss" in log]
        assert len(logs) == 4
        assert all({"sharpness", "perturbed_loss", "mean_token_accuracy"} <= log.keys() for log in logs)
        assert logs[0]["loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-4)
        # Of two passes over the rows one is noted; of those that only ask, none.
        for log, expected in zip(logs, plain.state.log_history, strict=False):
            assert log["num_tokens"] == expected["num_tokens"]
        assert logs[0]["entropy"] == pytest.approx(plain.state.log_history[0]["entropy"], rel=1e-3)
        assert not run._metrics["eval"]
    assert_same_weights(runs[0].model, runs[1].model, rtol=1e-4, atol=1e-6)


def test_sft_trainer_of_trl_with_adapters(tmp_path: Path) -> None:
    start = make_gpt2().state_dict()
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    trainer = make_sft(tmp_path, 8, 1, config)
    trainer.train()
    base = trainer.model.get_base_model().state_dict()
    for name, tensor in start.items():
        found = base.get(
            name, base.get(name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias"))
        )
        assert torch.equal(found, tensor), name
    optimizer = trainer._sharpness_aware_optimizer()
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert sum(buffer.numel() for buffer in optimizer._buffers.values()) == trainable, "memory of the adapters alone"
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == trainable


# ---- Optimizers of the user's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CORE)
def test_an_optimizer_and_a_schedule_of_the_users(tmp_path: Path, method: str) -> None:
    trainers = []
    for own in (True, False):
        model = make_bert()
        args = make_args(tmp_path, optim=method, warmup_steps=2, rho=0.1)
        options: dict[str, Any] = {}
        if own:
            maker = LightSAMTrainer(copy.deepcopy(model), args)
            names = maker.get_decay_parameter_names(model)
            assert 0 < len(names) < len(list(model.named_parameters()))
            groups = [
                {"params": [p for n, p in model.named_parameters() if (n in names) == decayed], "weight_decay": 0.0}
                for decayed in (True, False)
            ]
            cls, kwargs = optimizer_cls_and_kwargs(method, lr=1e-3, rho=0.1)
            optimizer = cls(groups, **kwargs)
            options["optimizers"] = (optimizer, get_linear_schedule_with_warmup(optimizer, 2, 4))
        trainer = LightSAMTrainer(model, args, train_dataset=make_rows(), **options)
        trainer.train()
        trainers.append(trainer)
    assert_same_weights(trainers[0].model, trainers[1].model)


def test_an_optimizer_that_takes_one_gradient_is_refused(tmp_path: Path) -> None:
    model = make_bert()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(UsageError, match=r"optimizers=\(AdamW, ...\): it takes one gradient a step"):
        LightSAMTrainer(model, make_args(tmp_path), optimizers=(optimizer, None))
    with pytest.raises(UsageError, match=r"optimizer_cls_and_kwargs=\(SGD, ...\)"):
        LightSAMTrainer(model, make_args(tmp_path), optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))
    args = make_args(tmp_path, optim="adamw_torch")
    LightSAMTrainer(model, args, train_dataset=make_rows(), optimizers=(optimizer, None)).train()


def test_one_of_the_family_under_another_name_takes_two_passes(tmp_path: Path) -> None:
    """An optimizer that was handed in counts for more than the flag, as in the Trainer."""
    model = make_bert()
    args = make_args(tmp_path, optim="adamw_torch")
    trainer = LightSAMTrainer(model, args, train_dataset=make_rows(), optimizers=(LightSAM(model.parameters()), None))
    trainer.train()
    assert "sharpness" in trainer.state.log_history[0]


# ---- Gradients that are not numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("is_filtered", [True, False])
def test_a_row_whose_loss_is_nan(tmp_path: Path, is_filtered: bool, caplog: pytest.LogCaptureFixture) -> None:
    """As in a plain Trainer: the filter keeps it out of the log, and the gradient spoils the weights; we say so."""

    class Spoilt(LightSAMTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * math.nan if self.state.global_step == 2 else loss

    args = make_args(tmp_path, logging_nan_inf_filter=is_filtered, max_steps=3)
    trainer = Spoilt(make_bert(), args, train_dataset=make_rows())
    trainer.train()
    assert not trainer._sharpness_aware_optimizer().is_perturbed
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert math.isnan(losses[2]) != is_filtered
    assert caplog.text.count("The norm of the descent gradient is nan at step 3") == 1


# ---- A loop of one's own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", CORE)
def test_the_loop_takes_the_trainers_steps(tmp_path: Path, method: str, task: str) -> None:
    """Windows of two micro-batches, the last one short; as many epochs and the same schedule."""
    model, rows = make_task(task, 22)
    options = {"optim": method, "adam_epsilon": 1e-5, "rho": 0.1}
    trainer = train(
        tmp_path,
        copy.deepcopy(model),
        rows=rows,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=6,
        train_sampling_strategy="sequential",
        **options,
    )
    accelerator = Accelerator(cpu=True)
    cls, kwargs = optimizer_cls_and_kwargs(method, lr=1e-3, rho=0.1, eps=1e-5)
    optimizer = cls(model.parameters(), **kwargs)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0  # as the Trainer has it; torch's AdamW does not
    model, optimizer = accelerator.prepare(model, optimizer)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 6)
    loop = SharpnessAwareLoop(
        accelerator,
        model,
        optimizer,
        lambda model, batch: model(**batch).loss,
        count_items=lambda batch: int(count_items(batch)),
        max_grad_norm=1.0,
    )
    model.train()
    batches = [default_data_collator(rows[start : start + 4]) for start in range(0, 22, 4)]
    for _ in range(2):
        for start in range(0, 6, 2):
            result = loop.step(batches[start : start + 2])
            schedule.step()
    assert_same_weights(model, trainer.model, rtol=1e-5, atol=1e-6)
    last = [log for log in trainer.state.log_history if "loss" in log][-1]
    assert last["loss"] == pytest.approx(result.loss.item(), rel=1e-5)
    assert last["sharpness"] == pytest.approx(result.sharpness.item(), rel=1e-3, abs=1e-6)


def test_a_plain_trainer_beside_ours_is_untouched(tmp_path: Path) -> None:
    train(tmp_path)
    plain = Trainer(make_bert(), make_args(tmp_path, optim="adamw_torch"), train_dataset=make_rows())
    plain.train()
    assert "sharpness" not in plain.state.log_history[0]


# ---- What torch asks of an optimizer --------------------------------------------------------------------------------

MAKERS = {
    "lightsam": lambda params, **options: LightSAM(params, **options),
    "sam": lambda params, **options: SAM(params, lr=0.1, **options),
}


def test_differentiable_is_refused() -> None:
    parameter = torch.ones(2, requires_grad=True)
    with pytest.raises(UsageError, match="differentiable=True: not supported"):
        SAM([parameter], lr=0.1, differentiable=True)
    for make in MAKERS.values():
        with pytest.raises(UsageError, match="differentiable=True: not supported"):
            make([{"params": [parameter], "differentiable": True}])


def test_capturable_is_refused_where_weights_are_perturbed_on_a_cpu() -> None:
    """Not before: who uses Accelerate makes the optimizer first, and then the model moves."""
    parameter = torch.ones(2, requires_grad=True)
    optimizer = SAM([parameter], lr=0.1, capturable=True)
    parameter.grad = torch.ones(2)
    with pytest.raises(UsageError, match=r"capturable=True: a parameter of shape \(2,\) is on the CPU"):
        optimizer.perturb()
    assert not optimizer.is_perturbed


TENSOR_RATES = {
    **{form: functools.partial(LightSAM, variant=form) for form in ("adam", "adagrad", "adagrad_norm")},
    "factored": functools.partial(LightSAM, ascent_state="factored"),
    "adasam": AdaSAM,
    "sam": SAM,
}


@pytest.mark.parametrize("kernels", [{}, {"foreach": True}, {"foreach": False}], ids=["fused", "foreach", "single"])
@pytest.mark.parametrize("name", TENSOR_RATES)
def test_a_learning_rate_may_be_a_tensor_that_a_scheduler_writes_to(name: str, kernels: dict[str, bool]) -> None:
    if name == "sam" and kernels.get("foreach"):
        kernels = {}  # torch's AdamW: "lr as a Tensor is not supported for capturable=False and foreach=True"
    ends = []
    for rate in (0.01, torch.tensor(0.01)):
        weight = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
        optimizer = TENSOR_RATES[name]([weight], lr=rate, weight_decay=0.1, **kernels)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        for _ in range(3):
            weight.grad = weight.detach() + 0.5
            with optimizer.perturbed():
                weight.grad = weight.detach() + 0.5
            optimizer.step()
            scheduler.step()
        ends.append(weight.detach())
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01 / 8)
    assert optimizer.param_groups[0]["lr"] is rate, "the same tensor"
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("rate", "told"), [(torch.ones(1), r"a tensor of shape \(1,\)"), (torch.tensor(-1.0), "lr=-1.0")], ids=str
)
def test_bad_tensors_for_a_learning_rate(rate: torch.Tensor, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        LightSAM([torch.ones(2, requires_grad=True)], lr=rate)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_empty_and_duplicate_parameters(make: Any) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])
    parameter = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        make([{"params": [parameter]}, {"params": [parameter]}])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        make([parameter, parameter])
    with pytest.raises(ValueError, match="leaf"):
        make([parameter * 2])


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(("saved", "loaded"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)])
def test_state_loads_into_another_dtype(make: Any, saved: torch.dtype, loaded: torch.dtype) -> None:
    """As torch's own: floating state takes the parameter's dtype, step counts stay float32."""
    optimizers = []
    for dtype in (saved, loaded):
        parameter = torch.ones(3, dtype=dtype, requires_grad=True)
        optimizers.append(make([parameter]))
        parameter.grad = torch.full_like(parameter, 0.5)
        with optimizers[-1].perturbed():
            pass
        optimizers[-1].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    (state,) = optimizers[1].state.values()
    assert state["exp_avg_sq"].dtype == loaded
    assert state["step"].dtype == torch.float32
    parameter = optimizers[1].param_groups[0]["params"][0]
    with optimizers[1].perturbed():
        pass
    optimizers[1].step()
    assert parameter.isfinite().all()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_state_after_adding_a_group(make: Any) -> None:
    first, second = (torch.ones(n, requires_grad=True) for n in (2, 3))
    optimizer = make([first])
    optimizer.add_param_group({"params": [second], "lr": 0.5, "rho": 0.0})
    for parameter in (first, second):
        parameter.grad = torch.ones_like(parameter)
    with optimizer.perturbed():
        assert torch.equal(second, torch.ones(3)), "rho is 0 there"
    optimizer.step()
    state_dict = optimizer.state_dict()
    assert [group["params"] for group in state_dict["param_groups"]] == [[0], [1]]
    assert [group["lr"] for group in state_dict["param_groups"]][1] == 0.5
    other = make([{"params": [first]}, {"params": [second]}])
    other.load_state_dict(state_dict)
    assert other.param_groups[1]["rho"] == 0.0
