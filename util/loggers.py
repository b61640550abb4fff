"""The services of --logger: each is started by a function that also continues a run, by its id."""

import csv
import importlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from models.errors import UserError

PROJECT = "dn_dino"


@dataclass
class Service:
    """A run at a service. `log` takes an epoch's {name: value} and its number; `run_id`: what the
    service needs to continue it."""

    name: str
    run_id: str
    log: Callable[[dict[str, float], int], Any]
    close: Callable[[], Any]


def start_wandb(config: dict[str, Any], run_id: str | None) -> Service:
    """In its files, which offline are all there is, the run is below the output directory."""
    import wandb

    place = {"dir": config["output_dir"], "name": Path(config["output_dir"]).name}
    place["project"] = os.environ.get("WANDB_PROJECT", PROJECT)
    known = {"id": run_id or uuid.uuid4().hex[:8], "resume": "allow", "allow_val_change": True}
    run = wandb.init(config=config, **place, **known)
    return Service("wandb", run.id, lambda values, epoch: run.log(values, step=epoch), run.finish)


def start_mlflow(config: dict[str, Any], run_id: str | None) -> Service:
    import mlflow

    name = None if run_id else Path(config["output_dir"]).name
    run = mlflow.start_run(run_id=run_id, run_name=name)
    if not run_id:  # parameters cannot change
        mlflow.log_params(config)
    log = lambda values, epoch: mlflow.log_metrics(values, step=epoch)
    return Service("mlflow", run.info.run_id, log, mlflow.end_run)


def start_trackio(config: dict[str, Any], run_id: str | None) -> Service:
    """A run is continued by its name."""
    import trackio

    name = run_id or f"{Path(config['output_dir']).name}-{uuid.uuid4().hex[:8]}"
    run = trackio.init(PROJECT, name, config=config, resume="allow", embed=False)
    return Service("trackio", name, lambda values, epoch: run.log(values, step=epoch), run.finish)


def start_csv(config: dict[str, Any], run_id: str | None) -> Service:
    """log.csv, written anew in every epoch, as later ones may have more columns."""
    path = Path(config["output_dir"]) / "log.csv"

    def log(values: dict[str, float], epoch: int) -> None:
        rows: list[dict] = []
        if path.exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < epoch]
        rows.append(values)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(chain(*rows))))
            writer.writeheader()
            writer.writerows(rows)

    return Service("csv", path.name, log, lambda: None)


SERVICES = {
    "wandb": start_wandb,
    "mlflow": start_mlflow,
    "trackio": start_trackio,
    "csv": start_csv,
}


def check_installed(names: Sequence[str]) -> None:
    """UserError if a service's package is missing."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(f"logger: {name} is not installed; pip install {name}") from None


def open_services(names: Sequence[str], config: dict[str, Any]) -> list[Service]:
    """Start the services' runs, or continue those whose ids are in the output directory, where new
    ones are kept. UserError if a service fails."""
    path, services = Path(config["output_dir"]) / "loggers.json", []
    ids = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        try:
            services.append(SERVICES[name](config, ids.get(name)))
        except Exception as e:
            reason = (str(e).strip() or repr(e)).splitlines()[0]
            raise UserError(f"logger: {name} does not start: {reason}") from e
        ids[name] = services[-1].run_id
        path.write_text(json.dumps(ids))
    return services
