"""``python -m lossfns`` is the command ``lossfns``."""

import sys

from lossfns.cli import main

sys.exit(main())
