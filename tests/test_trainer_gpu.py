"""The Trainer on accelerators, one and several. What gloo and a CPU can run in their place is run on those as well."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_args, make_bert, make_rows
from engines import train_under_engine
from tasks import make_task
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_lightsam import LightSAMTrainer


def gpus(count: int) -> list[pytest.MarkDecorator]:
    reason = f"needs {count} CUDA device{'s' if count > 1 else ''}"
    return [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < count, reason=reason)]


CUDA = pytest.param("cuda", marks=gpus(1))
TWO_GPUS = pytest.param("cuda", marks=gpus(2))
devices = pytest.mark.parametrize("device", ["cpu", CUDA])

METHODS: dict[str, dict[str, Any]] = {
    "lightsam_adam": {"optim": "lightsam_adam", "learning_rate": 1e-3},
    "lightsam_adagrad_norm": {"optim": "lightsam_adagrad_norm", "learning_rate": 1e-2},
    # Adam hides errors of scale; SGD shows them.
    "sam": {"optim": "sam", "optim_args": "descent=sgd", "learning_rate": 1e-1, "max_grad_norm": 0.0},
}
PRECISIONS: dict[str, dict[str, Any]] = {"float32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}
STEPS = 10
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "rho": 0.1,
    "adam_epsilon": 1e-5,  # AdaGrad and Adam scale gradients that are 0 up to rounding up to full size
    "train_sampling_strategy": "sequential",
}


@pytest.fixture
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Record(TrainerCallback):
    """Keeps the weights where a step begins, before the optimizer takes it, and where it ends."""

    def __init__(self) -> None:
        self.begin: list[Tensor] = []
        self.restored: list[Tensor] = []
        self.end: list[Tensor] = []

    def on_step_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.begin.append(flat(model))

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.restored.append(flat(model))

    def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.end.append(flat(model))


class Overflow:
    """Makes the classifier's gradient infinite in given calls of backward (0 is the first ascent)."""

    def __init__(self, model: nn.Module, calls: set[int]) -> None:
        self.count, self.calls = -1, calls
        model.classifier.weight.register_hook(self)

    def __call__(self, gradient: Tensor) -> Tensor:
        self.count += 1
        return gradient * torch.inf if self.count in self.calls else gradient


class SmallScale(LightSAMTrainer):
    """Starts float16's loss scale low, so that only what a test makes overflow does."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8, growth_interval=4)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()


def vector(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


def difference(weights: Tensor, expected: Tensor, start: Tensor) -> float:
    """Return the distance of two runs' ends, relative to the way that the expected one went."""
    way = (expected.double() - start.double()).norm()
    assert way > 1e-4 * start.double().norm(), "nothing was trained"
    return float((weights.double() - expected.double()).norm() / way)


def fit(
    device: str, folder: Path, model: nn.Module | None = None, *, resume: str | None = None, **options: Any
) -> tuple[SmallScale, Record]:
    """Train on one device, however many GPUs there are."""
    record = Record()
    args = make_args(folder, use_cpu=device == "cpu", **{**OPTIONS, **options})
    args._n_gpu = min(args.n_gpu, 1)
    trainer = SmallScale(model or make_bert(dropout=0.0), args, train_dataset=make_rows(), callbacks=[record])
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.model.device.type == device
    return trainer, record


# ---- One device -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("device", "precision", "tolerance"),
    [
        ("cpu", "bf16", 0.2),
        pytest.param("cuda", "float32", 1e-3, marks=gpus(1)),
        pytest.param("cuda", "bf16", 0.2, marks=gpus(1)),
        pytest.param("cuda", "fp16", 0.05, marks=gpus(1)),
    ],
)
def test_a_device_trains_as_the_cpu_does_in_float32(
    tmp_path: Path, device: str, precision: str, tolerance: float, method: str
) -> None:
    start = flat(make_bert())
    trainer, record = fit(device, tmp_path, **METHODS[method], **PRECISIONS[precision])
    expected, _ = fit("cpu", tmp_path, **METHODS[method])
    assert flat(trainer.model).dtype == torch.float32
    assert difference(flat(trainer.model), flat(expected.model), start) < tolerance
    assert (trainer.accelerator.scaler is not None) == (precision == "fp16")
    for log, other in zip(trainer.state.log_history, expected.state.log_history, strict=True):
        for name in ("loss", "ascent_grad_norm", "perturbation_norm"):
            assert log.get(name, 0.0) == pytest.approx(other.get(name, 0.0), rel=max(tolerance, 1e-3)), name
    assert all(torch.equal(a, b) for a, b in zip(record.begin, record.restored, strict=True))


@devices
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_weights_come_back(tmp_path: Path, device: str, dtype: str, method: str) -> None:
    """With dropout, and with weights of low precision: what the optimizer steps from is where the step began."""
    model = make_bert(dropout=0.1).to(getattr(torch, dtype))
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 3}
    trainer, record = fit(device, tmp_path, model, **{**METHODS[method], "rho": 1.0, **options})
    assert len(record.begin) == 3
    assert all(torch.equal(a, b) for a, b in zip(record.begin, record.restored, strict=True))
    assert all(log["perturbation_norm"] > 1e-3 for log in trainer.state.log_history if "sharpness" in log)


@devices
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("precision", ["float32", "bf16", pytest.param("fp16", marks=gpus(1))])
def test_a_run_repeats_and_resumes_to_the_same_bits(tmp_path: Path, device: str, precision: str) -> None:
    """With dropout; in float16 the loss scale, which grows after every four steps, is resumed too."""
    if device == "cpu" and precision == "fp16":
        pytest.skip("a CPU has no float16 training")
    options = {**METHODS["lightsam_adam"], **PRECISIONS[precision], "save_strategy": "steps", "save_steps": 3}
    whole, _ = fit(device, tmp_path / "whole", make_bert(), **options)
    again, _ = fit(device, tmp_path / "again", make_bert(), **options)
    checkpoint = str(tmp_path / "whole" / "out" / "checkpoint-3")
    resumed, _ = fit(device, tmp_path / "resumed", make_bert(seed=1), resume=checkpoint, **options)
    assert torch.equal(flat(whole.model), flat(again.model))
    assert torch.equal(flat(whole.model), flat(resumed.model))
    if precision == "fp16":
        assert whole.accelerator.scaler.get_scale() == 2.0**10
        assert resumed.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("calls", [{2}, {3}, {2, 3}], ids=["ascent", "descent", "both"])
def test_an_overflow_in_float16(tmp_path: Path, device: str, calls: set[int], method: str) -> None:
    """Calls 2 and 3 are the second step's ascent and descent."""
    model = make_bert(dropout=0.0)
    Overflow(model, calls)
    trainer, record = fit(device, tmp_path, model, **METHODS[method], fp16=True, max_steps=4)
    is_skipped = 3 in calls
    assert all(weights.isfinite().all() for weights in record.end)
    assert all(torch.equal(a, b) for a, b in zip(record.begin, record.restored, strict=True))
    assert torch.equal(record.end[1], record.end[0]) == is_skipped
    assert not torch.equal(record.end[2], record.end[1])
    assert trainer.accelerator.scaler.get_scale() == (2.0**7 if is_skipped else 2.0**9)


@devices
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, device: str, reentrant: bool) -> None:
    start = flat(make_bert())
    options = METHODS["lightsam_adam"]
    plain, _ = fit(device, tmp_path, make_bert(), **options)
    trainer, _ = fit(
        device,
        tmp_path,
        make_bert(),
        **options,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert difference(flat(trainer.model), flat(plain.model), start) < 1e-4


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "eager"), pytest.param("cuda", "inductor", marks=gpus(1))], ids=["cpu", "cuda"]
)
def test_torch_compile(tmp_path: Path, device: str, backend: str) -> None:
    start = flat(make_bert())
    options = {**METHODS["sam"], "max_steps": 4}
    plain, _ = fit(device, tmp_path, **options)
    torch._dynamo.reset()
    trainer, _ = fit(device, tmp_path, **options, torch_compile=True, torch_compile_backend=backend)
    torch._dynamo.reset()
    assert difference(flat(trainer.model), flat(plain.model), start) < 1e-3


# ---- Two devices ----------------------------------------------------------------------------------------------------

SAVING = {"save_strategy": "steps", "save_steps": 4}
SHARDED = {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
FULL = {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
NUM_ROWS = 80
PAIRS = [
    ("classification", "lightsam_adam"),
    ("classification", "lightsam_adagrad_norm"),
    ("regression", "sam"),
    ("causal_lm", "sam"),
]
LAYERS = {"classification": "BertLayer", "regression": "BertLayer", "causal_lm": "GPT2Block"}


def engine_case(name: str, task: str, method: str, batch: int, accumulation: int = 1, **options: Any) -> dict[str, Any]:
    environment = {**FULL, **options.pop("environment", {}), "FSDP_TRANSFORMER_CLS_TO_WRAP": LAYERS[task]}
    shape = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    return {
        "name": name,
        "task": task,
        "num_rows": NUM_ROWS,
        "environment": environment,
        "options": {**OPTIONS, **METHODS[method], **shape, **options},
    }


def engine_cases(folder: Path, engine: str) -> list[dict[str, Any]]:
    cases = [engine_case(f"{task} {method} 4x1", task, method, 4) for task, method in PAIRS]
    cases += [engine_case(f"{task} {method} 2x2", task, method, 2, 2) for task, method in PAIRS if method == "sam"]
    kinds = {"full": FULL, "sharded": SHARDED} if engine == "fsdp2" else {"full": FULL}
    for kind, environment in kinds.items():
        options = {"environment": environment}
        cases.append(engine_case(kind, "classification", "lightsam_adam", 4, **options, **SAVING))
        resumed = engine_case(f"{kind} resumed", "classification", "lightsam_adam", 4, **options)
        cases.append({**resumed, "resume": str(folder / kind / "out" / "checkpoint-4")})
    cases.append(engine_case("bf16", "classification", "lightsam_adam", 4, bf16=True))
    cases.append(engine_case("local", "classification", "sam", 4, sync_ascent=False))
    return cases


# DDP on CPUs is test_distributed.py's, for more tasks and methods.
@pytest.fixture(
    scope="module",
    params=[("cpu", "fsdp2"), *(pytest.param(("cuda", engine), marks=gpus(2)) for engine in ("ddp", "fsdp2"))],
    ids="-".join,
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    device, engine = request.param
    folder = tmp_path_factory.mktemp(engine)
    results = train_under_engine(folder, engine, 2, engine_cases(folder, engine), device=device)
    return {"device": device, "engine": engine, **results}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same rows in one batch on one device."""
    known: dict[tuple[str, str, str], dict[str, Any]] = {}

    def train(device: str, task: str, method: str) -> dict[str, Any]:
        key = (device, task, method)
        if key not in known:
            model, rows = make_task(task, NUM_ROWS)
            options = {**OPTIONS, **METHODS[method], "per_device_train_batch_size": 8}
            args = make_args(tmp_path_factory.mktemp("one"), use_cpu=device == "cpu", **options)
            args._n_gpu = min(args.n_gpu, 1)
            trainer = LightSAMTrainer(model, args, train_dataset=rows)
            start = vector(model.state_dict()).cpu()
            trainer.train()
            weights = vector(trainer.model.state_dict()).cpu()
            logs = [entry for entry in trainer.state.log_history if "sharpness" in entry]
            known[key] = {"start": start, "weights": weights, "logs": logs}
        return known[key]

    return train


def tolerance(device: str) -> float:
    """Relative to the way that the weights went; kernels of a GPU add up in another order."""
    return 1e-4 if device == "cpu" else 2e-3


@pytest.mark.parametrize(("task", "method"), PAIRS)
def test_two_devices_train_as_one(results: dict[str, Any], one: Any, task: str, method: str) -> None:
    device = results["device"]
    expected = one(device, task, method)
    names = [f"{task} {method} 4x1", *([f"{task} {method} 2x2"] if method == "sam" else [])]
    for name in names:
        result = results[name]
        assert (result["steps"], result["world_size"], result["device"]) == (STEPS, 2, device)
        assert result["sharded"] == (results["engine"] == "fsdp2")
        assert result["ranks_agree"], name
        assert difference(vector(result["weights"]), expected["weights"], expected["start"]) < tolerance(device), name
        for log, other in zip(result["logs"], expected["logs"], strict=True):
            for key in ("loss", "ascent_grad_norm", "perturbation_norm"):
                assert log[key] == pytest.approx(other[key], rel=max(1e-3, tolerance(device)), abs=1e-6), (name, key)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_checkpoints_of_two_devices_resume(results: dict[str, Any], kind: str) -> None:
    if results["engine"] == "ddp" and kind == "sharded":
        pytest.skip("DDP has no shards")
    whole, resumed = results[kind], results[f"{kind} resumed"]
    assert whole["ranks_agree"]
    assert resumed["ranks_agree"]
    assert resumed["steps"] == STEPS
    assert len(resumed["logs"]) == STEPS, "the log of the first steps comes out of the checkpoint"
    if results["device"] == "cpu":
        assert torch.equal(vector(resumed["weights"]), vector(whole["weights"]))
    torch.testing.assert_close(vector(resumed["weights"]), vector(whole["weights"]), rtol=1e-4, atol=1e-5)


def test_bf16_on_two_devices(results: dict[str, Any], one: Any) -> None:
    """Under FSDP2 the shards are float32 and what is gathered and computed with is bfloat16."""
    expected = one(results["device"], "classification", "lightsam_adam")
    result = results["bf16"]
    assert result["ranks_agree"]
    assert all(tensor.dtype == torch.float32 for tensor in result["weights"].values())
    error = difference(vector(result["weights"]), expected["weights"], expected["start"])
    assert 1e-3 < error < 0.3, error


def test_a_local_ascent_on_two_devices(results: dict[str, Any], one: Any) -> None:
    """Under DDP each rank's own perturbation; shards are of one common one, so that FSDP2 is refused."""
    result = results["local"]
    if results["engine"] == "fsdp2":
        assert "FSDP under sync_ascent=False" in result["error"]
        return
    expected = one(results["device"], "classification", "sam")
    assert result["ranks_agree"]
    assert difference(vector(result["weights"]), expected["weights"], expected["start"]) > 1e-3
