"""Writes a trained peer as an ordinary network: NAME.safetensors, and NAME.json that says how to build it.

    python launch/export.py runs/quickstart-dml                      every peer
    python launch/export.py runs/quickstart-dml --peer NAME --ema    the moving average of one peer

Nothing of the method is left in it. Networks of timm and torchvision load there without this project; ours with
models.load_network. The JSON holds the line of Python that loads the weights, the normalisation of the images and the
names of the classes. Before a file is announced it is loaded again and its logits are compared with those of the peer.
"""

from __future__ import annotations

from pathlib import Path

from launch.parsing import parser
from launch.with_parent import importing


def main() -> None:
    """The command."""
    arguments = parser(__doc__ or "", "")
    arguments.add_argument("run", type=Path, metavar="RUN", help="a run's folder")
    arguments.add_argument("--peer", metavar="NAME", help="only this peer")
    arguments.add_argument("--ema", action="store_true", help="the moving average of the weights (train.ema_decay)")
    arguments.add_argument("--checkpoint", default="newest", metavar="WHICH", help="newest (default), best or a step")
    arguments.add_argument("--out", type=Path, metavar="DIR", help="where to write; RUN/export if absent")
    options = arguments.parse_args()
    # Not before: torch takes seconds to import.
    with importing():
        from launch.commands.export import run

    run(options)


if __name__ == "__main__":
    main()
