"""Refuse files above 500 kB: weights, data and logs do not belong into git.

python scripts/check_file_sizes.py FILE...
"""

import sys
from pathlib import Path

LIMIT_BYTES = 500_000

if __name__ == "__main__":
    large = [
        name for name in sys.argv[1:] if Path(name).is_file() and Path(name).stat().st_size > LIMIT_BYTES
    ]
    sys.exit(f"larger than {LIMIT_BYTES // 1000} kB: {', '.join(large)}" if large else 0)
