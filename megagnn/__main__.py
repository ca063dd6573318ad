"""`python -m megagnn`, for torchrun."""

import sys

from megagnn.cli import main

sys.exit(main())
