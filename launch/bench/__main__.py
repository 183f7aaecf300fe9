"""Measures the engine against what one would write instead, both timed in turn in one run.

    python launch/bench step                     the engine's step against a bare loop in plain PyTorch
    torchrun --nproc-per-node=2 launch/bench exchange    spread peers against the same peers uncoupled
    torchrun --nproc-per-node=2 launch/bench decode --folder DIR    photos decoded once for all peers, against by each
    torchrun --nproc-per-node=4 launch/bench placement   ranks in proportion to what peers cost, against as many each
    python launch/bench checkpoint               saving beside training, against waiting for the disk
    python launch/bench bytes                    not timed: what each method sends, from its signals' shapes
    python launch/bench operations               not timed: operations that a step of each method dispatches
    python launch/bench data --folder DIR        images/s of folders, shards, ... and decoders, against other loaders
    python launch/bench listing --images 1281167    the first look at class folders, each one after, and ImageFolder's
    python launch/bench resident                 small images with AutoAugment and Cutout, against other loaders
    python launch/bench trainer --folder DIR     training on photographs, against a loop of timm's parts
    python launch/bench layout                   channels-last memory against channels first, network by network
    python launch/bench together                 peers of one network computed as one, against each by itself
    python launch/bench objective                the objective alone at ImageNet's shapes, against KL on every pair
    python launch/bench lmcl                     L-MCL's objective with memory banks against one pair after another
    python launch/bench lmcl-step                a step of L-MCL against two networks alone, and its outer step
    python launch/bench methods                  a step of each method against independent peers, and its extra networks
    python launch/bench peers                    each method, data included, against a trainer as papers' code has it
    python launch/bench start                    --help, --check and the way to the first step, against importing torch
    python launch/bench gpu --out DIR            all that a GPU has to show, in parts that fail alone; see docs/gpu.md

Absolute times belong to the machine; the ratio is the result. Machines wander, so variants take turns, and the median
of the ratios of neighbours is printed with its quartiles.
"""

from __future__ import annotations

from pathlib import Path

from launch.bench import LOADING
from launch.bench.gpu.parts import PARTS
from launch.parsing import parser

WHAT = (
    "step",
    "exchange",
    "placement",
    "checkpoint",
    "bytes",
    "operations",
    "objective",
    "layout",
    "together",
    "lmcl",
    "lmcl-step",
    "start",
    "gpu",
)
WHOLE = ("methods", "peers")


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", "")
    arguments.add_argument("what", choices=(*WHAT, *WHOLE, *LOADING))
    arguments.add_argument("--network", default="torchvision/resnet18", help="of both peers (default: %(default)s)")
    arguments.add_argument("--size", type=int, help="side of the images (default: 32, data: 224)")
    arguments.add_argument("--batch", type=int, default=64, help="rows of a step (default: %(default)s)")
    arguments.add_argument("--rounds", type=int, default=15, help="timed pairs (default: %(default)s)")
    arguments.add_argument("--steps", type=int, default=3, help="steps in one timing (default: %(default)s)")
    arguments.add_argument("--amp", choices=["float32", "bf16", "fp16"], default="float32")
    arguments.add_argument("--batches", type=int, nargs="+", default=[8, 32], help="lmcl: rows (default: 8 32)")
    arguments.add_argument(
        "--folder", type=Path, help="data, decode, trainer: train/ and val/; checkpoint, listing: to write in"
    )
    arguments.add_argument("--images", type=int, default=100_000, help="listing: files (default: %(default)s)")
    arguments.add_argument("--also", nargs="+", default=[], metavar="FORM=DIR", help="data: it as webdataset, hub")
    arguments.add_argument("--threads", type=int, help="CPU threads; torch's choice if absent")
    arguments.add_argument("--out", type=Path, metavar="DIR", help="gpu: where rows.jsonl and gpu.md are written")
    arguments.add_argument("--quick", action="store_true", help="only to try the command, where it takes long")
    arguments.add_argument("--measure", action="store_true", help="placement: foretell from peers that are timed here")
    arguments.add_argument("--cases", nargs="+", metavar="NAME", help="methods, peers: of them; all if absent")
    arguments.add_argument("--peers", type=int, default=2, help="methods: peers of a cohort (default: %(default)s)")
    arguments.add_argument(
        "--classes", type=int, default=100, help="methods, trainer: of images (default: %(default)s)"
    )
    arguments.add_argument("--workers", type=int, default=2, help="peers: of the other's loader (default: %(default)s)")
    arguments.add_argument("--compile", action="store_true", help="peers: time ours with precision.compile too")
    arguments.add_argument("--minutes", type=float, default=8.0, help="gpu: limit of all parts (default: 8)")
    arguments.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"gpu: of {', '.join(PARTS)}")
    options = arguments.parse_args()
    # Not before: torch takes seconds to import.
    from launch.bench.measuring import run

    run(options)


if __name__ == "__main__":
    main()
