"""Fine-tunes as rows: what differs between them, means over seeds, and paired differences to uniform ranks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

from orca_rank.evidence.compare import Estimate, paired
from orca_rank.report.results import PARTS, Tune

Row = dict[str, Any]
# Said by a column that every table has, or no option of the result.
_SAID = re.compile(
    r"seed|adapter\.(name|method)|(rank|data|adapter\.module)\._target_|rank\.r|backbone\.name|finetune\.tag|"
    r"budget\.(mean_rank|total_rank|parameters)|trainer\..*|(.*\.)?(_partial_|root|cache|workers|num_workers)"
)
# Shown wherever they differ; any other option of adapter, data or backbone only where it differs within one of them.
_ALWAYS = re.compile(r"(.*[._])?(lr|lr_ratio|alpha|scale|scaling)")
_NAMED = ("adapter.name", "data._target_", "backbone.name")
_FIRST = ("finetune", "adapter", "rank", "budget", "layers")
_NEAR = 0.05  # adapter parameters that count as equal


@dataclass(frozen=True)
class Group:
    """Fine-tunes that differ in nothing but the seed.

    Args:
        tunes: one a seed. values: their options among those that differ between groups.
        difference: mean difference of the test metric, paired by seed, to the group with uniform ranks and as many
            parameters, in per cent of its mean; None without a seed that both have.
    """

    tunes: tuple[Tune, ...]
    values: Mapping[str, Any]
    difference: Estimate | None = None

    @property
    def first(self) -> Tune:
        return self.tunes[0]

    @property
    def test(self) -> Estimate:
        """The mean of the test metric over seeds."""
        return paired([tune.test for tune in self.tunes])

    @property
    def parameters(self) -> float:
        """Trained parameters of the adapters, their mean over seeds."""
        return sum(tune.counts.parts["adapter"] for tune in self.tunes) / len(self.tunes)


def differing(tunes: Sequence[Tune]) -> list[str]:
    """The options, by dotted name, that differ between fine-tunes which have them and that no other column says.

    Left out: a copy of seed or epochs (such as `data.seed`), and what follows from the adapter, data or backbone alone.
    """
    said = {
        "adapter": [str(tune.option("adapter.name")) for tune in tunes],
        "data": [str(tune.option("data._target_")) for tune in tunes],
        "backbone": [str(tune.option("backbone.name")) for tune in tunes],
    }
    epochs = [str(tune.epochs) for tune in tunes]
    shown = []
    for name, column in _columns(tuple(tunes)).items():
        known = [place for place, text in enumerate(column) if text]
        values = {column[place] for place in known}
        if len(values) < 2 or all(column[place] == epochs[place] for place in known):
            continue
        whole = said.get(name.partition(".")[0])
        if whole is not None and not _ALWAYS.fullmatch(name):
            pairs = {(whole[place], column[place]) for place in known}
            if len(pairs) == len({value for value, _ in pairs}):
                continue
        shown.append(name)
    return sorted(shown, key=lambda name: _place(name.partition(".")[0]))


@lru_cache(maxsize=4)
def _columns(tunes: tuple[Tune, ...]) -> dict[str, list[str]]:
    """Every option that is not the same for all, as text ("" where there is none), but copies of the seed."""
    seeds = [str(tune.option("seed")) for tune in tunes]
    found = {}
    for name in dict.fromkeys(chain.from_iterable(tune.options for tune in tunes)):
        values = [tune.options.get(name, "") for tune in tunes]
        if values.count(values[0]) == len(values) or _SAID.fullmatch(name):  # of thousands, most are the same
            continue
        column = [str(value) for value in values]
        if len(set(column)) > 1 and any(text not in ("", seed) for text, seed in zip(column, seeds, strict=True)):
            found[name] = column
    return found


def summary(tunes: Sequence[Tune]) -> list[Row]:
    """The rows of summary.csv, one a fine-tune: what every run has, then the options that differ.

    `run` comes first where the fine-tunes are of several run folders.
    """
    extra = differing(tunes)
    several = len({tune.run for tune in tunes}) > 1
    rows = []
    for tune in tunes:
        ranks = list(tune.plan.ranks.values()) if tune.plan is not None else []
        rows.append(
            {
                **({"run": tune.run} if several else {}),
                "tag": tune.tag,
                "adapter": tune.option("adapter.name"),
                "rule": tune.rule,
                "budget": tune.budget,
                "mean_rank": round(sum(ranks) / len(ranks), 4) if ranks else "",
                "scale": tune.scale,
                "seed": tune.option("seed"),
                "trainable_total": tune.counts.trained,
                **{f"trainable_{part}": tune.counts.parts[part] for part in PARTS},
                "total_parameters": tune.counts.model,
                "metric": tune.metric,
                "val": tune.val,
                "test": tune.test,
                "seconds": tune.seconds,
                "epochs": tune.epochs,
                "data": tune.option("data._target_"),
                "backbone": tune.option("backbone.name"),
                **{name: tune.option(name) for name in extra},
            }
        )
    return rows


def means(tunes: Sequence[Tune]) -> list[Row]:
    """The rows of means.csv, one a group of fine-tunes; none where no two differ in their seed alone."""
    found = [group for metric in dict.fromkeys(tune.metric for tune in tunes) for group in
             groups([tune for tune in tunes if tune.metric == metric])]  # fmt: skip
    if len(found) == len(tunes) and all(group.difference is None for group in found):
        return []
    rows = []
    for group in found:
        low, high = group.test.interval()
        row = {
            "adapter": group.first.option("adapter.name"),
            "rule": group.first.rule,
            "budget": group.first.budget,
            "metric": group.first.metric,
            "seeds": len(group.tunes),
            "adapter_parameters": group.parameters,
            "test_mean": group.test.mean,
            "test_low": low,
            "test_high": high,
        }
        if group.difference is not None:
            low, high = group.difference.interval()
            row |= {"to_uniform_percent": group.difference.mean, "to_uniform_low": low, "to_uniform_high": high}
            row["pairs"] = group.difference.runs
        rows.append(row | dict(group.values))
    return rows


def groups(tunes: Sequence[Tune]) -> list[Group]:
    """Fine-tunes of one metric that differ in nothing but the seed together, the best mean test metric first."""
    return list(_groups(tuple(tunes)))


@lru_cache(maxsize=4)  # a report asks three times for the groups of the same thousands
def _groups(tunes: tuple[Tune, ...]) -> list[Group]:
    extra, columns = differing(tunes), _columns(tunes)
    found: dict[tuple[str, ...], list[Tune]] = {}
    for place, tune in sorted(enumerate(tunes), key=lambda pair: str(pair[1].option("seed"))):
        named = (tune.rule, tune.budget, *(str(tune.option(name)) for name in _NAMED))
        found.setdefault((*named, *(column[place] for column in columns.values())), []).append(tune)
    made = []
    for some in found.values():
        values = {name: some[0].option(name) for name in extra}
        made += [Group(tuple(one), values | more) for more, one in _with_seeds_apart(some)]
    uniform: dict[tuple[Any, ...], list[Group]] = {}
    for group in made:
        if group.first.rule == "uniform":
            uniform.setdefault(apart_from_ranks(group), []).append(group)
    made = [
        Group(group.tunes, group.values, _to_uniform(group, uniform.get(apart_from_ranks(group), []))) for group in made
    ]
    return sorted(made, key=lambda group: group.test.mean)


def _with_seeds_apart(tunes: Sequence[Tune]) -> list[tuple[Row, list[Tune]]]:
    """Fine-tunes of one seed, by run folder or else by tag: a repetition is no other seed."""
    if _seeds_differ(tunes):
        return [({}, list(tunes))]
    by_run: dict[str, list[Tune]] = {}
    for tune in tunes:
        by_run.setdefault(tune.run, []).append(tune)
    if len(by_run) > 1 and all(map(_seeds_differ, by_run.values())):
        return [({"run": run}, some) for run, some in by_run.items()]
    return [({"tag": tune.tag}, [tune]) for tune in tunes]


def _seeds_differ(tunes: Sequence[Tune]) -> bool:
    return len({tune.option("seed") for tune in tunes}) == len(tunes)


def _to_uniform(group: Group, groups: Sequence[Group]) -> Estimate | None:
    """The paired difference to the group with uniform ranks, the same other options and as many parameters.

    Args:
        groups: those with uniform ranks and the same other options.
    """
    if group.first.rule in ("", "uniform"):
        return None
    others = [other for other in groups if "run" not in group.values or other.values.get("run") == group.values["run"]]
    if not others:
        return None
    other = min(others, key=lambda other: abs(other.parameters - group.parameters))
    tests = [{tune.option("seed"): tune.test for tune in one.tunes} for one in (group, other)]
    seeds = [seed for seed in tests[0] if seed in tests[1]]
    if not seeds or abs(other.parameters - group.parameters) > _NEAR * other.parameters:
        return None
    total = sum(tests[1][seed] for seed in seeds)
    if not total > 0:  # no error to be relative to
        return None
    scale = 100 * len(seeds) / total
    return paired([scale * (tests[0][seed] - tests[1][seed]) for seed in seeds])


def apart_from_ranks(group: Group) -> tuple[Any, ...]:
    """What groups whose ranks may be compared have in common; thousands of them are matched by it."""
    varied = {name: value for name, value in group.values.items() if name not in ("tag", "run")}
    options = [varied[name] for name in sorted(varied) if not name.startswith(("rank.", "budget."))]
    return (*(group.first.option(name) for name in _NAMED), *options)


def _place(group: str) -> int:
    return _FIRST.index(group) if group in _FIRST else len(_FIRST)
