"""`python -m trl_a3po.cli` is `trl-a3po`."""

import sys

from .main import main


sys.exit(main())
