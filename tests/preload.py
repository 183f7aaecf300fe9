"""What the fork server imports once for all ranks of all worlds."""

import engine.trainer  # noqa: F401
