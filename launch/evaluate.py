"""Scores a cohort on the validation split: each peer, its moving average and the ensemble.

Alone:           python launch/evaluate.py runs/quickstart-dml
On 8 ranks:      torchrun --nproc-per-node=8 launch/evaluate.py runs/imagenet-dml --checkpoint best
On other files:  python launch/evaluate.py runs/imagenet-dml data.root=/mnt/imagenet-v2

Every image is counted exactly once, whatever the number of ranks.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from data_pipelines import open_pipeline
from engine.cohort.cohort import Cohort
from engine.cohort.precision import set_precision
from engine.files import write_json
from engine.preflight import check_data
from engine.ranks.collectives import Launch, choose_device, start
from engine.ranks.placement import plan
from engine.safety import loading
from engine.training.evaluation import evaluate_cohort
from launch.entry import parser, require_torchrun, user_errors
from launch.run_folder import settings_of, use_together


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", "")
    arguments.add_words("RUN", "a run's folder")
    arguments.add_argument("--checkpoint", default="newest", metavar="WHICH", help="newest (default), best or a step")
    arguments.add_argument("--json", type=Path, metavar="FILE", help="write the scores there as well")
    options, chosen, overrides = arguments.parse_words()
    launch = Launch.from_environment()
    if chosen is None:
        arguments.error("RUN is missing; expected the folder of a run")
    run = Path(chosen)
    with user_errors(launch):
        require_torchrun("launch/evaluate.py")
        config = settings_of(run, overrides)
        device = choose_device(config.device, launch)
        placement = plan(config, launch.world, launch.rank)
        check_data(config)
        set_precision(config, device)
        start(launch, device)
        pipeline = open_pipeline(config.data, config.seed, device)
        cohort = Cohort.on(pipeline, config, placement, device, initial=False)
        manifest = use_together(run, options.checkpoint, lambda found: loading.load(run, found, cohort))
        values = evaluate_cohort(cohort, pipeline)
        pipeline.close()
        dist.destroy_process_group()
    if launch.rank == 0:
        print(f"{run}, step {manifest.step}, {pipeline.eval_size} images, {placement}")
        for key, value in values.items():
            print(f"  {key:40} {value:.4f}")
        if options.json:
            write_json(options.json, {"step": manifest.step, "images": pipeline.eval_size, **values})


if __name__ == "__main__":
    main()
