"""What the network is. Importing this room makes its models known to the Auto classes of transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
)

from .configuration_ballad import BalladConfig
from .configuration_clip_resnet import CLIPResNetConfig, CLIPResNetVisionConfig
from .modeling_ballad import BalladForImageClassification, BalladModel
from .modeling_clip_resnet import CLIPResNetModel, CLIPResNetVisionModel


AutoConfig.register("ballad", BalladConfig, exist_ok=True)
AutoModel.register(BalladConfig, BalladModel, exist_ok=True)
AutoModelForImageClassification.register(BalladConfig, BalladForImageClassification, exist_ok=True)
AutoModelForZeroShotImageClassification.register(BalladConfig, BalladForImageClassification, exist_ok=True)

AutoConfig.register("clip_resnet", CLIPResNetConfig, exist_ok=True)
AutoConfig.register("clip_resnet_vision_model", CLIPResNetVisionConfig, exist_ok=True)
AutoModel.register(CLIPResNetConfig, CLIPResNetModel, exist_ok=True)
AutoModel.register(CLIPResNetVisionConfig, CLIPResNetVisionModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(CLIPResNetConfig, CLIPResNetModel, exist_ok=True)
