"""Sweeps: which runs there are, which of them are run, and what is seen of it. Processes are real."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from engine.config import ConfigError
from engine.config.grid import Grid, cells_of, read_grid
from engine.reporting.tracking import read_metrics
from launch.sweeping import cells as on_disk
from launch.sweeping.processes import share
from tests.launch.command import run_command
from tests.runs import train_here
from tests.worlds import run_ranks

ROOT = Path(__file__).parents[2]


def sweep_file(tiny: Path, at: Path, **keys: object) -> Path:
    raw = {
        "name": "small",
        "dir": str(at / "sweep"),
        "config": {
            "device": "cpu",
            "data": {"dataset": "fashion_mnist", "root": str(tiny), "global_batch": 24},
            "train": {"epochs": 2, "max_skipped": 1},
            "optimizer": {"lr": 0.05},
            "log": {"progress": False, "every_steps": 2},
        },
        "methods": {"independent": None, "dml": None},
        "networks": {"r8": {"network": "cifar_resnet8_b", "options": {"width": 4}}},
        **keys,
    }
    path = at / "sweep.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def grid_of(tmp_path: Path, **keys: object) -> tuple[Grid, Path]:
    path = sweep_file(tmp_path, tmp_path, **keys)
    return read_grid(path), path


def test_every_combination_is_a_run_with_the_peers_of_its_row(tmp_path: Path) -> None:
    grid, path = grid_of(
        tmp_path,
        methods={
            "alone": {"method": {"name": "independent"}},
            "pcl": {"peers": 3, "data": {"views": "per_peer"}},
            "okddip": {"peers": [{"copies": 3, "name": "peer"}, {"name": "leader"}]},
        },
        networks={
            "r8": "cifar_resnet8_b",
            "vgg": {"network": "cifar_vgg16", "options": {"dropout": 0.5}},
            "pair": ["cifar_resnet8_b", {"network": "cifar_resnet14_b"}],
        },
        overrides={"lr1": {"optimizer": {"lr": 0.1}}, "lr2": {"optimizer": {"lr": 0.2}}},
        seeds=[3, 5],
        where=[
            {"methods": ["pcl", "okddip"], "networks": ["pair"], "skip": True},
            {"methods": ["okddip"], "overrides": ["lr2"], "config": {"optimizer": {"weight_decay": 0.0}}},
        ],
    )
    cells = {cell.name: cell for cell in cells_of(grid, path, ["train.epochs=7"])}
    assert len(cells) == (3 * 3 - 2) * 2 * 2
    cell = cells["okddip-vgg-lr2-seed5"]
    config = cell.config
    assert (config.name, config.folder, config.seed) == ("small-okddip-vgg-lr2-seed5", grid.folder / cell.name, 5)
    assert [(p.network, p.copies, p.name, p.options) for p in config.peers] == [
        ("cifar_vgg16", 3, "peer", {"dropout": 0.5}),
        ("cifar_vgg16", 1, "leader", {"dropout": 0.5}),
    ]
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.train.epochs) == (0.2, 0.0, 7)
    assert cells["okddip-vgg-lr1-seed5"].config.optimizer.weight_decay == 5e-4
    assert cells["pcl-r8-lr1-seed3"].meant == ("data.views",)
    assert [p.network for p in cells["alone-pair-lr1-seed3"].config.peers] == ["cifar_resnet8_b", "cifar_resnet14_b"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"sedes": 3}, "{file}: sedes = 3: unknown key; did you mean 'seeds'?; a sweep has: about, base, config, dir,"),
        ({"seeds": 0}, "{file}: seeds = []: expected at least 1 item"),
        ({"seeds": [1, 1]}, "{file}: seeds: 1 stands twice; expected each once"),
        ({"methods": {}}, "{file}: methods = {{}}: expected at least 1 item"),
        (
            {"where": [{"methods": ["dlm"]}]},
            "{file}: where.0.methods: 'dlm': expected one of independent, dml; did you mean 'dml'?",
        ),
        ({"config": {"seed": 3}}, "{file}: config.seed: each run of a sweep has its own; expected no seed"),
        (
            {"methods": {"dml": {"optimizer": {"lrr": 1}}}, "networks": {"a": "cifar_resnet8_b", "b": "cifar_vgg16"}},
            "dml-a and 1 more: optimizer.lrr = 1: unknown key; did you mean 'lr'?",
        ),
        ({"methods": {"dlm": {}}}, "dlm-r8: method.name = 'dlm': expected one of independent, dml"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, keys: dict[str, object], said: str) -> None:
    path = sweep_file(tmp_path, tmp_path, **keys)
    with pytest.raises(ConfigError) as error:
        cells_of(read_grid(path), path)
    assert str(error.value).startswith(said.format(file=path))


def test_the_command_checks_before_it_starts(tiny: Path, tmp_path: Path) -> None:
    path = sweep_file(tiny, tmp_path, seeds=2)
    code, out, _ = run_command("sweep", str(path), "--check")
    assert out.splitlines()[0] == f"4 runs in {tmp_path / 'sweep'}, 1 process each"
    code, _, err = run_command("sweep", str(path), "data.root=/nowhere", check=False)
    assert code == 2
    assert err.startswith("error: independent-r8-seed0 and 3 more: data.root")
    code, _, err = run_command("sweep", str(path), "seed=3", check=False)
    assert (code, err) == (2, "error: seed=3: each run of a sweep has its own; expected no seed\n")
    code, _, err = run_command("sweep", str(path), "--only", "kd*", check=False)
    assert code == 2
    assert err.startswith("error: --only kd*: no run of that name; they are independent-r8-seed0, ")
    assert not (tmp_path / "sweep").exists()


def test_what_is_complete_is_not_run_again_and_what_failed_is_shown(tiny: Path, tmp_path: Path) -> None:
    # The rates of dml are such that its first update is no number.
    path = sweep_file(tiny, tmp_path, methods={"independent": None, "dml": {"optimizer": {"lr": 1e38}}})
    grid = read_grid(path)
    done, bad = cells_of(grid, path)
    run_ranks(1, train_here, done.config)
    before = read_metrics(done.config.folder)
    code, _, err = run_command("sweep", str(path), check=False)
    assert code == 1
    failed = on_disk.standing(grid.folder, bad)
    assert failed.state == "failed"
    assert "non-finite" in failed.said
    assert f"{bad.name}: failed after 0:00:" in err
    assert "\r" not in err
    assert "1 of 2 runs complete, 1 failed" in err.splitlines()[-1]
    assert read_metrics(done.config.folder) == before
    assert len((done.config.folder / "starts.json").read_text().split('"command"')) == 2
    log = on_disk.log_of(grid.folder, bad)
    size = log.stat().st_size
    code, _, err = run_command("sweep", str(path), check=False)
    assert code == 1
    assert f"{bad.name}: has failed: {failed.said}; --retry runs it again" in err.splitlines()
    assert log.stat().st_size == size
    assert f"{bad.name}          failed" in run_command("sweep", str(path), "--show")[1]
    run_command("report", str(grid.folder))
    assert "independent" in (grid.folder / "report.html").read_text()
    assert f"{done.config.folder}" in (grid.folder / "report.csv").read_text()


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_from_checkpoints(tiny: Path, tmp_path: Path) -> None:
    path = sweep_file(tiny, tmp_path, config=None, methods={"dml": None}, seeds=2)
    raw = yaml.safe_load(path.read_text())
    raw["config"] = yaml.safe_load(sweep_file(tiny, tmp_path).read_text())["config"] | {"train": {"epochs": 400}}
    path.write_text(yaml.safe_dump(raw))
    cells = cells_of(read_grid(path), path)
    command = [sys.executable, str(ROOT / "launch/sweep.py"), str(path), "--jobs", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 240
        while not all(read_metrics(cell.config.folder) for cell in cells):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=240)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted; the same command goes on"
    assert {on_disk.standing(cells[0].config.folder.parent, cell).state for cell in cells} == {"interrupted"}
    reached = [read_metrics(cell.config.folder)[-1]["step"] for cell in cells]
    epochs = max(reached) // 5 + 1
    done = subprocess.run([*command, f"train.epochs={epochs}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for cell in cells:
        steps = [line["step"] for line in read_metrics(cell.config.folder)]
        assert steps == sorted(steps)
        assert steps[-1] == 5 * epochs
        assert len((cell.config.folder / "starts.json").read_text().split('"command"')) == 3
    # A sweep that is killed has its runs save and end.
    with subprocess.Popen([*command, "train.epochs=4000"], stderr=subprocess.DEVNULL) as process:
        while min(read_metrics(cell.config.folder)[-1]["step"] for cell in cells) <= 5 * epochs:
            time.sleep(0.1)
        process.kill()
    deadline = time.monotonic() + 240
    while any(on_disk.standing(cells[0].config.folder.parent, cell).state != "interrupted" for cell in cells):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_runs_share_cores_and_gpus() -> None:
    assert share(0, 4, 1, 10, []) == {"OMP_NUM_THREADS": "2"}
    assert share(1, 2, 2, 2, []) == {"OMP_NUM_THREADS": "1"}
    assert share(1, 2, 2, 64, ["0", "1", "2", "3"]) == {"OMP_NUM_THREADS": "16", "CUDA_VISIBLE_DEVICES": "2,3"}
    assert share(2, 3, 1, 6, ["4", "7"]) == {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "4"}
    assert share(0, 1, 8, 8, ["0"]) == {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0"}


def test_the_last_line_of_an_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("error: of a start before\n")
    begin = log.stat().st_size
    with log.open("a") as file:
        file.write("Traceback (most recent call last):\n  File x\nRuntimeError: CUDA out of memory\n  hint\n\nbye\n")
    assert on_disk.last_line_of_error(log, begin) == "RuntimeError: CUDA out of memory"
    assert on_disk.last_line_of_error(log, log.stat().st_size) == "it has said nothing"
    log.write_text("a\rstep 3\n")
    assert on_disk.last_line_of_error(log, 0) == "step 3"
