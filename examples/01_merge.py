"""Merge three adapters from Python, look at the report, save the result.

Run it from anywhere: `python examples/01_merge.py [OUTPUT-FOLDER]`.
"""

import sys
import tempfile
from pathlib import Path

from gam import load_adapter, merge_adapters

ADAPTERS = Path(__file__).resolve().parent / "adapters"

# What goes in: real adapters, with different ranks, targets, scalings and dtypes.
paths = [ADAPTERS / name for name in ("reverse", "sort", "rotate")]
for path in paths:
    print(load_adapter(path))

merged = merge_adapters(paths, weights=[0.4, 0.3, 0.3], scale=2.0)

# What came out, over all modules.
report = merged.report
print(f"\nsize against the inputs: {report.norm_ratio:.3f}, energy kept: {report.energy_kept:.3f}")
for name, cosine in report.cosines.items():
    print(f"cosine with {name}: {cosine:.3f}")
for warning in report.warnings:
    print("warning:", warning)

# And per module: the three that moved furthest.
for module in sorted(report.modules, key=lambda module: -module.norm)[:3]:
    print(f"{module.name}: rank {module.rank}, norm {module.norm:.3f}")

update = merged.modules["model.layers.0.self_attn.q_proj"]
print(f"one update, dense: {list(update.delta().shape)}")

with tempfile.TemporaryDirectory() as scratch:
    folder = merged.save(sys.argv[1] if len(sys.argv) > 1 else Path(scratch) / "merged")
    print("saved:", ", ".join(sorted(file.name for file in folder.iterdir())))
