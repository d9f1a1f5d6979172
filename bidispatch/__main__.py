"""`python -m bidispatch`, the same as the command `bidispatch`."""

from __future__ import annotations

from bidispatch.cli import main

raise SystemExit(main())
