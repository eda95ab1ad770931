"""``python -m vmtide_rct`` is ``vmtide-rct``."""

import sys

from .cli import main

sys.exit(main())
