"""Which runs may be compared, over seeds, and the figures that come of it. Runs are folders with made-up numbers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from engine.config import ConfigError
from engine.config.loading import dump_anywhere, load
from engine.reporting.report.classes import confusions, per_class
from engine.reporting.report.comparing import compare
from engine.reporting.report.figures import figures_of
from engine.reporting.report.page import as_html, as_text, in_words
from engine.reporting.report.published import published
from engine.reporting.report.runs import Labels, Run, read_run
from engine.reporting.report.statistics import paired_gain, spread_of, student_quantile
from engine.reporting.report.tables import as_csv
from tests.engine.stepping import config_of

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("freedom", "expected"),
    # Tables of Student's t, two-sided 95 %.
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (10, 2.2281), (30, 2.0423)],
)
def test_quantiles_of_student(freedom: int, expected: float) -> None:
    assert student_quantile(0.95, freedom) == pytest.approx(expected, abs=5e-5)


def test_a_gain_is_paired_by_seed() -> None:
    ours, theirs = {0: 71.0, 1: 73.0, 2: 72.0, 9: 50.0}, {2: 70.0, 1: 72.0, 0: 68.0, 8: 99.0}
    gain = paired_gain(ours, theirs)  # differences 3, 1, 2: mean 2, deviation 1
    assert gain is not None
    assert (gain.mean, gain.seeds) == (pytest.approx(2.0), 3)
    assert gain.half_width == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert not gain.is_clear
    one = paired_gain({0: 71.0}, {0: 70.0})
    assert one is not None
    assert (one.mean, one.half_width, one.is_clear) == (1.0, None, False)
    assert paired_gain({0: 71.0}, {1: 70.0}) is None
    assert spread_of([]) is None


def made_up(at: Path, method: str, seed: int, top1: list[float], labels: Labels | None = None, **sections: Any) -> Run:
    """A run of two peers whose mean top-1 at the end of each of two epochs is given; they are two points apart."""
    config = config_of({"name": method}, **sections).model_copy(update={"seed": seed})
    folder = at / f"{method}-{seed}-{len(list(at.iterdir()))}"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_anywhere(config))
    (folder / "starts.json").write_text(json.dumps([{"ranks": 2, "git": "abcdef", "versions": {"torch": "2.11"}}]))
    lines = []
    for epoch, value in enumerate(top1, 1):
        speed = {"speed/images_per_second": 24.0, "speed/data_ms": 5.0, "speed/peak_mib": 100.0 + epoch}
        lines.append({"step": epoch, "epoch": epoch, "lr": 0.1, "train/cifar_resnet8_b-0/ce": 1.0, **speed})
        scores = {f"val/cifar_resnet8_b-{k}": value + (1 if k else -1) for k in range(2)} | {"val/ensemble": value + 2}
        flat = {
            f"{key}/{part}": (x if part == "top1" else 90.0) for key, x in scores.items() for part in ("top1", "top5")
        }
        flat |= {f"{key}/loss": 0.5 for key in scores} | {f"{key}/ece": 0.05 for key in scores}
        lines.append({"step": epoch, "epoch": float(epoch), **flat, "val/disagreement": 10.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_run(folder, labels)


def test_rows_over_seeds_and_what_they_gain(tmp_path: Path) -> None:
    runs = [made_up(tmp_path, "independent", seed, [90.0 + seed, 80.0 + seed]) for seed in range(3)]
    runs += [made_up(tmp_path, "dml", seed, [70.0, 81.0 + seed + shift]) for seed, shift in ((0, 0), (1, 1), (2, 2))]
    runs.append(made_up(tmp_path, "dml", 3, [99.0]))  # not finished: one of two epochs
    (group,) = compare(runs)
    assert group.title == "cifar_resnet8_b (width=4), fashion_mnist_subset"
    base, dml = group.rows
    assert group.baseline is base
    last, best = base.spread("mean", "last"), base.spread("mean", "best")
    assert last is not None
    assert best is not None
    assert (last.mean, last.deviation, best.mean) == (81.0, 1.0, 91.0)
    ensemble = dml.spread("ensemble", "last")
    assert ensemble is not None
    assert (ensemble.mean, ensemble.seeds) == (85.0, 3)
    gain = group.gain(dml, "deployed", "last")  # 1, 2 and 3
    assert gain is not None
    assert gain.mean == pytest.approx(2.0)
    assert dml.peers()["cifar_resnet8_b-1"][0].mean == 84.0
    assert dml.cost() == {"step": 500.0, "data": 5.0, "peak_mib": pytest.approx((102 * 3 + 101) / 4)}
    half = 4.3027 / math.sqrt(3)
    assert in_words(group) == (
        "Against the same networks trained alone, in points of top-1; "
        f"not to be told from none: dml +2.00 [{2 - half:+.2f}, {2 + half:+.2f}]."
    )
    text = as_text("title", "about", [group])
    assert (
        "| dml | 83.00 ± 2.00 | +2.00 [-0.48, +4.48] | 83.00 ± 2.00 | 85.00 ± 2.00 | mean of the peers | 2 | 3 (1"
        in text
    )
    assert "| dml | 5.00 | 5.00 |" in text  # calibration
    page = as_html("<title>", "about", [group])
    assert "&lt;title&gt;" in page
    assert page.count("data:image/svg+xml;base64,") == 4
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    rows = as_csv([group]).splitlines()
    assert rows[0] == "group,method,seed,finished,measure,top1_last,top1_best,run"
    assert f"dml,2,True,deployed,85.0000,85.0000,{runs[5].folder}" in rows[1 + 5 * 5].split('",')[1]


def test_the_best_exit_of_a_peer_stands_beside_it(tmp_path: Path) -> None:
    run = made_up(tmp_path, "lmcl", 0, [70.0, 80.0])
    for scores, best in zip(run.scores, (76.0, 75.0), strict=True):
        scores["val/cifar_resnet8_b-1/best_exit"] = best
    assert run.peers()["cifar_resnet8_b-1 (best exit)"] == [76.0, 75.0]
    text = as_text("", "", compare([run]))
    assert "| lmcl | cifar_resnet8_b-1 (best exit) | 75.00 | 76.00 |" in text


def test_names_of_many_rows_stand_within_the_picture_beside_the_curves_in_the_order_of_their_ends(
    tmp_path: Path,
) -> None:
    methods = ["independent", "dml", "kdcl", "dcl", "codistillation", "mcl", "cl_ilr", "dcm", "one", "ffl", "lmcl"]
    # What is deployed is the first peer or the best one with some methods, a point away.
    runs = [made_up(tmp_path, method, 0, [20.0, 50.0 + 4 * place]) for place, method in enumerate(methods)]
    (group,) = compare(runs)
    svg = next(svg for title, _, svg in figures_of(group) if title == "Validation accuracy")
    height = float(re.findall(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[0])
    at = {name: float(y) for y, name in re.findall(r'<text [^>]* y="([\d.]+)"[^>]*>(\w+)</text>', svg)}
    assert sorted(methods, key=lambda name: at[name]) == methods[::-1]
    assert all(0 < at[name] < height for name in methods)


def test_runs_of_another_recipe_are_refused_unless_that_is_meant(tmp_path: Path) -> None:
    one = made_up(tmp_path, "independent", 0, [70.0, 80.0])
    other = made_up(tmp_path, "dml", 0, [70.0, 80.0], optimizer={"lr": 0.2}, train={"epochs": 2, "clip_norm": 1.0})
    with pytest.raises(ConfigError) as error:
        compare([one, other])
    assert str(error.value).splitlines() == [
        "these runs differ in more than method, peers and seed, and cannot be compared:",
        f"  train.clip_norm: None in {one.folder}, 1.0 in {other.folder}",
        f"  optimizer.lr: 0.05 in {one.folder}, 0.2 in {other.folder}",
        "expected runs of one recipe; if a difference is meant, --may-differ train.clip_norm reports it beside the "
        "numbers",
    ]
    (group,) = compare([one, other], ["optimizer", "train.clip_norm"])
    assert group.differs["optimizer.lr"] == {"independent": 0.05, "dml": 0.2}
    assert "| optimizer.lr differs | independent: 0.05; dml: 0.2 |" in as_text("", "", [group])
    with pytest.raises(ConfigError, match=r"^--may-differ optimizer.rl: no key of these runs; did you mean 'optimi"):
        compare([one, other], ["optimizer.rl"])
    # What a sweep file sets for a method is meant, and its overrides are groups of their own.
    meant = Labels("dml", "r8", None, ("optimizer.lr", "train.clip_norm"))
    (group,) = compare([one, read_run(other.folder, meant)])
    assert [row.method for row in group.rows] == ["independent", "dml"]
    apart = compare([read_run(one.folder, Labels("a", "r8", "x")), read_run(other.folder, Labels("b", "r8", "y"))])
    assert [group.title.split(", ")[-1] for group in apart] == ["x", "y"]


def test_rows_of_one_method_are_told_apart(tmp_path: Path) -> None:
    runs = [made_up(tmp_path, "dml", 0, [70.0, 80.0]) for _ in range(2)]
    runs += [made_up(tmp_path, "dml", 0, [70.0, 82.0])]
    (group,) = compare(runs)
    (row,) = group.rows
    # A seed that was run several times counts once.
    assert row.by_seed("mean", "last") == {0: pytest.approx(242 / 3)}


def test_classes_of_runs_that_have_left_tables_of_them(tmp_path: Path) -> None:
    run = made_up(tmp_path, "independent", 0, [70.0, 80.0])
    a, b = (f"val/cifar_resnet8_b-{k}" for k in range(2))
    (run.folder / "per_class.csv").write_text(f"class,images,{a}/top1,{b}/top1\nShirt,10,50.0,60.0\nBag,10,90.0,\n")
    lines = [
        f"{a},Shirt,Shirt,5",
        f"{a},Shirt,Bag,4",
        f"{b},Shirt,Bag,3",
        f"{b},Bag,Shirt,2",
        "val/ensemble,Bag,Shirt,9",
    ]
    (run.folder / "confusion.csv").write_text("network,class,predicted,images\n" + "\n".join(lines) + "\n")
    (group,) = compare([run])
    assert list(per_class(group)) == [("Shirt", "55.0"), ("Bag", "90.0")]
    assert list(confusions(group)) == [("Shirt", "Bag", "3.5"), ("Bag", "Shirt", "1.0")]
    text = as_text("", "", [group])
    assert "| Shirt | 55.0 |" in text
    assert "| Shirt | Bag | 3.5 |" in text


def test_published_figures_are_of_method_networks_and_numbers_of_peers() -> None:
    def of(config: str) -> list[str]:
        return [str(figure) for figure in published(load(ROOT / "configs" / config))]

    assert of("cifar100/lmcl_resnet32.yaml") == ["75.82"]
    assert of("cifar100/lmcl_resnet32_resnet110.yaml") == ["75.82 & 79.71"]
    assert of("cifar100/mcl_wrn_16_2_x4.yaml") == ["75.79 ± 0.07"]
    assert of("cifar100/mcl_wrn_16_2_x4_kd.yaml") == ["76.34 ± 0.22"]
    assert of("imagenet/lmcl_resnet50.yaml") == ["78.35"]
    assert of("cifar10/pcl_vgg16.yaml") == ["94.74 ± 0.02"]
    assert of("fashion_mnist/quickstart_dml.yaml") == []
