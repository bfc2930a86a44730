"""stage=evidence on a tiny Swin: it runs to verdicts, goes on where it stopped, and refuses what confounds."""

from __future__ import annotations

import copy
import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig
from shared import TINY_SWIN

from orca_rank import stages
from orca_rank.artifacts.files import write_json
from orca_rank.artifacts.lock import WAIT, locked
from orca_rank.artifacts.provenance import differences, select
from orca_rank.evidence.points import Point
from orca_rank.stages import evidence
from orca_rank.stages.evidence_points import configured, task_options

TINY = (
    "stage=evidence",
    "evidence=none",
    "+data@evidence.tasks.digits.data=digits",
    "+rank@evidence.rules.shuffled=shuffled",
    "+rank@evidence.rules.trained=trained",
    "evidence.tasks.digits.data.train_limit=24",
    "evidence.tasks.digits.data.test_limit=16",
    "evidence.tasks.digits.data.batch_size=8",
    "evidence.budgets=[1]",
    "evidence.gate=[1,2]",
    "evidence.seeds=2",
    "evidence.gate_seeds=2",
    "evidence.rates=[1e-3,1e-2]",
    "evidence.steps=0",
    "evidence.permuted=[shuffled]",
    "evidence.permutations=2",
    "source=digits",
    *TINY_SWIN,
    "predictor=linear",
    "adapter.module.scaling=constant",
    "adapter.module.alpha=4",
    "gap.samples=16",
    "gap.bootstrap=0",
    "gap.permutations=0",
    "finetune.epochs=1",
    "finetune.warmup_epochs=0",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
)


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "evidence.csv", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fine-tunes that take no time: errors fall with the rank, by more than seeds differ, and a shuffled plan is 5 %
    worse than a uniform one. The list grows by the name of each that runs."""
    ran: list[str] = []

    def finetune(config: DictConfig) -> None:
        name = str(config.finetune.tag)
        _, rule, rank, seed = name.removeprefix("nested-").split("-")[:4]
        r, s = int(rank[1:]), int(seed[1:]) % 1000
        error = (
            (0.10 - 0.01 * r) * (1.05 if rule == "shuffled" else 1.0) * (1 + 0.001 * s + 0.0003 * (s * len(rule) % 3))
        )
        if "update" in config.rank:
            assert Path(config.rank["update"]).exists()
        if "losses" in config.rank:
            assert Path(config.rank["losses"]).exists()
        folder = Path(config.paths.runs) / config.run / "finetune" / name
        payload = {"metric": "error", "val/error": error, "test/error": error, "seconds": 1.0}
        write_json(folder / "metrics.json", {**payload, "trainable_parameters": {"total": 100 * r}}, config={})
        if config.finetune.keep_update:
            (folder / "update.safetensors").touch()
        ran.append(name)

    def measured(config: DictConfig) -> None:
        assert Path(config.measure.fitted).name.startswith("gate-frozen-r0-s0")
        record = {"name": "blocks.0", "d_in": 8, "d_out": 8, "gap": {"mmd": {"value": 0.5, "low": 0.4, "high": 0.6}}}
        write_json(
            Path(config.paths.runs) / config.run / "measure" / "layers.json",
            {"layers": [record]},
            config=select(config, "measure"),
        )

    def held_out(config: DictConfig) -> None:
        folder = Path(config.paths.runs) / config.run / "finetune" / config.finetune.tag
        assert (folder / "metrics.json").exists()
        (folder / "rank_losses.safetensors").touch()

    monkeypatch.setattr("orca_rank.stages.finetune.run", finetune)
    monkeypatch.setattr("orca_rank.stages.measure.run", measured)
    monkeypatch.setattr("orca_rank.stages.rank_losses.run", held_out)
    return ran


def test_the_stage_asks_for_every_point_once_and_says_what_they_support(
    composed: Callable[..., DictConfig], made_up: list[str]
) -> None:
    first = composed(*TINY, "evidence.most_points=5", "evidence.seeds=3")
    folder = Path(first.paths.runs) / first.run / "evidence"
    evidence.run(first)
    assert len(rows(folder)) == len(made_up) == 5
    config = composed(*TINY, "evidence.seeds=3")
    evidence.run(config)
    # rates of the frozen body, two ranks and full; a curve of 4 × 2; uniform, two permutations and trained × 3 seeds
    assert len(rows(folder)) == len(made_up) == len(set(made_up)) == 4 * 2 + 4 * 2 + 4 * 3
    evidence.run(config)
    assert len(made_up) == 28
    for name in ("finetune", "measure"):  # rows without their fine-tunes: what the rules read is made again
        shutil.rmtree(folder / "digits" / name)
    lost = next((folder / "digits" / "rows").glob("rules-trained-*-s1-*"))
    lost.unlink()
    before = {name: (folder / name).read_bytes() for name in ("evidence.csv", "claims.json", "README.md")}
    evidence.run(config)
    for name, content in before.items():  # whatever was there when, the same is said in the same order
        assert (folder / name).read_bytes() == content
    assert len(made_up) == 28 + 3 and made_up[-1] == lost.stem
    claims = {claim["claim"]: claim for claim in json.loads((folder / "claims.json").read_text())["claims"]}
    (worse,) = (claim for name, claim in claims.items() if name.startswith("shuffled beats uniform"))
    assert worse["verdict"] == "refuted" and worse["low"] < 5 < worse["high"]
    assert "shuffled beats uniform" in (folder / "README.md").read_text() and (folder / "rank_curve.png").exists()
    with pytest.raises(ValueError, match=r"other options.*epochs"):
        evidence.run(composed(*TINY, "evidence.seeds=3", "finetune.epochs=2"))


NESTED = ("+rank@evidence.rules.held_out=posterior", "+adapter@evidence.nested=matryoshka")


def test_one_nested_fine_tune_lends_its_held_out_losses(
    composed: Callable[..., DictConfig], made_up: list[str]
) -> None:
    config = composed(*TINY, *NESTED)
    evidence.run(config)
    assert sum(name.startswith("nested-") for name in made_up) == 1
    found = rows(Path(config.paths.runs) / config.run / "evidence")
    assert len(found) == len(made_up) - 1  # it is no row itself
    assert sum(row["rule"] == "held_out" for row in found) == 2
    with pytest.raises(ValueError, match=r"other options.*nested\.module\.r_min"):
        evidence.run(composed(*TINY, *NESTED, "evidence.nested.module.r_min=2"))


@pytest.mark.parametrize(
    ("nested", "said"),
    [
        ((), r"rule held_out: .*\+adapter@evidence\.nested=matryoshka"),
        (("+adapter@evidence.nested=lora",), "name=lora"),
    ],
)
def test_held_out_losses_are_those_of_a_nested_adapter(
    composed: Callable[..., DictConfig], made_up: list[str], nested: tuple[str, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        evidence.run(composed(*TINY, NESTED[0], *nested))
    assert not made_up


def test_processes_share_the_points(
    composed: Callable[..., DictConfig], made_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A point that another process is at is left to it, and waited for once nothing else can run; also where a
    launcher's points wait for what they share."""
    monkeypatch.setenv(WAIT, "1")
    config = composed(*TINY, "~evidence.rules.shuffled", "~evidence.rules.trained", "evidence.permuted=[]")
    folder = Path(config.paths.runs) / config.run / "evidence"
    name = "rates-frozen-r0-s1000-p0-lr0.001-0.001"
    other = locked(folder / ".working" / "digits" / name)
    other.__enter__()
    waited: list[float] = []

    def pause(seconds: float) -> None:
        waited.append(seconds)
        assert made_up == ["rates-frozen-r0-s1000-p0-lr0.01-0.01"]
        other.__exit__(None, None, None)  # without its result: it died

    monkeypatch.setattr("orca_rank.stages.evidence.time.sleep", pause)
    evidence.run(config)
    assert waited == [evidence.PAUSE]
    assert made_up[1] == name and len(rows(folder)) == len(made_up) == len(set(made_up))
    assert not (folder / ".working").exists()


def test_a_fine_tune_that_diverges_is_a_row(
    composed: Callable[..., DictConfig], made_up: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not run again, leaves no folder, and the rest goes on; what reads the first of the largest rank reads the
    next."""
    real, lost = stages.finetune.run, {"rates-full-r0-s1000-p0-lr0.001-0.01", "rules-shuffled-r1-s1-p1-lr0.01-0.01"}

    def diverging(config: DictConfig) -> None:
        name = str(config.finetune.tag)
        if name in lost or name.startswith("gate-uniform-r2-s0"):
            (Path(config.paths.runs) / config.run / "finetune" / name).mkdir(parents=True)
            raise FloatingPointError("the training loss became nan")
        real(config)

    monkeypatch.setattr("orca_rank.stages.finetune.run", diverging)
    config = composed(*TINY, "evidence.seeds=3", "evidence.gate_seeds=3")
    folder = Path(config.paths.runs) / config.run / "evidence"
    evidence.run(config)
    found = [row for row in rows(folder) if row["test"] == "inf"]
    assert {row["part"] for row in found} == {"rates", "gate", "rules"} and len(found) == 3
    assert not {path.name for path in (folder / "digits" / "finetune").iterdir()} & lost
    ran = len(made_up)
    evidence.run(config)
    assert len(made_up) == ran and len(rows(folder)) == len({*made_up}) + 3
    said = (folder / "README.md").read_text()
    assert "1 of 3 runs of r = 2 diverged" in said and "diverged: 1 of 6 runs of shuffled" in said


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("+evidence.r_min.trained=1",), r"rules-trained.*other options.*rule_r_min: 0 -> 1"),
        (("evidence.gate=[1,2,3]",), r"rules-trained.*other options.*rule_learned_at: 2 -> 3"),
        (("+evidence.r_min.traned=1",), r"evidence\.r_min names traned"),
    ],
)
def test_rows_of_a_rule_depend_on_what_it_reads_and_may_give(
    composed: Callable[..., DictConfig], made_up: list[str], changed: tuple[str, ...], said: str
) -> None:
    evidence.run(composed(*TINY))
    with pytest.raises(ValueError, match=said):
        evidence.run(composed(*TINY, *changed))


def test_what_rules_read_is_that_of_the_best_rates(composed: Callable[..., DictConfig], made_up: list[str]) -> None:
    """A grid that grows may change the rates: the gaps and the learned update are those of the new ones."""
    config = composed(*TINY, *NESTED)
    evidence.run(config)
    folder = Path(config.paths.runs) / config.run / "evidence" / "digits"
    before = json.loads((folder / "measure" / "layers.json").read_text())["config"]["measure"]["fitted"]
    del made_up[:]
    for path in (folder / "rows").glob("rates-*-lr0.01-*"):  # the best so far: now it is not
        row = json.loads(path.read_text())
        row["row"]["val"] = 1.0
        path.write_text(json.dumps(row))
    evidence.run(config)
    after = json.loads((folder / "measure" / "layers.json").read_text())["config"]["measure"]["fitted"]
    assert before != after and after.endswith("lr0.001-0.001")
    assert sum(name.startswith("nested-gate-uniform-r2-s0-p0-lr0.01-0.001") for name in made_up) == 1


@pytest.mark.parametrize(
    "content", ['{"schema": 1, "config": {}}', '{"schema": 1, "row": 3}', '{"schema": 1, "row": {}}']
)
def test_a_damaged_row_is_named_with_what_mends_it(
    composed: Callable[..., DictConfig], made_up: list[str], content: str
) -> None:
    config = composed(*TINY, "evidence.most_points=1")
    evidence.run(config)
    (row,) = (Path(config.paths.runs) / config.run / "evidence" / "digits" / "rows").glob("*.json")
    row.write_text(content)
    with pytest.raises(ValueError, match=rf"cannot read .*{row.name} .*remove it"):
        evidence.run(config)


@pytest.mark.slow
def test_it_goes_on_where_it_stopped_and_ends_with_verdicts(
    composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether rank matters on two dozen digits is chance: here it always does, so that rules are compared.
    monkeypatch.setattr("orca_rank.evidence.protocol.Gate.matters", property(lambda gate: True))
    options = (*TINY, *NESTED, "evidence.rules.held_out.tempering=1")
    first = composed(*options, "evidence.most_points=5")
    folder = Path(first.paths.runs) / first.run / "evidence"
    evidence.run(first)
    assert len(rows(folder)) == 5
    config = composed(*options)
    evidence.run(config)
    found = rows(folder)
    # rates of the frozen body, two ranks and full; a curve of 4 × 2; uniform, two permutations, trained and held_out
    assert len(found) == 4 * 2 + 4 * 2 + 5 * 2
    assert {"task", "rule", "budget", "seed", "val", "test"} <= set(found[0])
    for name in ("finetune", "measure"):  # rows without their fine-tunes go on too
        shutil.rmtree(folder / "digits" / name)
    again = next((folder / "digits" / "rows").glob("rules-trained-*-s1-*"))
    row = json.loads(again.read_text())["row"]
    again.unlink()
    evidence.run(config)
    assert json.loads(again.read_text())["row"] | {"seconds": 0} == row | {"seconds": 0}
    kept = [path.stat().st_mtime_ns for path in sorted(folder.rglob("metrics.json"))]
    evidence.run(config)
    assert [path.stat().st_mtime_ns for path in sorted(folder.rglob("metrics.json"))] == kept
    claims = json.loads((folder / "claims.json").read_text())
    assert (folder / "rank_curve.png").exists() and "trained beats uniform" in (folder / "README.md").read_text()
    assert any(claim["claim"].startswith("trained beats uniform") for claim in claims["claims"])
    assert "rank.r=" in claims["recommended"][0]
    parameters = {row["rule"]: int(row["parameters"]) for row in found if row["part"] == "rules"}
    assert parameters["uniform"] >= max(parameters["shuffled"], parameters["trained"])
    with pytest.raises(ValueError, match=r"other options.*epochs"):
        evidence.run(composed(*options, "finetune.epochs=2"))


def test_a_scale_that_follows_the_rank_is_refused(composed: Callable[..., DictConfig]) -> None:
    with pytest.raises(ValueError, match="scaling=constant"):
        evidence.run(composed(*TINY, "adapter.module.scaling=lora"))
    with pytest.raises(ValueError, match=r"received adapter=full .*set adapter=lora"):
        evidence.run(composed(*[option for option in TINY if "adapter.module" not in option], "adapter=full"))


def test_a_scale_of_the_root_is_a_check_and_says_so(composed: Callable[..., DictConfig], made_up: list[str]) -> None:
    config = composed(*TINY, "adapter.module.scaling=rslora")
    evidence.run(config)
    folder = Path(config.paths.runs) / config.run / "evidence"
    assert "a check of the verdicts at one scale" in (folder / "README.md").read_text()
    assert json.loads((folder / "claims.json").read_text())["recommended"][0].startswith("Scale α/√r")
    with pytest.raises(ValueError, match=r"other options.*scaling"):
        evidence.run(composed(*TINY))


@pytest.mark.slow
def test_arms_take_their_adapter_or_alignment_over(composed: Callable[..., DictConfig]) -> None:
    arms = (
        "+adapter@evidence.arms.lora.adapter=lora",
        "+adapter@evidence.arms.moslora.adapter=moslora",
        "+align@evidence.arms.aligned.align=mmd",
        "+evidence.arms.aligned.embedder.aligned=true",
        "evidence.arms.aligned.align.epochs=1",
        "evidence.arms.aligned.align.held_out.samples=8",
        "evidence.arms.aligned.align.held_out.resamples=0",
        "evidence.tasks.digits.data.train_limit=48",
        "evidence.baseline=lora",
        "evidence.arms_rank=2",
        "~evidence.rules.shuffled",
        "~evidence.rules.trained",
        "evidence.permuted=[]",
        "evidence.rates=[3e-3,1e-2]",
    )
    config = composed(*TINY, *arms, "evidence.budgets=[]", "evidence.gate=[]")
    evidence.run(config)
    folder = Path(config.paths.runs) / config.run / "evidence"
    found = rows(folder)
    assert len(found) == 2 + 3 * 2 + 3 * 2
    parameters = {row["rule"]: int(row["parameters"]) for row in found if row["part"] == "arms"}
    assert parameters["moslora"] > parameters["lora"] == parameters["aligned"]  # the mixers
    claims = json.loads((folder / "claims.json").read_text())["claims"]
    assert [claim["claim"].split(" at ")[0] for claim in claims] == [
        *("any other arm beats lora", "moslora beats lora", "aligned beats lora"),
    ]
    assert (folder / "digits-aligned-s1" / "align" / "embedder.safetensors").exists()
    with pytest.raises(ValueError, match=r"evidence\.baseline=pissa: must be the arm.*lora, moslora, aligned"):
        evidence.run(composed(*TINY, *arms, "evidence.baseline=pissa"))


@pytest.mark.parametrize("adapter", ["dora", "adalora", "loha", "lokr", "matryoshka"])
def test_arms_have_the_run_s_scale(composed: Callable[..., DictConfig], adapter: str) -> None:
    """So that adapters are compared at one scale; rows from before an adapter had the option are of another."""
    arm = f"+adapter@evidence.arms.{adapter}.adapter={adapter}"
    config = composed(*TINY, arm, "adapter.module.alpha=3", "adapter.module.scaling=rslora")
    module = configured(config, Path("evidence"), Point("arms", "digits", adapter, 2, 0, 0, 1.0, 1.0), 1).adapter.module
    assert (module.alpha, module.scaling) == (3, "rslora")
    now = task_options(composed(*TINY, arm), "digits", adapter)
    before = copy.deepcopy(now)
    for name in ("alpha", "scaling"):
        del before["rule"]["adapter"]["module"][name]
    assert len(differences(before, now)) == 2


COMMITTED = Path(__file__).parents[1] / "evidence"
RUNS = [pytest.param(path.name, marks=() if path.name == "evidence_small" else pytest.mark.slow)
        for path in sorted(COMMITTED.glob("evidence_*"))]  # fmt: skip


@pytest.mark.parametrize("run", RUNS)
def test_the_committed_evidence_is_gone_on_with(composed: Callable[..., DictConfig], tmp_path: Path, run: str) -> None:
    """Its rows are of the options of today's experiment: an option that is new says what stands for its absence
    (`provenance.SINCE`)."""
    shutil.copytree(COMMITTED / run, tmp_path / "runs" / run)
    name = run.removeprefix("evidence_")
    evidence.run(composed("experiment=evidence_small", f"evidence={name}", f"run={run}", "evidence.most_points=0"))
    for written in ("evidence.csv", "claims.json"):
        place = Path(run) / "evidence" / written
        assert (tmp_path / "runs" / place).read_bytes() == (COMMITTED / place).read_bytes()


def test_what_the_rules_will_need_is_tried_before_any_fine_tune(
    composed: Callable[..., DictConfig], made_up: list[str]
) -> None:
    tiny = [option for option in TINY if option != "source=digits"]
    with pytest.raises(ValueError, match=r"evidence\.tasks\.digits, rule shuffled: the source tokens in swin_micro.*"):
        evidence.run(composed(*tiny, "source=embedded"))
    with pytest.raises(ValueError, match=r"evidence\.tasks\.digits, rule inverse: .*sliced"):
        evidence.run(
            composed(
                *TINY,
                "+rank@evidence.rules.inverse=inverse",
                "evidence.rules.inverse.metric=sliced",
                "~gap.metrics.sliced",
            )
        )
    assert not made_up


def test_an_arm_that_cannot_be_is_told_before_any_fine_tune(
    composed: Callable[..., DictConfig], made_up: list[str]
) -> None:
    arms = (
        "+adapter@evidence.arms.lora.adapter=lora",
        "+adapter@evidence.arms.dora.adapter=dora",
        "evidence.baseline=lora",
        "evidence.arms_rank=1",
        "evidence.most_points=1",
    )
    with pytest.raises(ValueError, match=r"evidence\.tasks\.digits, arm dora: layers\.0.*adapt q, k and v fused"):
        evidence.run(composed(*TINY, *arms))
    assert not made_up
    evidence.run(composed(*TINY, *arms, "+evidence.arms.dora.layers.qkv=fused"))
    assert len(made_up) == 1
