"""Makes tests/ranks.py importable, here and on the ranks that it starts."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
