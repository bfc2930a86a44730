"""`python -m orca_rank`: Hydra composes the config, one stage runs."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from orca_rank import __version__, job
from orca_rank.processes import world

_CHECKOUT = Path(__file__).parents[1] / "conf"
CONF = _CHECKOUT if (_CHECKOUT / "config.yaml").is_file() else Path(__file__).parent / "conf"
# Options that say where and how the demo runs; with any other a command starts from the base config.
DEMO_TOO = ("run=", "seed=", "threads=", "force=", "paths.", "logger=", "logger.", "trainer.", "hydra")


class Stopped(BaseException):
    """SIGINT or SIGTERM: no Exception, so that nothing on the way takes it for an error of its own."""


def main(arguments: Sequence[str]) -> int:
    """Run one command line; its exit status."""
    if "--version" in arguments:
        print(f"orca_rank {__version__}")
        return 0
    sys.argv[1:] = with_demo(arguments)
    _listen()
    failed: list[str] = []
    try:
        hydra.main(str(CONF), "config", "1.3")(lambda config: _job(config, failed))()
    except (Stopped, KeyboardInterrupt) as stop:
        number = signal.Signals(stop.args[0]) if stop.args else signal.SIGINT
        again = shlex.join(["python", "-m", "orca_rank", *arguments])
        sentence = f"stopped by {number.name}; the same command goes on from the last checkpoint"
        print(f"\n{sentence}:\n  {again}", file=sys.stderr)
        return 128 + number
    finally:
        if failed:
            print(f"\n{len(failed)} of the sweep's points failed:", *failed, sep="\n  ", file=sys.stderr)
    return 1 if failed else 0


def with_demo(arguments: Sequence[str]) -> list[str]:
    """The command line with experiment=demo where it says nothing but where and how to run."""
    if {"--help", "-h"} & {*arguments}:
        return list(arguments)  # nothing runs
    options = [i for i, one in enumerate(arguments) if not one.startswith("-") and ("=" in one or one.startswith("~"))]
    if not all(arguments[i].lstrip("+").startswith(DEMO_TOO) for i in options):
        return list(arguments)
    # Beside the other options: argparse takes them from one place only.
    place = options[-1] + 1 if options else len(arguments)
    return [*arguments[:place], "experiment=demo", *arguments[place:]]


def _job(config: DictConfig, failed: list[str]) -> None:
    """Run the configured stage; an error ends the command, or in a sweep goes on the list while the rest runs."""
    hydra_config = HydraConfig.get()
    options = list(hydra_config.overrides.task)
    theirs = [source.path for source in hydra_config.runtime.config_sources if source.provider == "command-line"]
    flags = [part for path in theirs for part in ("--config-dir", path.removeprefix("file://"))]
    try:
        job.check(config)
        job.run(config, options, flags)
    except Exception as error:
        message = _show(error)
        if hydra_config.mode != RunMode.MULTIRUN or world().size > 1:  # of several, the others may not have failed
            sys.exit(1)
        if not hydra_config.launcher["_target_"].endswith(".BasicLauncher"):
            raise  # in a process of its own, where nobody reads the list
        failed.append(f"{' '.join(options)}: {message}")


def _show(error: Exception) -> str:
    """Print an error as its kind deserves; its message in one piece."""
    message, text, _ = job.words(error)
    print(text, file=sys.stderr)
    return message


def _listen() -> None:
    """End with a sentence and a status that is not 0 when the user or the cluster stops the command."""
    parent = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != parent:  # a worker that was forked from here dies as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as for a job of nohup
            signal.signal(number, stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
