"""`python -m mpm` is the `mpm` command."""

from mpm.cli import main

raise SystemExit(main())
