"""Decides what is an alarm: floats in, alarms out; without torch and without Lightning."""

from lightning_gendiag.detection.detector import Detector, alarm_positions

__all__ = ["Detector", "alarm_positions"]
