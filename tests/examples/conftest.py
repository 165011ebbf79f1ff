"""Makes the examples importable, as they are to who runs one."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples"))
