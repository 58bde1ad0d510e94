"""What devices can do, as data: memory, rates, and where each number is from. No torch.

`find` looks a name up, `parse_gpus` reads ``64xh100``, `calibrated` is the machine at hand as `memfit doctor
--calibrate` measured it. A new device is one entry in the table of its vendor.
"""

from __future__ import annotations

from memfit.hardware.catalog import entries, find, parse_gpus
from memfit.hardware.entry import MACHINE_DEVICES, Dtype, Hardware
from memfit.hardware.records import CalibrationRecord, calibrated, load_record, record_path, save_record

__all__ = [
    "MACHINE_DEVICES",
    "CalibrationRecord",
    "Dtype",
    "Hardware",
    "calibrated",
    "entries",
    "find",
    "load_record",
    "parse_gpus",
    "record_path",
    "save_record",
]
