"""`python -m edgedit` is the `edgedit` command."""

import sys

from edgedit.apps.cli.main import main

sys.exit(main())
