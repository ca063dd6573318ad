"""Are the errors in a metrics file a given share of their baselines, on every source?

python tools/check_metrics.py runs/quickstart/metrics.json --below 0.3
"""

import argparse
import json
from pathlib import Path

PAIRS = (
    ("energy", "energy_mae_mev_per_atom", "baseline_energy_mae_mev_per_atom"),
    ("force", "force_mae_mev_per_angstrom", "baseline_force_mae_mev_per_angstrom"),
)


def main() -> int:
    """Print error over baseline for each source; 1 if one is not below the share, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("metrics", type=Path, help="what `megagnn evaluate --json` wrote")
    parser.add_argument("--below", type=float, default=0.3, metavar="SHARE", help="default: 0.3")
    arguments = parser.parse_args()
    sources = json.loads(arguments.metrics.read_text())["sources"]
    worst = 0.0
    for source, metrics in sources.items():
        shares = [
            (name, metrics[error] / metrics[baseline]) for name, error, baseline in PAIRS if error in metrics
        ]
        worst = max([worst, *(share for _, share in shares)])
        print(
            f"{source}: " + ", ".join(f"{name} error {share:.2f} of its baseline" for name, share in shares)
        )
    passed = worst < arguments.below
    print(f"{'passed' if passed else 'FAILED'}: the worst is {worst:.2f}, to be below {arguments.below:g}")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
