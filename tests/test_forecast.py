"""What a training says of its time and memory, on a clock of the test's own."""

from __future__ import annotations

import time
from pathlib import Path
from unittest.mock import Mock

import lightning as L
import pytest
import torch

from orca_rank.training.forecast import Forecast, held_bytes
from orca_rank.words import duration, size


@pytest.mark.parametrize(
    ("epoch", "worth", "said"),
    [
        (0, 60.0, "about 82 s of training: 410 batches at 200 ms, "),  # 42 batches of ten epochs, less the ten seen
        (8, 1.0, "about 15 s of training: 74 batches at 200 ms, "),
        (8, 60.0, ""),
    ],
)
def test_time_left_is_that_of_the_batches_to_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], epoch: int, worth: float, said: str
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    trainer = Mock(spec=L.Trainer, max_epochs=10, current_epoch=epoch, num_training_batches=42)
    trainer.progress_bar_callback = None
    module = Mock(spec=L.LightningModule, device=torch.device("cpu"))
    forecast = Forecast(worth)
    forecast.on_train_start(trainer, module)
    for batch in range(20):
        clock[0] += 5.0 if batch < 2 else 0.2  # the first two are slow
        forecast.on_train_batch_end(trainer, module, None, None, batch)
    printed = capsys.readouterr().out
    assert printed.startswith(said) and printed.count("\n") == bool(said) and len(printed) <= 80


def test_words_of_quantities() -> None:
    assert [duration(seconds) for seconds in (99, 120, 7200)] == ["99 s", "2 min", "2.0 h"]
    assert [size(count) for count in (300 * 2**20, 1.5 * 2**30)] == ["300 MiB", "1.5 GiB"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel's own figure is Linux's")
def test_memory_is_what_the_kernel_says() -> None:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    assert held_bytes(torch.device("cpu")) == pytest.approx(1024 * int(line.split()[1]), rel=0.02)
