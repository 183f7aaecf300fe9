"""What the fork server imports once for all ranks of all worlds; a run imports the last two where it wants them."""

import timm.optim  # noqa: F401

import engine.trainer  # noqa: F401
