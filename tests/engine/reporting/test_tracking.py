"""What a run leaves for its user to look at: metrics, wandb, config, table, picture."""

from __future__ import annotations

import json
import math
import os
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image

from engine.config import RunConfig
from engine.config.loading import dump, load
from engine.reporting.tracking import Tracker, read_metrics, record_start
from engine.safety.answers import TrainingDivergedError
from tests.runs import small_run, train_here
from tests.worlds import run_ranks

ROOT = Path(__file__).parents[3]
KEY = "local-" + "0123456789abcdef" * 2 + "01234567"


def train_by_command(config: RunConfig, at: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python launch/train.py` on a file, with an API key of wandb in its environment."""
    path = at / f"{config.name}.yaml"
    path.write_text(dump(config))
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_API_KEY": KEY, **environment}
    command = [sys.executable, "launch/train.py", str(path)]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def started_twice(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, both outcomes, wandb's id after each) of an offline run of 1 epoch that then goes on to 2."""
    at = tmp_path_factory.mktemp("offline")
    done, ids = [], []
    for epochs in (1, 2):
        config = small_run(
            tiny,
            at / "run",
            train={"epochs": epochs},
            schedule={"name": "constant"},
            log={"wandb": "offline", "every_steps": 1},
        )
        done.append(train_by_command(config, at))
        assert done[-1].returncode == 0, done[-1].stderr
        ids.append((at / "run" / "wandb_id").read_text())
    return at / "run", done, ids


def wandb_records(path: Path) -> Iterator[Any]:
    """What a `.wandb` file holds: a 7-byte header, then LevelDB's log of protobuf records."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<xxxxHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """The rows of a `.wandb` file."""
    return [
        {"".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(path)
        if record.WhichOneof("record_type") == "history"
    ]


def test_two_starts_are_one_run_of_wandb(started_twice: Any) -> None:
    folder, _, (first, second) = started_twice
    assert first == second
    assert len(first) == 12
    assert len(list((folder / "wandb").glob(f"offline-run-*-{first}"))) == 2


def test_wandb_offline_holds_what_metrics_hold(started_twice: Any) -> None:
    folder, _, (run_id, _) = started_twice
    files = sorted((folder / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    rows = [row for file in files for row in wandb_history(file)]
    expected = read_metrics(folder)
    assert len(expected) == 12
    assert [{key: value for key, value in row.items() if key[0] != "_"} for row in rows] == expected


def test_a_line_tells_where_the_time_of_a_step_went(started_twice: Any) -> None:
    parts = ("data", "forward", "exchange", "backward", "optimizer")
    lines = [line for line in read_metrics(started_twice[0]) if "lr" in line]
    for line in lines:
        spent = [line[f"speed/{part}_ms"] for part in parts]
        assert all(value >= 0 for value in spent)
        whole = 1000 * 24 / line["speed/images_per_second"]
        assert sum(spent) <= whole * 1.01, "the parts of a step are longer than the step"
    middle = lines[len(lines) // 2]
    assert middle["speed/forward_ms"] > 0
    assert middle["speed/backward_ms"] > 0


def test_the_resolved_config_is_kept_and_loads(started_twice: Any) -> None:
    folder, _, _ = started_twice
    config = load(folder / "config.yaml")
    assert config == load(folder.parent / "small.yaml")
    assert config.train.epochs == 2


def test_every_start_is_kept(started_twice: Any) -> None:
    starts = json.loads((started_twice[0] / "starts.json").read_text())
    assert len(starts) == 2
    for start in starts:
        assert start["command"][0] == "launch/train.py"
        assert start["ranks"] == 1
        assert set(start["versions"]) >= {"torch", "timm", "numpy", "wandb"}
        assert start.keys() >= {"git", "git_changes", "python", "platform"}


def test_no_file_of_the_run_holds_the_key_of_wandb(started_twice: Any) -> None:
    files = [path for path in started_twice[0].rglob("*") if path.is_file()]
    assert {"config.yaml", "starts.json"} <= {path.name for path in files}
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_the_table_is_written_and_printed(started_twice: Any) -> None:
    folder, done, _ = started_twice
    table = (folder / "table.txt").read_text()
    assert table in done[1].stdout
    last = [line for line in read_metrics(folder) if "val/disagreement" in line][-1]
    rows = [line.split() for line in table.splitlines()[2:5]]
    for row, name in zip(rows, ("cifar_resnet8_b-0", "cifar_resnet8_b-1", "ensemble"), strict=True):
        assert row[:3] == ["small", "dml", name]
        shown = [
            f"{last[f'val/{name}/top1']:.2f}",
            f"{last[f'val/{name}/top5']:.2f}",
            f"{last[f'val/{name}/loss']:.3f}",
        ]
        assert row[3:6] == shown


def test_the_curves_are_a_picture_with_lines(started_twice: Any) -> None:
    folder, done, _ = started_twice
    assert f"kept   {folder}: config.yaml, metrics.jsonl, table.txt, curves.png, checkpoint" in done[1].stdout
    with Image.open(folder / "curves.png") as picture:
        assert picture.format == "PNG"
        assert 800 <= picture.width <= 4000
        assert 300 <= picture.height <= 4000
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    coloured = (pixels.max(1) - pixels.min(1) > 60).sum()
    assert coloured > 300, "nothing but axes"


def test_a_server_that_does_not_answer_does_not_stop_training_and_is_told_once(tiny: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        config = small_run(
            tiny, tmp_path / "run", train={"epochs": 1}, log={"wandb": "online", "wandb_timeout": 3.0, "every_steps": 1}
        )
        done = train_by_command(config, tmp_path, WANDB_BASE_URL=address)
    assert done.returncode == 0, done.stderr
    # The run may be over before wandb has given up.
    assert done.stderr.count(f"metrics are in {tmp_path / 'run'}/metrics.jsonl") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 5]


def strictly(text: str) -> Any:
    """JSON without the NaN and Infinity that Python takes for it."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_numbers_that_are_not_finite_become_null(tiny: Path, tmp_path: Path) -> None:
    tracker = Tracker(small_run(tiny, tmp_path), 0, 10)
    tracker.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5, "e": 2})
    tracker.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert strictly(text) == [{"step": 1, "a": None, "b": None, "c": None, "d": 1.5, "e": 2}]


def test_a_run_that_diverges_leaves_valid_metrics_and_says_what_to_try(tiny: Path, tmp_path: Path) -> None:
    config = small_run(tiny, tmp_path, train={"max_skipped": 2}, optimizer={"lr": 1e30}, log={"every_steps": 1})
    with pytest.raises(TrainingDivergedError) as error:
        train_here(config)
    lines = strictly((tmp_path / "metrics.jsonl").read_text())
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert [line["train/skipped"] for line in lines][-2:] == [1, 1]
    assert lines[-1]["train/cifar_resnet8_b-0/ce"] is None
    good = len(lines) - 3
    before = f"Checkpoints of up to step {good} are from before" if good > 0 else "No checkpoint is from before"
    assert str(error.value) == (
        f"2 updates in a row met a non-finite loss or gradient, up to step {len(lines)}; the limit is "
        # Two updates were skipped, and the one before them may be what made them so.
        f"train.max_skipped = 2. {before}; try a smaller optimizer.lr, train.clip_norm, "
        "schedule.warmup_epochs or precision.amp = bf16"
    )


def test_all_lines_are_on_disk_before_there_is_a_checkpoint(tiny: Path, tmp_path: Path) -> None:
    tracker = Tracker(small_run(tiny, tmp_path), 0, 10)
    for step in range(1, 201):
        tracker.write(step, {"a": 1})
        if step % 20 == 0:
            assert tracker.catch_up() is None
            assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, step + 1))
    tracker.close()


def test_lines_after_the_step_of_the_checkpoint_are_cut_off(tiny: Path, tmp_path: Path) -> None:
    lines = [{"step": step} for step in (2, 4, 4, 5, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 7')
    Tracker(small_run(tiny, tmp_path), 4, 10).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 2}\n{"step": 4}\n{"step": 4}\n'


@pytest.mark.parametrize("progress", [False, True])
def test_training_writes_nothing_to_stdout(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], progress: bool
) -> None:
    train_here(small_run(tiny, tmp_path, train={"epochs": 1}, log={"progress": progress}))
    out, err = capfd.readouterr()
    assert out == ""
    assert ("small: step 5 of 5, epoch=1/1, lr=" in err) == progress
    assert [line.split() for line in err.splitlines() if line.startswith(("ranks ", "0 "))] == [
        ["ranks", "rows", "peer", "network"],
        ["0", "24", "cifar_resnet8_b-0", "cifar_resnet8_b"],
    ]
    assert (
        "data   120 images of 10 classes to train on, 37 to validate; batches of 24, 5 steps an epoch, 5 in all" in err
    )
    # What is no terminal is a log.
    assert "\r" not in err


def write_on_a_full_disk(config: RunConfig) -> list[str | None]:
    """Lines of metrics for which there is no room, which comes back; in a process of its own, for the limit's sake."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    tracker = Tracker(config, 0, 10)
    answers = []
    for step in range(1, 7):
        full = 3 <= step <= 5
        size = (config.folder / "metrics.jsonl").stat().st_size
        # Room for half a line; the first is long, so that what is said of it is below the limit, wherever it goes.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 12 if full else limits[0], limits[1]))
        tracker.write(step, {"a": "x" * 10**6 if step == 1 else 12345.5})
        answers.append(tracker.catch_up())
        assert [line["step"] for line in read_metrics(config.folder)] == list(range(1, 3 if full else step + 1))
    tracker.close()
    return answers


def test_lines_that_a_full_disk_refuses_are_written_when_it_has_room(tiny: Path, tmp_path: Path) -> None:
    (answers,) = run_ranks(1, write_on_a_full_disk, small_run(tiny, tmp_path))
    refusal = f"{tmp_path}/metrics.jsonl: File too large"
    assert answers == [None, None, refusal, refusal, refusal, None]
    assert [line["step"] for line in strictly((tmp_path / "metrics.jsonl").read_text())] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("damage", ["", "{", "[" * 100_000, "3", "null"])
def test_damaged_records_of_starts_and_metrics_do_not_keep_a_run_from_starting(
    tiny: Path, tmp_path: Path, damage: str
) -> None:
    (tmp_path / "starts.json").write_text(damage)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + damage.encode() + b'\xff\n{"step": 2}\n')
    record_start(small_run(tiny, tmp_path), 1)
    assert json.loads((tmp_path / "starts.json").read_text())[-1]["ranks"] == 1
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def train_with_a_secret(config: RunConfig) -> None:
    os.environ.update(WANDB_API_KEY=SECRET, AWS_SECRET_ACCESS_KEY=SECRET, HF_TOKEN=SECRET)
    train_here(config)


SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("wandb", ["disabled", "offline"])
def test_secrets_of_the_environment_are_in_no_file_of_a_run(tiny: Path, tmp_path: Path, wandb: str) -> None:
    (tmp_path / "run").mkdir()
    config = small_run(tiny, tmp_path / "run", train={"epochs": 1}, log={"wandb": wandb})
    run_ranks(1, train_with_a_secret, config, timeout=240)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert names >= {"starts.json", "config.yaml", "metrics.jsonl", "manifest.json", "shared.pt"}
    assert (wandb == "offline") == any(name.endswith(".wandb") for name in names)
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path


def test_the_bar_always_shows_where_the_run_is(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only between the end of an epoch and the first step of the next; the first look is before any line."""
    shown: list[str] = []
    progress = Tracker.progress

    def look(self: Tracker, step: int, **values: str) -> None:
        progress(self, step, **values)
        shown.append(self._bar.words)

    monkeypatch.setattr(Tracker, "progress", look)
    train_here(small_run(tiny, tmp_path, log={"progress": True, "every_steps": 2}))
    assert len(shown) == 10 + 6
    assert shown[0] == "epoch=1/2"
    after = [text for text in shown[2:] if "loss=" in text and "images=" in text and "lr=" in text]
    assert len(after) == len(shown) - 2
    assert shown[-1].startswith("epoch=2/2")
