"""benchmarks/mutants.py finds what a weak test misses."""

import importlib.util

from conftest import ROOT

SPEC = importlib.util.spec_from_file_location("mutants", ROOT / "benchmarks/mutants.py")
mutants = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutants)


def test_a_boundary_that_no_test_looks_at_survives(tmp_path, monkeypatch, capsys):
    (tmp_path / "losses.py").write_text(
        'def small(x: 2 > 1):\n    """1 < 2"""\n    return f"{x + 1}" if not x < 3 else ""\n')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_losses.py").write_text(
        "from losses import small\n\ndef test_small():\n    assert small(5) and not small(0)\n")
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "TESTS", {"losses": ["test_losses.py"]})
    assert mutants.main(["--tests", str(tmp_path / "tests"), "--which"]) == 1
    report = capsys.readouterr().out
    assert "| all | 6 | 3 | 0 | 3 |" in report and "if not x <= 3" in report
    for line in ("condition | 2 | 2", "sign, not | 1 | 1", "comparison | 1 | 0",
                 "constant | 2 | 0"):
        assert f"| {line} |" in report
    assert report.endswith("mutants they catch:\n")  # the only test is not idle
