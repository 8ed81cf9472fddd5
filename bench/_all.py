"""Every measurement, one after the other, each written into the README. Options are passed on to those that read a table."""

import subprocess
import sys
from pathlib import Path

_WITH_TABLE = ("cold", "small", "mixed", "memory", "restart", "startup", "tune")
_WITHOUT_TABLE = ("hot", "policies", "curves", "hashing", "record", "tiers", "groups", "kernels")


def main() -> None:
    """Run them, and fail with the first that fails."""
    for name in _WITH_TABLE + _WITHOUT_TABLE:
        script = Path(__file__).with_name(f"{name}.py")
        passed_on = [] if name in _WITHOUT_TABLE else sys.argv[1:]
        subprocess.run([sys.executable, str(script), "--readme", *passed_on], check=True)


if __name__ == "__main__":
    main()
