"""The studies run, and their committed results say what the documents say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

STUDIES = Path(__file__).parents[1] / "examples" / "studies"


def run(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(STUDIES / script), *flags], capture_output=True, text=True, check=False)


def test_parameter_agnostic_runs_and_prints(tmp_path: Path) -> None:
    flags = ["--lr", "0.01", "10", "--rho", "0.1", "--num_steps", "200", "--num_processes", "1"]
    done = run("parameter_agnostic.py", *flags, "--output_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "parameter_agnostic.json").read_text())
    assert len(results) == 10
    verdicts = {(result["method"], result["lr"]): result["verdict"] for result in results}
    assert verdicts["SAM with SGD", 10.0] == "diverges"
    assert verdicts["LightSAM-I", 10.0] != "diverges"
    assert verdicts["LightSAM-II", 0.01] == "falls"
    assert (tmp_path / "parameter_agnostic.png").read_bytes().startswith(b"\x89PNG")
    assert "### LightSAM-III, decaying" in done.stdout


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--rho", "-1"], "rho=-1.0"),
        (["--num_steps", "3"], "num_steps=3"),
        (["--table", "--output_dir", "nowhere"], "output_dir='nowhere'"),
    ],
)
def test_bad_input(
    flags: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))
    import parameter_agnostic

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
