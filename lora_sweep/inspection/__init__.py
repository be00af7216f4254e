"""What an adapter on disk shows: measurements of its tensors, and a verdict.

`measure` holds the arithmetic (pure, named tensors in, numbers out), `reading` brings together folder, base and
trial, `table` shows it to a person.
"""

from lora_sweep.inspection.inspect import Inspection, inspect
from lora_sweep.inspection.measure import ExtraMeasurement, ModuleMeasurement, Verdict
from lora_sweep.inspection.table import draw

__all__ = ["ExtraMeasurement", "Inspection", "ModuleMeasurement", "Verdict", "draw", "inspect"]
