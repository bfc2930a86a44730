"""The command line as a newcomer meets it: help, doctor, one clear error, and the commands that the README shows."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from shared import TINY_SWIN

import orca_rank
from orca_rank.__main__ import with_demo
from orca_rank.artifacts.command import TYPED, alike, remember, runs_apart, swept
from orca_rank.artifacts.command import command as same_command
from orca_rank.build import build
from orca_rank.errors import foreseen
from orca_rank.stages import chain, doctor
from orca_rank.stages.chain import clashing
from orca_rank.weights import shipped

README = Path(__file__).parents[1] / "README.md"
PAGES = (README, *sorted((README.parent / "docs").glob("*.md")))


def command(folder: Path, *options: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{README.parent}{os.pathsep}{folder}",
        "COLUMNS": "120",
        "OMP_NUM_THREADS": "1",
    }

    def heard() -> None:  # what a shell starts in the background does not hear
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    return subprocess.run(
        [sys.executable, "-m", "orca_rank", *options],
        cwd=folder, env=environment, capture_output=True, text=True, preexec_fn=heard,
    )  # fmt: skip


def shown_commands() -> list[list[str]]:
    """The options of every `python -m orca_rank ...` in the README and the documentation."""
    text = "\n".join(page.read_text() for page in PAGES)
    shown = re.findall(r"^python -m orca_rank [^`\n]*", text, re.MULTILINE)
    return [shlex.split(match.split("#")[0])[3:] for match in shown]


# A stage of a user's own in a module beside the command: it fails, or is sent a signal, as the test asks.
STAGE = """
import os, signal, time
from pathlib import Path


def run(config, do):
    Path(f"ran-{config.seed}").touch()
    if do.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, do))
        time.sleep(60)
    if do == "fail" and config.seed == 1:
        [].pop()
"""


def with_stage(folder: Path, do: str) -> list[str]:
    """Options that run the stage above."""
    (folder / "mine.py").write_text(STAGE)
    return ["stage=doctor", "stage._target_=mine.run", f"+stage.do={do}", "hydra.sweep.dir=sweep"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            ["stage=finetune", "data=cifar100", "paths.data=nowhere"], "CIFAR-100 is missing", marks=pytest.mark.slow
        ),
        (["threads=abc"], "threads must be null or a whole number of at least 1, received 'abc'"),
        (["stage=plan", "run=../../x"], "run must be a name, or a path below paths.runs, received '../../x'"),
    ],
)
def test_an_error_that_can_be_mended_is_one_message(tmp_path: Path, options: list[str], message: str) -> None:
    done = command(tmp_path, *options)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {message}")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_sweep_goes_on_after_a_bug_and_lists_it(tmp_path: Path) -> None:
    done = command(tmp_path, "-m", *with_stage(tmp_path, "fail"), "seed=0,1,2")
    assert done.returncode == 1
    assert [path.name for path in sorted(tmp_path.glob("ran-*"))] == ["ran-0", "ran-1", "ran-2"]
    assert done.stderr.count("[].pop()") == 1, "the traceback of a bug shows the line"
    assert "it is a bug" in done.stderr
    summary = done.stderr[done.stderr.index("1 of the sweep's points failed:") :]
    assert "seed=1: IndexError: pop from empty list" in summary


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_ends_with_a_sentence_and_its_own_status(tmp_path: Path, name: str) -> None:
    options = with_stage(tmp_path, name)
    done = command(tmp_path, *options)
    assert done.returncode == 128 + getattr(signal, name)
    assert f"stopped by {name}; the same command goes on" in done.stderr
    assert shlex.join(["python", "-m", "orca_rank", *options]) in done.stderr


def test_only_a_command_that_names_nothing_but_where_and_how_is_the_demo() -> None:
    demo = ["experiment=demo"]
    assert with_demo([]) == demo
    assert with_demo(["run=x", "paths.runs=/r", "--cfg", "job"]) == ["run=x", "paths.runs=/r", *demo, "--cfg", "job"]
    assert with_demo(["-m", "seed=0,1", "logger=wandb"]) == ["-m", "seed=0,1", "logger=wandb", *demo]
    for option in (
        "stage=align",
        "data=digits",
        "rank.r=2",
        "finetune.epochs=3",
        "+data.x=1",
        "~logger",
        "experiment=own",
    ):
        assert with_demo(["threads=1", option]) == ["threads=1", option]


def test_the_base_config_inherits_nothing_from_the_demo(composed: Callable[..., DictConfig]) -> None:
    base, demo = composed(), composed("experiment=demo")
    assert (base.run, base.threads, base.finetune.epochs, base.align.epochs) == ("default", None, 100, 60)
    assert (base.budget.mean_rank, base.budget.parameters, base.measure.compare) == (16, None, {})
    assert (demo.run, demo.threads, demo.finetune.epochs, demo.align.epochs) == ("demo", 1, 10, 20)
    assert base.rank["_target_"].endswith(".uniform")


def test_cfg_job_shows_where_a_command_starts(tmp_path: Path) -> None:
    assert "run: demo\n" in command(tmp_path, "--cfg", "job").stdout
    assert "run: default\n" in command(tmp_path, "stage=align", "--cfg", "job").stdout
    assert command(tmp_path, "--version").stdout == f"orca_rank {orca_rank.__version__}\n"


@pytest.mark.slow
def test_a_sweep_leaves_one_result_for_each_rank(tmp_path: Path) -> None:
    tiny = [
        "data=digits",
        "data.train_limit=32",
        "backbone.pretrained=false",
        "embedder.aligned=false",
        "finetune.epochs=1",
        "trainer.enable_progress_bar=false",
    ]
    done = command(tmp_path, "-m", "stage=finetune", "rank=uniform", "rank.r=1,2", *tiny)
    assert done.returncode == 0, done.stderr
    found = sorted(path.parent.name for path in tmp_path.glob("runs/default/finetune/*/metrics.json"))
    assert [name.split("-s0")[0] for name in found] == ["lora-uniform-r1", "lora-uniform-r2"]


@pytest.mark.slow
def test_help_names_every_stage_and_a_typo_its_neighbours(tmp_path: Path) -> None:
    shown = command(tmp_path, "--help")
    assert shown.returncode == 0
    for stage in ("align", "measure", "plan", "finetune", "report", "predict", "doctor", "pretrain", "all"):
        assert f"stage={stage}" in shown.stdout
    typo = command(tmp_path, "stage=finetun")
    assert typo.returncode == 1
    assert "finetune" in typo.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [o for o in shown_commands() if "-m" not in o], ids=" ".join)
def test_commands_of_the_documentation_compose(composed: Callable[..., DictConfig], options: list[str]) -> None:
    try:
        assert composed(*(option for option in options if not option.startswith("--"))).stage is not None
    except HydraException as error:
        pytest.fail(f"the README or a page of docs/ shows an option that does not exist: {error}")


def _sweeps() -> list[list[str]]:
    """The options of every sweep that a page or an experiment's file shows."""
    recipes = "\n".join(path.read_text() for path in sorted((README.parent / "conf" / "experiment").glob("*.yaml")))
    found = re.findall(r"^# python -m orca_rank (-m [^`\n]*)$", recipes.replace(" \\\n#", ""), re.MULTILINE)
    found = [one for line in found for one in line.split(" && ")]
    return [o for o in shown_commands() if "-m" in o] + [shlex.split(one) for one in found]


@pytest.mark.parametrize("options", _sweeps(), ids=" ".join)
def test_sweeps_of_the_documentation_compose_and_keep_to_their_folders(
    composed: Callable[..., DictConfig], options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [word for word in options if "=" in word and "<" not in word and not word.startswith("hydra")]
    overrides = OverridesParser.create().parse_overrides(words)
    firsts = [
        word if not one.is_discrete_sweep() else f"{one.key_or_group}={next(iter(one.sweep_string_iterator()))}"
        for word, one in zip(words, overrides, strict=True)
        if not one.is_sweep_override() or one.is_discrete_sweep()
    ]
    config = composed(*firsts)
    monkeypatch.setenv(TYPED, shlex.join(words))
    monkeypatch.setattr("orca_rank.artifacts.command._given", tuple(firsts))
    if "stages" in config.stage:
        assert runs_apart() or not clashing(swept())


def test_a_sweep_does_not_align_one_folder_twice(
    composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def point(*typed: str, given: tuple[str, ...]) -> None:
        monkeypatch.setenv(TYPED, shlex.join(["-m", "stage=all", *typed]))
        remember(given)
        chain.run(config, ["align"])

    monkeypatch.setattr("orca_rank.artifacts.command._given", ())  # as it was, afterwards
    config = composed("stage=all", *TINY_SWIN)
    verb = SimpleNamespace(check_options=lambda config: None, run=lambda config: done.append(config))
    monkeypatch.setattr(chain.importlib, "import_module", lambda name: verb)
    done: list[DictConfig] = []
    for typed, given in (
        ("seed=0,1", "seed=1"),
        ("data=digits,darcy", "data=darcy"),
        ("gap.samples=8,9", "gap.samples=9"),
    ):
        with pytest.raises(
            ValueError, match=rf"the sweep over {given.partition('=')[0]} asks for several.*run='<name>_"
        ):
            point(typed, given=(given,))
    assert not done
    point("rank.r=1,2", "layers.group=block,stage", given=("rank.r=2", "layers.group=stage"))
    point("seed=0,1", "run=x_${seed}", given=("seed=1", "run=x_${seed}"))
    point("seed=0,1", "run=x,y", given=("seed=1", "run=y"))
    point("seed=1", given=("seed=1",))
    assert len(done) == 4


def test_points_that_failed_for_one_reason_stand_beside_each_other() -> None:
    missing = "x is missing: run `python -m orca_rank rank.r={} seed={} stage=align` first"
    points = [(f"rank.r={r} seed={s}", missing.format(r, s)) for r in (1, 2) for s in (0, 1)]
    assert alike([*points[:2], ("rank.r=-1 seed=0", "rank.r must not be negative"), *points[2:]]) == [
        f"rank.r=1 seed=0: {missing.format(1, 0)}",
        "for the same reason: rank.r=1 seed=1; rank.r=2 seed=0; rank.r=2 seed=1",
        "rank.r=-1 seed=0: rank.r must not be negative",
    ]


def test_the_documentation_shows_commands() -> None:
    assert len(shown_commands()) > 15


def test_pages_link_to_pages_that_are_there() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_doctor_asks_for_every_extra() -> None:
    project = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]
    assert {*doctor.EXTRAS.values()} == {*project["optional-dependencies"]} - {"dev"}


def test_doctor_says_what_it_finds(
    composed: Callable[..., DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "cifar10_5k.npz").touch()
    doctor.run(composed("stage=doctor", f"paths.data={tmp_path}"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "cifar10_5k.npz yes" in shown and "imagenet_1k.npz no" in shown
    assert "…" not in shown and "piececonst_r421" in shown  # nothing is cut
    assert "writable" in shown and "swin_micro.safetensors" in shown and "Hiera" in shown


@pytest.mark.parametrize(
    ("pretrained", "said"),
    [
        (False, "random weights"),
        ("on_source", "when first needed"),
        ("no.safetensors", "no file at no.safetensors"),
        (True, "NOT at hand: the first use fetches timm/swin_tiny_patch4_window7_224.ms_in1k"),
    ],
)
def test_doctor_says_whether_weights_are_at_hand(
    monkeypatch: pytest.MonkeyPatch, pretrained: bool | str, said: str
) -> None:
    backbone = {"name": "swin_tiny_patch4_window7_224", "pretrained": pretrained}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    assert said in doctor.weights_at_hand(backbone)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "path")
    assert ("fetched before" in doctor.weights_at_hand(backbone)) == (pretrained is True)
    assert "timm has no model" in doctor.weights_at_hand({"name": "swim", "pretrained": True})


def test_the_chain_runs_the_stages_it_is_given(composed: Callable[..., DictConfig]) -> None:
    config = composed("stage=all", "stage.stages=[plan]", "rank=uniform", "rank.r=1", "plan.rules=[]")
    build(config.stage)(config)
    assert (Path(config.paths.runs) / "default" / "plan" / "plan.json").exists()


def test_the_next_command_is_the_user_s_own_with_another_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orca_rank.artifacts.command._given", ())
    monkeypatch.setattr("orca_rank.artifacts.command._flags", ())
    assert same_command("stage=measure run=x") == "python -m orca_rank stage=measure run=x"
    given = ["stage=all", "rank=ibp_count", "+rank.a=2", "data.train=my files.npz", "paths.runs=r", "force=true"]
    remember(given, ["--config-dir", "my conf"])
    assert shlex.split(same_command("stage=finetune", "rank=uniform")) == [
        *("python", "-m", "orca_rank", "--config-dir", "my conf"),
        *("data.train=my files.npz", "paths.runs=r", "stage=finetune", "rank=uniform"),
    ]
    assert shlex.split(same_command("stage=align force=true"))[-2:] == ["stage=align", "force=true"]


def test_what_was_raised_on_purpose_is_told_from_bugs(tmp_path: Path) -> None:
    def message(function: Callable[[], object]) -> str | None:
        with pytest.raises(Exception) as caught:
            function()
        return foreseen(caught.value)

    # Raised by this package, whatever the type: its message is the whole story.
    assert message(lambda: build({})) == "this part of the config names no _target_ to build: {}"
    assert "no weights 'x' come with" in str(message(lambda: shipped("x")))
    # Refused by the system, or by a library that was given the user's options.
    assert message(lambda: (tmp_path / "none").read_text()) == f"{tmp_path / 'none'}: No such file or directory"
    node = OmegaConf.create({"_target_": "lightning.Trainer", "devices": "two"})
    assert "could not build lightning.Trainer" in str(message(lambda: build(node)))
    assert "smaller data.batch_size" in str(message(lambda: torch.empty(2**58)))
    # Mistakes of ours and errors out of libraries stay bugs.
    assert message(lambda: shipped(None)) is None
    assert message(lambda: torch.ones(2) @ torch.ones(3)) is None
    assert message(lambda: {}["x"]) is None


def test_a_shell_completes_groups_and_options(tmp_path: Path) -> None:
    """As the completion that Hydra installs asks the console script of pyproject.toml."""
    line = "orca_rank rank=prop"
    script = tmp_path / "orca_rank"
    script.write_text("from orca_rank.__main__ import script\nscript()\n")
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "PYTHONPATH": str(README.parent)}
    answer = subprocess.run(
        [sys.executable, str(script), "-sc", "query=bash"],
        cwd=tmp_path,
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
    )
    assert answer.stdout.split() == ["rank=proportional"]
    project = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"orca_rank": "orca_rank.__main__:script"}
