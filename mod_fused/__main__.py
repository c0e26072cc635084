"""`python -m mod_fused`: the command `mod-fused`."""

import sys

from .cli import main

sys.exit(main())
