"""``python -m lossfns.testing.vectors`` is ``lossfns vectors``."""

import sys

from lossfns.testing.vectors.command import main

sys.exit(main())
