"""Networks, and taps into any network's layers."""

from .taps import FeatureTaps
from .tiny_cnn import TinyCNN

__all__ = ["FeatureTaps", "TinyCNN"]
