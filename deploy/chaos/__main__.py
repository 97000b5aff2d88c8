"""`python -m deploy.chaos`."""

import sys

from deploy.chaos.command import main

sys.exit(main())
