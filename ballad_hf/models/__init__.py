"""The models. Importing this package registers them with the Auto classes of transformers."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
)

from .configuration_ballad import BalladConfig
from .configuration_clip_resnet import CLIPResNetConfig, CLIPResNetVisionConfig
from .configuration_efficientnet_lite import EfficientNetLiteConfig
from .configuration_joined_towers import JoinedTowersConfig
from .modeling_ballad import BalladForImageClassification, BalladModel
from .modeling_clip_resnet import CLIPResNetModel, CLIPResNetVisionModel
from .modeling_efficientnet_lite import EfficientNetLiteModel
from .modeling_joined_towers import JoinedTowersModel


AutoConfig.register("ballad", BalladConfig, exist_ok=True)
AutoModel.register(BalladConfig, BalladModel, exist_ok=True)
AutoModelForImageClassification.register(BalladConfig, BalladForImageClassification, exist_ok=True)
AutoModelForZeroShotImageClassification.register(BalladConfig, BalladForImageClassification, exist_ok=True)

AutoConfig.register("clip_resnet", CLIPResNetConfig, exist_ok=True)
AutoConfig.register("clip_resnet_vision_model", CLIPResNetVisionConfig, exist_ok=True)
AutoModel.register(CLIPResNetConfig, CLIPResNetModel, exist_ok=True)
AutoModel.register(CLIPResNetVisionConfig, CLIPResNetVisionModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(CLIPResNetConfig, CLIPResNetModel, exist_ok=True)

AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
AutoConfig.register("joined_towers", JoinedTowersConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
AutoModel.register(JoinedTowersConfig, JoinedTowersModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(JoinedTowersConfig, JoinedTowersModel, exist_ok=True)
