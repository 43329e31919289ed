"""The benchmarks run, and say what they measure; none of these tests looks at how long anything took."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import HAS_COMPILER
from processes import launch

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """MiniLM has one layer of 32 units, and 100 words."""
    import shapes
    from transformers import BertConfig

    def config() -> BertConfig:
        return BertConfig(
            vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )

    monkeypatch.setitem(shapes.CONFIGS, "MiniLM-L6", config)


def test_cases_take_turns_and_the_warm_up_is_left_out() -> None:
    from measure import interleaved

    done: list[str] = []
    phases = {name: [(phase, lambda told=name + phase: done.append(told)) for phase in "12"] for name in "ab"}
    timings = interleaved(phases, 2, torch.device("cpu"), warm_up=1)
    assert done == ["a1", "a2", "b1", "b2"] * 3
    assert [len(timings[name][phase].seconds) for name in "ab" for phase in "12"] == [2] * 4


def test_summaries_of_known_times() -> None:
    from measure import Timing, ratio

    one, other = Timing([1.0, 2.0, 3.0, 4.0, 5.0]), Timing([2.0, 2.0, 1.0, 2.0, 5.0])
    assert one.median == 3.0
    assert one.quartiles == (2.0, 4.0)
    assert Timing([7.0]).quartiles == (7.0, 7.0)
    assert (one + other).seconds == [3.0, 4.0, 4.0, 6.0, 10.0]
    assert ratio(one, other) == 1.0  # of 0.5, 1, 3, 2, 1: turn by turn


@pytest.mark.parametrize(
    ("name", "weights"),
    [("MiniLM-L6", 22.7e6), ("BERT-base", 109.5e6), ("RoBERTa-large", 355e6), ("decoder-1B", 1.24e9)],
)
def test_shapes_are_those_of_the_models(name: str, weights: float) -> None:
    from shapes import shapes_of

    assert shapes_of(name).weights == pytest.approx(weights, rel=0.01)


def test_a_model_that_is_too_large_loses_layers() -> None:
    from shapes import shapes_of

    cut = shapes_of("decoder-1B", max_weights=600e6)
    assert cut.title == f"decoder-1B, {cut.layers} of 16 layers"
    assert 500e6 < cut.weights <= 600e6


def test_groups_hold_what_there_is_memory_for() -> None:
    from phases import COPY, cases, groups

    found = cases(with_peers=True, with_native=True)
    for copies in (7.0, 12.0, 1000.0):
        made = groups(found, copies)
        assert [name for members in made for name in members[1:]] == [name for name in found if name != COPY]
        assert all(members[0] == COPY for members in made)
        assert all(sum(found[name].copies for name in members) <= copies for members in made)


@pytest.mark.usefixtures("tiny")
def test_phases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import phases

    path = tmp_path / "r.json"
    flags = ["--models", "MiniLM-L6", "--repetitions", "2", "--results", str(path), "--profile", str(tmp_path / "p")]
    flags += [] if HAS_COMPILER else ["--no_native"]
    phases.main(flags)
    phases.main(flags)
    assert len(phases.read(path)) == 1, "the same kind of run takes the place of the first"
    lines = capsys.readouterr().out.splitlines()
    for case in phases.cases(with_peers=True, with_native=HAS_COMPILER):
        assert any(line.startswith(f"| {case} |") for line in lines)
    told = json.loads(gzip.decompress((tmp_path / "p" / "minilm-l6-lightsam-adam.json.gz").read_bytes()))
    assert {"perturb", "restore", "step"} <= {event["name"] for event in told["traceEvents"]}
    assert "host_name" not in told


@pytest.mark.usefixtures("tiny")
def test_each_case_of_the_phases_moves_the_weights_and_no_state_is_shared() -> None:
    import phases

    shapes = phases.shapes_of("MiniLM-L6")
    for name, case in phases.cases(with_peers=True, with_native=HAS_COMPILER).items():
        parameters = phases.make_parameters(shapes, torch.device("cpu"), torch.float32)
        before = [parameter.detach().clone() for parameter in parameters]
        for phase, work in case.make(parameters):
            work()
            is_moved = not all(map(torch.equal, before, parameters))
            assert is_moved == (name != phases.COPY and phase != "restore"), (name, phase)


@pytest.mark.usefixtures("tiny")
def test_memory_is_what_the_state_takes(tmp_path: Path) -> None:
    import memory

    found = memory.measure("MiniLM-L6", "cpu")["peaks"]
    copies = {case: one["bytes"] / one["trained"] for case, one in found.items()}
    for case in ("LightSAM-AdaGrad-Norm", "LightSAM-Adagrad", "LightSAM-Adam", "SAM(AdamW)"):
        # A tensor of no dimension, and the largest difference of a rounded allocation, are little beside the weights.
        assert copies[case] == pytest.approx(memory.CASES[case][1], abs=0.15), case
    assert copies["davda54 style SAM(AdamW)"] > copies["SAM(AdamW)"] + 0.2
    assert found[memory.LORA]["trained"] < found["LightSAM-Adam"]["trained"] / 4


@pytest.mark.usefixtures("tiny")
def test_training_step_and_its_trainers_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import training_step

    flags = ["--batch_size", "2", "--length", "8", "--repetitions", "2", "--results", str(tmp_path / "r.json")]
    training_step.main(flags)
    (result,) = training_step.read(tmp_path / "r.json")
    assert {name: len(seconds) for name, seconds in result["seconds"].items()} == dict.fromkeys(
        training_step.cases(training_step.BenchmarkArguments()), 2
    )
    assert f"| {training_step.PLAIN} |" in capsys.readouterr().out


def test_a_trainer_that_fails_is_told() -> None:
    import threading

    from measure import Timing
    from training_step import Turns

    def train() -> None:
        raise RuntimeError("out of luck")

    turns = Turns(Timing(), torch.device("cpu"), warm_up=0)
    threading.Thread(target=turns.run, args=(train,), daemon=True).start()
    with pytest.raises(RuntimeError, match="out of luck"):
        turns.take()


def test_scaling_over_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ascent that is not synchronised sends what AdamW sends; one that is, twice that."""
    import scaling

    def forked(command: list[str], check: bool) -> None:
        """In torchrun's place, without the seconds that interpreters take to begin."""
        assert check
        assert "--nproc_per_node=2" in command
        script = command.index(scaling.__file__)
        launch(Path(scaling.__file__), tmp_path, 2, *command[script + 1 :])

    monkeypatch.setattr(scaling, "subprocess", SimpleNamespace(run=forked))
    flags = ["--processes", "2", "--batch_size", "1", "--length", "8", "--repetitions", "1"]
    scaling.main([*flags, "--results", str(tmp_path / "r.json")])
    (result,) = scaling.read(tmp_path / "r.json")
    adamw, synchronised, unsynchronised = (result["figures"][name]["bytes"] for name in scaling.CASES)
    assert adamw == pytest.approx(4 * 22.7e6, rel=0.01), "the gradient, once"
    assert unsynchronised == pytest.approx(adamw, rel=1e-3)
    assert synchronised == pytest.approx(2 * adamw, rel=1e-3)


@pytest.mark.parametrize(
    ("script", "flags", "told"),
    [
        ("phases", ["--models", "GPT-9"], "models='GPT-9'"),
        ("phases", ["--dtype", "float16"], "dtype='float16'"),
        ("phases", ["--allocator", "mine"], "allocator='mine'"),
        ("phases", ["--repetitions", "0"], "repetitions=0"),
        ("phases", ["--graph"], "graph=True: device='cpu'"),
        ("phases", ["--memory", "0"], "memory=0.0"),
        ("memory", ["--device", "tpu"], "device='tpu'"),
        ("phases", ["--device", "tpu"], "device='tpu': expected cpu"),
        ("training_step", ["--device", "tpu"], "device='tpu': expected cpu"),
        ("training_step", ["--model", "decoder-1B"], "model='decoder-1B'"),
        ("training_step", ["--batch_size", "0"], "batch_size=0"),
        ("training_step", ["--cheaper", "ascent_every=4"], "cheaper='ascent_every=4'"),
        ("scaling", ["--processes", "0"], "processes=0"),
    ],
)
def test_bad_input(script: str, flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib

    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main(flags)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_the_page_is_that_of_the_results() -> None:
    import report

    report.main(["--check"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("tiny")
def test_on_a_gpu(tmp_path: Path) -> None:
    import memory
    import phases
    import training_step

    flags = ["--models", "MiniLM-L6", "--device", "cuda", "--repetitions", "2", "--graph", "--no_peers"]
    phases.main([*flags, "--results", str(tmp_path / "p")])
    training_step.main(["--device", "cuda", "--bf16", "--repetitions", "2", "--results", str(tmp_path / "t")])
    found = memory.measure("MiniLM-L6", "cuda")["peaks"]
    assert found["LightSAM-Adam"]["bytes"] >= 5 * found["LightSAM-Adam"]["trained"]


def test_data_path_measures_padding_and_the_cache(tmp_path: Path, data_dir: Path, monkeypatch, capsys) -> None:
    import data_path
    from measure import read

    from hf_lightsam.glue import token_cache

    monkeypatch.setattr(token_cache, "KEPT_FROM", 1)
    data_path.main(["--data_dir", str(data_dir), "--tasks", "cola", "--results", str(tmp_path / "r.json")])
    (result,) = read(tmp_path / "r.json")
    assert result["rows"] == 48
    assert 0 <= result["grouped"] <= result["random"] < 1
    assert 0 <= result["by_length"] <= result["in_order"] < 1
    assert "| cola |" in capsys.readouterr().out
