"""One fine-tune of the evidence, and what came out of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

FROZEN, FULL, UNIFORM = "frozen", "full", "uniform"


@dataclass(frozen=True)
class Point:
    """One fine-tune.

    Args:
        part: "rates", "gate", "rules", "own_rates" (a rule at rates of its own) or "arms" (another adapter or
            alignment, at a rate of its own). task, rule: names in the options, rule that of an arm too.
        rank: the budget, as the uniform rank of the same cost; 0 for a frozen body and for full fine-tuning.
        seed: of predictor, data order and adapter. permutation: of a shuffled plan, else 0.
        lr: of the adapter or, in full fine-tuning, of the body; predictor_lr: of embedder and predictor.
    """

    part: str
    task: str
    rule: str
    rank: int
    seed: int
    permutation: int
    lr: float
    predictor_lr: float

    @property
    def name(self) -> str:
        """A folder name that no other point has."""
        return (
            f"{self.part}-{self.rule}-r{self.rank}-s{self.seed}-p{self.permutation}-"
            f"lr{self.lr:.6g}-{self.predictor_lr:.6g}"
        )


@dataclass(frozen=True)
class Row(Point):
    """A point and what came out; val and test are the task's metric, lower is better, inf where the run diverged.

    Args:
        parameters: trained ones, 0 where the run diverged.
        cross_entropy: of the test samples where the task has classes, else NaN: an error counts images, of which few
            change sides, and says less.
    """

    val: float
    test: float
    parameters: int
    seconds: float
    cross_entropy: float = math.nan

    @property
    def point(self) -> Point:
        return Point(**{item.name: getattr(self, item.name) for item in fields(Point)})

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.test)

    def to_dict(self) -> dict[str, str | int | float]:
        """A line of evidence.csv; `budget` is the rank under the name that its readers know, and what has no
        cross-entropy has no column of it."""
        line = {**asdict(self), "budget": f"r={self.rank}"}
        return {name: value for name, value in line.items() if name != "cross_entropy" or not math.isnan(value)}

    @classmethod
    def from_dict(cls, record: Mapping[str, str]) -> Row:
        """A line of evidence.csv as csv.DictReader gives it, which has a cross-entropy or not.

        Raises:
            ValueError: if a column is missing or no number.
        """
        kinds = {"str": str, "int": int, "float": float}
        try:
            given = (item for item in fields(cls) if item.name != "cross_entropy" or record.get(item.name))
            return cls(**{item.name: kinds[str(item.type)](record[item.name]) for item in given})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a row of evidence.csv ({error}): {dict(record)}") from error


def finite(rows: Sequence[Row], part: str, task: str, rule: str, rank: int) -> list[Row]:
    """The rows of one part, task, rule and rank, without those of runs that diverged."""
    mine = [row for row in rows if (row.part, row.task, row.rule, row.rank) == (part, task, rule, rank)]
    return [row for row in mine if not row.diverged]
