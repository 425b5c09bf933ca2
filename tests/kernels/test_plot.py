"""The drawing of a benchmark's CSV: which rows, how long their bars are, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

PLOT = Path(__file__).resolve().parents[2] / "kernels" / "plot.py"
SPACE = "{http://www.w3.org/2000/svg}"


def test_bars(tmp_path: Path) -> None:
    """Two operations of one pass, the faster first: its bar is half as long as the longest p80, 420 pixels."""
    file = tmp_path / "x.csv"
    file.write_text(
        "op,pass,hidden,p20_ms,p50_ms,p80_ms\n"
        "torch & more,forward,64,3,4,4\nlinear_logps,forward,64,1,2,2.5\nnot timed,forward,64,nan,nan,nan\n"
        "other shape,forward,32,1,1,1\n"
    )
    run = [sys.executable, str(PLOT), str(file), "--where"]
    done = subprocess.run([*run, "hidden=64"], capture_output=True, text=True, check=True)
    root = ElementTree.fromstring(done.stdout)
    bars = [(float(x.attrib["width"]), x.attrib["fill"]) for x in root.iter(f"{SPACE}rect")][1:]
    assert bars == [(210.0, "#2457a6"), (420.0, "#b8bfc9")]
    assert [x.text for x in root.iter(f"{SPACE}text")] == ["forward, ms", "linear_logps", "2", "torch & more", "4"]
    none = subprocess.run([*run, "hidden=1"], capture_output=True, text=True, check=False)
    assert none.returncode and "expected rows with hidden=1, found none" in none.stderr
