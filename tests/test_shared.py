"""Files that several processes want at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orca_rank.artifacts.shared import making

ROOT = Path(__file__).parents[1]
GENERATE = """
import sys, time
from pathlib import Path
from orca_rank.data import darcy_data

folder, go = Path(sys.argv[1]), Path(sys.argv[2])
solved, sample_pairs = [], darcy_data.sample_pairs
def slow(*given):
    solved.append(given[0])
    time.sleep(0.02)  # so that the processes meet
    return sample_pairs(*given)
darcy_data.sample_pairs = slow
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
data = darcy_data.generate(65, folder=folder, grid=16, stride=1, workers=1)
print(len(solved), float(abs(data.solution).sum()))
"""


@pytest.mark.slow
def test_processes_that_want_the_same_darcy_data_solve_them_once(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", GENERATE, str(tmp_path / "cache"), str(tmp_path / "go")]
    processes = [
        subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        (tmp_path / "go").touch()
        ended = [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ended
    solved, sums = zip(*(out.split() for out, _ in ended), strict=True)
    assert sorted(solved) == ["0", "5"]  # chunks of 16
    assert len(set(sums)) == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npz"]


MAKE = """
import os, sys, time
from pathlib import Path
from orca_rank.artifacts.shared import making

path = Path(sys.argv[1])
with making(path):
    if not path.exists():
        with open(path.parents[1] / "made", "a") as stream:
            stream.write(f"{os.getpid()}\\n")
        time.sleep(0.3)
        path.write_text("whole")
"""


def test_one_process_at_a_time_makes_a_shared_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen([sys.executable, "-c", MAKE, str(path)], env=environment) for _ in range(4)]
    assert [process.wait(timeout=100) for process in processes] == [0, 0, 0, 0]
    assert len((tmp_path / "made").read_text().splitlines()) == 1
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["file.txt", "made", "new"]


def test_what_is_half_made_stays_for_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with pytest.raises(KeyboardInterrupt), making(path) as parts:
        (parts / "one").write_text("1")
        raise KeyboardInterrupt
    with making(path) as parts:
        assert [one.name for one in parts.iterdir() if one.name != ".lock"] == ["one"]
        path.touch()
    assert [one.name for one in tmp_path.iterdir()] == ["file.txt"]
