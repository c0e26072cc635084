"""`python -m mod_fused` is `mod-fused`."""

import sys

from .cli import main

sys.exit(main())
