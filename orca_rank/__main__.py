"""`python -m orca_rank`: Hydra composes the config, one stage runs."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import platform
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from orca_rank import __version__, gpus, job
from orca_rank.artifacts.command import TYPED, alike, remember, swept
from orca_rank.artifacts.lock import WAIT
from orca_rank.hints import hint
from orca_rank.processes import world

_CHECKOUT = Path(__file__).parents[1] / "conf"
CONF = _CHECKOUT if (_CHECKOUT / "config.yaml").is_file() else Path(__file__).parent / "conf"
# Options that say where and how the demo runs; with any other a command starts from the base config.
DEMO_TOO = ("run=", "seed=", "threads=", "force=", "paths.", "logger=", "logger.", "trainer.", "hydra")

# Ctrl-C, the cluster, a terminal that is closed; Windows has no SIGHUP.
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(BaseException):
    """SIGINT, SIGTERM or SIGHUP: no Exception, so that nothing on the way takes it for an error of its own."""


class PointFailed(CompactHydraException):
    """What a job in a process of its own ends with; Hydra shows it without a traceback.

    Args:
        message: one sentence. listed: the file in which all failures of the sweep stand.
    """

    def __init__(self, message: str, listed: str) -> None:
        super().__init__(message)
        self.args, self.listed = (message, listed), listed

    def __str__(self) -> str:
        return str(self.args[0])


def main(arguments: Sequence[str]) -> int:
    """Run one command line; its exit status."""
    if "--version" in arguments:
        print(f"orca_rank {__version__}")
        return 0
    sys.argv[1:] = with_demo(arguments)
    os.environ[TYPED] = shlex.join(sys.argv[1:])
    _listen()
    failed: list[tuple[str, str]] = []  # points of a sweep, each with its error
    moments: list[float] = []  # when the points of a sweep ended, one after the other; first when they began
    elsewhere = f"-{platform.node()}-{os.getpid()}"  # ends the names of files in which jobs in other processes write
    try:
        hydra.main(str(CONF), "config", "1.3")(lambda config: _job(config, failed, elsewhere, moments))()
    except SystemExit as end:
        if isinstance(listed := getattr(end.__context__, "listed", None), str):
            failed += [(point, said) for point, said in map(json.loads, Path(listed).read_text().splitlines())]
            Path(listed).unlink()
        elif end.__context__ is not None and (mend := hint(end.__context__, CONF)) is not None:
            print(f"error: {mend}", file=sys.stderr)
        raise
    except (Stopped, KeyboardInterrupt) as stop:
        number = signal.Signals(stop.args[0]) if stop.args else signal.SIGINT
        again = shlex.join(["python", "-m", "orca_rank", *arguments])
        sentence = f"stopped by {number.name}; the same command goes on from the last checkpoint"
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"\n{sentence}:\n  {again}", file=sys.stderr, flush=True)
        return 128 + number
    finally:
        if failed:
            print(f"\n{len(failed)} of the sweep's points failed:", *alike(failed), sep="\n  ", file=sys.stderr)
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


def _job(config: DictConfig, failed: list[tuple[str, str]], elsewhere: str, moments: list[float]) -> float | None:
    """Run the configured stage; an error ends the command, or in a sweep goes on the list while the rest runs: on that
    in the sweep's folder where this is a process of its own, whose status says so too.

    Returns:
        For a sweeper that searches, the validation metric of the fine-tune; infinity of one that failed.
    """
    hydra_config = HydraConfig.get()
    options = list(hydra_config.overrides.task)
    os.environ[TYPED] = shlex.join(_words(hydra_config))
    theirs = [source.path for source in hydra_config.runtime.config_sources if source.provider == "command-line"]
    flags = [part for path in theirs for part in ("--config-dir", path.removeprefix("file://"))]
    alone = hydra_config.mode != RunMode.MULTIRUN or hydra_config.launcher["_target_"].endswith(".BasicLauncher")
    if not alone:  # points that share an alignment or a measurement make it once
        os.environ[WAIT] = "1"
    turn = None
    if hydra_config.mode == RunMode.MULTIRUN and world().size == 1:
        sweep = importlib.import_module("orca_rank.stages.sweep")  # here, because what it reads with takes a second
        shared = None if alone else Path(hydra_config.sweep.dir) / f".ended{elsewhere}"
        turn = sweep.Turn(Path(config.paths.runs) / str(config.run), _points(hydra_config), moments, shared)
        if alone:
            print(f"\n{turn.begins()}: {' '.join(swept(options))}", flush=True)
    value, bad = None, None
    try:
        remember(options, flags)
        job.check(config)
        if not alone and world().size == 1:
            gpus.take_one(config.trainer)
        job.run(config, options, flags)
        if turn is not None and not str(hydra_config.sweeper["_target_"]).endswith(".BasicSweeper"):
            value = sweep.objective(config)
    except Exception as error:
        message = _show(error)
        if hydra_config.mode != RunMode.MULTIRUN or world().size > 1:  # of several, the others may not have failed
            sys.exit(1)
        failure, value = (" ".join(swept(options) or options), message), math.inf
        if alone:
            failed.append(failure)
        else:
            listed = Path(hydra_config.sweep.dir) / f".failed{elsewhere}"
            with listed.open("a") as stream:
                stream.write(json.dumps(failure) + "\n")
            bad = PointFailed("not all of the sweep went well; what failed stands below", str(listed))
    if turn is not None:
        said = turn.ends()
        if not alone:
            print(f"{said}: {' '.join(swept(options))}{' failed' if bad is not None else ''}", flush=True)
    if bad is not None:
        raise bad
    return value


def _points(hydra_config: Any) -> int | None:
    """How many points the running sweep has; None where its sweeper alone knows."""
    sweeper = hydra_config.sweeper
    if not str(sweeper["_target_"]).endswith(".BasicSweeper"):
        return sweeper.get("n_trials")
    words = [word for word in _words(hydra_config) if "=" in word and not word.startswith("-")]
    overrides = {one.key_or_group: one for one in OverridesParser.create().parse_overrides(words)}
    several = [one for one in overrides.values() if one.is_discrete_sweep()]
    return math.prod(sum(1 for _ in one.sweep_string_iterator()) for one in several)


def _words(hydra_config: Any) -> list[str]:
    """The command line as it was typed, which the arguments of a process that a launcher starts are not, after what
    the config says to sweep over (hydra.sweeper.params)."""
    typed = shlex.split(os.environ.get(TYPED, ""))
    params = (hydra_config.sweeper.get("params") or {}) if hydra_config.mode == RunMode.MULTIRUN else {}
    return [*(word for name, value in params.items() if (word := f"{name}={value}") not in typed), *typed]


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

    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as for a job of nohup
            signal.signal(number, stop)


def script() -> None:
    """The console script `orca_rank`, which shells can complete; they know of no `python -m`."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    script()
