"""LightningDataModules. Needs the extra ``train``."""

from .clutter_digits import ClutterDigits

__all__ = ["ClutterDigits"]
