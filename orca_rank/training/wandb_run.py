"""`logger=wandb`: one run of W&B for every stage and every fine-tune, with its curve, tables, charts, pictures and
files."""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image

from orca_rank.artifacts.command import command
from orca_rank.tracking.page import Chart, Files, Job, Page, Row

STEP = "trainer/global_step"  # Lightning's name for the optimiser step of a row
LOWEST = ("train/*", "val/*", "test/*", "loss")  # every metric of this package is an error: lower is better
LAST = ("lr", "lr/*", "epoch")
ID = "wandb-id"
ROWS = 1_000_000  # more than a part of a run has


class WandB(WandbLogger):
    """Lightning's logger for the curve, and `show` for everything else.

    Pages of a run folder are a group, their kind is the stage. A page's id is drawn once and kept in the stage's log
    folder: a resumed stage goes on with its page, whether its parts are sent as they come or synced later; other points
    of a sweep, other folders of the same name and a stage that is redone with force have others.

    Args:
        save_dir: the log folder of a stage. job: whose page this is. name, group: of the page, instead of the job's.
        offline: write to `save_dir`, for `wandb sync` to send, and speak to nobody. artifacts: whether files are logged
            with what they were made from. options: of Lightning's WandbLogger and `wandb.init`.
    """

    def __init__(
        self,
        save_dir: str = ".",
        job: Job | None = None,
        *,
        name: str | None = None,
        group: str | None = None,
        offline: bool = True,
        artifacts: bool = True,
        **options: Any,
    ) -> None:
        if job is not None:
            among = f"{job.run} " if group not in (None, job.run) else ""
            name, group = name or f"{among}{job.name}"[:128], group or job.run
            options = {"job_type": job.stage, "notes": command() or None, **options}
        self.artifacts, self.job = artifacts, job
        super().__init__(name, save_dir, offline=offline, group=group, **options)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of W&B, begun when it is first asked for.

        Raises:
            ValueError: if W&B cannot be reached, or nobody is logged in.
        """
        if self._experiment is None:
            self._experiment = self._begin()
        return self._experiment

    def _begin(self) -> Any:
        folder = Path(str(self._save_dir))
        folder.mkdir(parents=True, exist_ok=True)
        options = {**self._wandb_init, "dir": str(folder), "reinit": "create_new"}
        if self._id is None:
            self._id = options["id"] = kept_id(folder)
        earlier = 0
        if self._offline and os.environ.get("WANDB_MODE") != "disabled":
            options["mode"] = "offline"
            earlier = len(list(folder.glob(f"wandb/offline-run-*-{self._id}")))
        try:
            run = wandb.init(**{name: value for name, value in options.items() if value is not None})
        except wandb.errors.Error as error:
            raise ValueError(
                f"logger.offline=false: W&B cannot be used now ({error}): run `wandb login` or set WANDB_API_KEY, or "
                f"leave logger.offline=true and send the run later with `wandb sync`"
            ) from error
        if earlier:  # rows of a run that is gone on with come after those of the parts that are synced before it
            run.log({}, step=earlier * ROWS)
        run.define_metric(STEP)
        for name in (*LOWEST, *LAST):  # no "*" beside them: of several patterns that fit W&B takes any
            run.define_metric(name, step_metric=STEP, step_sync=True, summary="min" if name in LOWEST else None)
        return run

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:  # type: ignore[override]  # all that a stage gives
        """Options as flat plain values: finetune/optimizer/lr = 0.001."""
        job = {} if self.job is None else {"run": self.job.run, "stage": self.job.stage, "tag": self.job.tag}
        self.experiment.config.update({**flat(params), **job}, allow_val_change=True)

    @rank_zero_only
    def show(self, page: Page) -> None:
        """Log a page: its summary, tables, charts, pictures and files."""
        run = self.experiment
        run.config.update(dict(page.config), allow_val_change=True)
        with _data_in(str(Path(str(self._save_dir)).absolute())):
            if shown := _shown(page):
                run.log(shown)
            if self.artifacts:
                for files in page.used:
                    self._use(self._artifact(files))
                for files in page.made:
                    run.log_artifact(self._artifact(files))
        run.summary.update(dict(page.summary))

    def _artifact(self, files: Files) -> Any:
        """An artifact that names the files where they lie: nothing is copied."""
        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", files.name)[:128], files.kind)
        for name, content in files.files.items():
            path = content
            if isinstance(content, str):
                path = Path(str(self._save_dir)) / files.kind / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)
            artifact.add_file(str(Path(path).absolute()), name, policy="immutable", skip_cache=True)
        return artifact

    def _use(self, artifact: Any) -> None:
        """Say that the run was made from these files. The same name and contents are the same version for the server,
        so they need not be asked for first; offline the public method refuses, and its message is left here."""
        if self._offline:
            self.experiment._log_artifact(artifact, aliases=[], is_user_created=True, use_after_commit=True)
        else:
            self.experiment.use_artifact(artifact)

    @rank_zero_only
    def close(self, failed: bool) -> None:
        """End the run of W&B, so that the next job of the same process has its own."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(failed))
            self._experiment = None


@contextlib.contextmanager
def _data_in(folder: str) -> Iterator[None]:
    """W&B's copies of tables go beside the run that they are synced with, not into the user's home."""
    name = wandb.env.DATA_DIR
    theirs = os.environ.get(name)
    os.environ.setdefault(name, folder)
    try:
        yield
    finally:
        if theirs is None:
            del os.environ[name]


def kept_id(folder: Path) -> str:
    """The id in a stage's log folder, drawn where there is none."""
    path = folder / ID
    if not path.exists():
        path.write_text(secrets.token_hex(6))
    return path.read_text()


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their names with / between them, without what only Hydra needs; lists as text. Dots would be
    read by W&B as options inside of options."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name == "_partial_":
            continue
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        else:
            found[f"{prefix}{name}"] = value if isinstance(value, str | int | float | None) else str(value)
    return found


def table(rows: Sequence[Row]) -> Any:
    """Rows as a table of W&B; a column of several kinds keeps them."""
    columns: list[str | int] = list(dict.fromkeys(name for row in rows for name in row))
    return wandb.Table(
        columns=columns, data=[[row.get(str(name)) for name in columns] for row in rows], allow_mixed_types=True
    )


def _shown(page: Page) -> dict[str, Any]:
    """Tables, charts and pictures by name, as W&B has them."""
    tables = {name: table(rows) for name, rows in page.tables.items() if rows}
    charts = {name: _drawn(chart, page.tables[chart.table]) for name, chart in page.charts.items()
              if chart.table in tables}  # fmt: skip
    pictures = {name: wandb.Image(Image.open(io.BytesIO(data))) for name, data in page.pictures.items()}
    return {**tables, **charts, **pictures}


def _drawn(chart: Chart, rows: Sequence[Row]) -> Any:
    """A native chart of the columns that it needs."""
    columns = [name for name in (chart.x, chart.y, chart.stroke) if name is not None]
    few = table([{name: row[name] for name in columns} for row in rows])
    if chart.kind == "bar":
        return wandb.plot.bar(few, chart.x, chart.y, title=chart.title)
    if chart.kind == "scatter":
        return wandb.plot.scatter(few, chart.x, chart.y, title=chart.title)
    return wandb.plot.line(few, chart.x, chart.y, stroke=chart.stroke, title=chart.title)
