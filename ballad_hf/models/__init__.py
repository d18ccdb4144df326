"""What the network is. Importing this room makes its models known to the Auto classes of transformers."""

from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForZeroShotImageClassification

from .configuration_ballad import BalladConfig
from .modeling_ballad import BalladForImageClassification


AutoConfig.register("ballad", BalladConfig, exist_ok=True)
AutoModelForImageClassification.register(BalladConfig, BalladForImageClassification, exist_ok=True)
AutoModelForZeroShotImageClassification.register(BalladConfig, BalladForImageClassification, exist_ok=True)
