"""`python -m examples.sigil_api`"""

import sys

from examples.sigil_api.commands import main

sys.exit(main())
