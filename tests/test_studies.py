"""The studies run, and their committed results say what the documents say."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

STUDIES = Path(__file__).parents[1] / "examples" / "studies"


@pytest.fixture
def parameter_agnostic(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(STUDIES))
    import parameter_agnostic

    return parameter_agnostic


def test_parameter_agnostic_runs_and_prints(
    parameter_agnostic: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--lr", "0.01", "10", "--rho", "0.1", "--num_steps", "200", "--num_processes", "1"]
    parameter_agnostic.main([*flags, "--output_dir", str(tmp_path)])
    results = json.loads((tmp_path / "parameter_agnostic.json").read_text())
    assert len(results) == 10
    verdicts = {(result["method"], result["lr"]): result["verdict"] for result in results}
    assert verdicts["SAM with SGD", 10.0] == "diverges"
    assert verdicts["LightSAM-I", 10.0] != "diverges"
    assert verdicts["LightSAM-II", 0.01] == "falls"
    assert (tmp_path / "parameter_agnostic.png").read_bytes().startswith(b"\x89PNG")
    assert "### LightSAM-III, decaying" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--rho", "-1"], "rho=-1.0"),
        (["--num_steps", "3"], "num_steps=3"),
        (["--table", "--output_dir", "nowhere"], "output_dir='nowhere'"),
    ],
)
def test_bad_input(
    flags: list[str], told: str, parameter_agnostic: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parameter_agnostic.main(flags)
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_committed_grid() -> None:
    """Forms I and II bring the running mean down everywhere, III does where it decays, SAM with SGD diverges."""
    results = json.loads((STUDIES / "results" / "parameter_agnostic.json").read_text())
    by_method: dict[str, list[dict]] = {}
    for result in results:
        by_method.setdefault(result["method"], []).append(result)
    assert {len(points) for points in by_method.values()} == {25}
    for method in ("LightSAM-I", "LightSAM-II", "LightSAM-III, decaying"):
        assert all(point["fall"] < 1.0 for point in by_method[method]), method
    assert any(point["verdict"] == "diverges" for point in by_method["SAM with SGD"])
