"""BALLAD (Ma et al., 2021, https://arxiv.org/abs/2111.14745): a dual encoder with a linear adapter on its image side.

For an image feature `f` (after the image projection, before normalisation) the adapter computes

    f' = lambda * W f + (1 - lambda) * f          (section 3.3)

and an image's logits are `scale * cos(f', t_c)` over the text embeddings `t_c` of the classes.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, logging

from .class_embeddings import (
    ClassEmbeddingsMixin,
    check_class_names,
    check_text_tower,
    pad_as_trained,
    remember_padding,
)
from .configuration_ballad import DEFAULT_TEMPLATE, BalladConfig
from .prior import Prior


logger = logging.get_logger(__name__)

_HALF_PRECISION = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class BalladOutput(ModelOutput):
    """Output of [`BalladForImageClassification`].

    Args:
        loss: cross-entropy in float32, where `labels` were given.
        logits: float32 of shape (batch, classes), or (batch, texts) where text was given.
        logits_per_image: the same as `logits` where text was given, for the zero-shot pipeline; else `None`.
        image_embeds: adapted, normalised image features of shape (batch, projection_dim).
        text_embeds: normalised class or text embeddings of shape (classes or texts, projection_dim).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None


class LinearAdapter(nn.Module):
    """`f' = ratio * W f + (1 - ratio) * f`: a square matrix without bias or activation, so that it can be folded.

    Args:
        dim: width of the features.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)

    def forward(self, features: torch.Tensor, ratio: float) -> torch.Tensor:
        return torch.lerp(features, self.linear(features).to(features.dtype), ratio)  # (batch, dim)


class BalladPreTrainedModel(PreTrainedModel):
    """The dual encoder and the adapter, which all BALLAD models share, with their features."""

    config_class = BalladConfig
    base_model_prefix = "clip"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    # Rounded to bfloat16, the logarithm of a scale of 100 becomes that of 99.
    _keep_in_fp32_modules_strict = ["logit_scale", "logit_bias", "class_embeds"]

    def __init__(self, config: BalladConfig):
        super().__init__(config)
        self.clip = build_dual_encoder(config.clip_config)
        if not config.has_text_tower:
            remove_text_tower(self.clip)
        self.adapter = LinearAdapter(config.projection_dim)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load a saved model; the arguments are those of `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: weights are missing, damaged, of another shape, or fewer than the config promises. transformers
                would initialise missing ones and only log a warning.
        """
        name = pretrained_model_name_or_path
        folder = os.path.join(name, kwargs.get("subfolder") or "") if isinstance(name, str | os.PathLike) else ""
        if os.path.isdir(folder):
            with contextlib.suppress(ImportError):  # the model's code on the Hub comes without the package
                _conversion("model_folders").check_model_folder(folder)
        try:
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        except (SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError(
                f"The weights in {name} are damaged or do not fit its config: download or save the model again. "
                f"({error})"
            ) from error
        if info["missing_keys"]:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks weights of a BALLAD model: "
                f"{', '.join(sorted(info['missing_keys']))}. If it is a damaged copy, download or save it again; if "
                "it is a plain dual encoder such as CLIP, use BalladForImageClassification.from_clip."
            )
        return (model, info) if output_loading_info else model

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Image features after projection and adapter, not normalised, in `.pooler_output`: (batch, dim).

        The features before the adapter are `model.clip.get_image_features(pixel_values).pooler_output`.
        """
        output = self.clip.get_image_features(pixel_values=pixel_values, **kwargs)
        output.pooler_output = self.adapter(output.pooler_output, self.config.adapter_ratio)
        return output

    def get_text_features(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Text features after projection, not normalised, in `.pooler_output`: (texts, dim).

        SigLIP's text tower gets its fixed length and no mask, however the texts were padded.

        Raises:
            ValueError: the text tower was removed.
        """
        check_text_tower(self.config)
        ids, mask = pad_as_trained(input_ids, attention_mask, self.clip.config)
        return self.clip.get_text_features(input_ids=ids, attention_mask=mask, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; the logit scale and the class embeddings are always float32."""
        return self.adapter.linear.weight.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move or cast everything, but keep what must be float32 out of half precision."""
        kept = {name: tensor.data for name, tensor in self._named_tensors() if self._is_kept_in_float32(name)}
        super()._apply(fn, recurse)
        for name, tensor in self._named_tensors():
            if name in kept and tensor.dtype in (torch.float16, torch.bfloat16):
                tensor.data = kept[name].to(tensor.device, torch.float32)
        return self

    def _named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return itertools.chain(self.named_parameters(), self.named_buffers())

    def _is_kept_in_float32(self, name: str) -> bool:
        return name.rpartition(".")[2] in type(self)._keep_in_fp32_modules_strict

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # The linear layer itself: transformers skips modules without parameters of their own outside its package.
        if module is self.adapter.linear:
            if self.config.adapter_init == "identity":
                init.eye_(module.weight)
            else:  # torch's own default for a linear layer, which the official code keeps
                init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        elif isinstance(module, BalladForImageClassification):
            init.zeros_(module.class_embeds)


class BalladModel(BalladPreTrainedModel):
    """The dual encoder with the adapter, for features: what `AutoModel` and `image-feature-extraction` load.

    It reads the same checkpoints as [`BalladForImageClassification`] and ignores the class embeddings.

    Example:

    >>> import torch
    >>> from ballad_hf import BalladConfig
    >>> from ballad_hf.models.modeling_ballad import BalladModel
    >>> from transformers import CLIPConfig
    >>> tiny = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    >>> vision = {**tiny, "image_size": 32, "patch_size": 8}
    >>> config = BalladConfig(clip_config=CLIPConfig(vision_config=vision, text_config=tiny, projection_dim=16))
    >>> tuple(BalladModel(config)(torch.zeros(2, 3, 32, 32)).pooler_output.shape)
    (2, 16)
    """

    _keys_to_ignore_on_load_unexpected = [r"^class_embeds$"]

    def __init__(self, config: BalladConfig):
        super().__init__(config)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, return_dict: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple:
        """Image features, as `get_image_features` returns them.

        Args:
            pixel_values: (batch, channels, height, width), as the image processor makes them.
            return_dict: `False` for a tuple.
            kwargs: passed to the image tower, such as `interpolate_pos_encoding`.
        """
        output = self.get_image_features(pixel_values, **kwargs)
        return output if return_dict is not False else output.to_tuple()


class BalladForImageClassification(ClassEmbeddingsMixin, BalladPreTrainedModel):
    """A dual encoder, the adapter, and the class embeddings.

    Without text, `forward` scores the stored classes and the text tower does not run. With `input_ids` it is a
    zero-shot model. Both stock pipelines of transformers, image classification and zero-shot, take it.

    Example:

    >>> from ballad_hf import BalladConfig, BalladForImageClassification
    >>> from transformers import CLIPConfig
    >>> tiny = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    >>> vision = {**tiny, "image_size": 32, "patch_size": 8}
    >>> clip = CLIPConfig(vision_config=vision, text_config=tiny, projection_dim=16)
    >>> model = BalladForImageClassification(BalladConfig(clip_config=clip, id2label={0: "cat", 1: "dog"}))
    >>> tuple(model.adapter.linear.weight.shape)
    (16, 16)
    """

    class_embeds: torch.Tensor
    processing_class: Any = None  # the processor that the model came with; `processor_of` finds it otherwise
    pretrained: bool | None = None  # whether the towers were trained before; `None` where `from_clip` did not make it

    def __init__(self, config: BalladConfig):
        super().__init__(config)
        class_embeds = torch.zeros(config.num_labels, config.projection_dim, dtype=torch.float32)
        self.register_buffer("class_embeds", class_embeds)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        target_prior: Prior | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BalladOutput | tuple:
        """Logits over the stored classes, or over the given texts.

        Args:
            pixel_values: (batch, channels, height, width), as the image processor makes them.
            input_ids: (texts, length) token ids; then the texts are the classes.
            attention_mask: (texts, length), 1 for tokens and 0 for padding.
            labels: (batch,) class index of each image, for the loss.
            target_prior: how common the stored classes are here; replaces the config's, see `set_target_prior`.
                Ignored where text is given.
            return_dict: `False` for a tuple.
            kwargs: passed to the image tower, such as `interpolate_pos_encoding`.

        Raises:
            ValueError: no text is given, and the class embeddings are missing or stale; in evaluation mode without
                labels, the logits are not finite.
        """
        image_features = self.get_image_features(pixel_values, **kwargs).pooler_output  # (batch, dim)
        if input_ids is None:
            text_embeds = self.stored_class_embeds()  # (classes, dim)
        else:
            text_features = self.get_text_features(input_ids, attention_mask).pooler_output
            text_embeds = F.normalize(text_features.float(), dim=-1)  # (texts, dim)
        image_embeds = F.normalize(image_features.float(), dim=-1)  # (batch, dim)
        logits = self.similarity(image_embeds, text_embeds)  # (batch, classes or texts)
        shift = self.logit_shift(target_prior) if input_ids is None else None
        logits = logits if shift is None else logits + shift
        if labels is None and not self.training:
            check_finite_logits(logits)
        loss = None if labels is None else F.cross_entropy(logits, labels.to(logits.device))
        output = BalladOutput(
            loss=loss,
            logits=logits,
            logits_per_image=None if input_ids is None else logits,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
        )
        return output if return_dict is not False else output.to_tuple()

    def similarity(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """`scale * cosine (+ bias)` in float32 whatever the autocast: (batch, classes)."""
        with torch.autocast(image_embeds.device.type, enabled=False):
            logits = self.logit_scale * (image_embeds.float() @ text_embeds.float().T)
            bias = getattr(self.clip, "logit_bias", None)  # SigLIP has one
            return logits if bias is None else logits + bias.float()

    @classmethod
    def from_clip(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        class_names: Sequence[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        templates: Sequence[str] | None = None,
        adapter_ratio: float = 0.2,
        adapter_init: str = "identity",
        logit_scale: float | None = None,
        processing_class: Any = None,
        *,
        dataset: Any = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> BalladForImageClassification:
        """Wrap a pretrained dual encoder.

        Args:
            pretrained_model_name_or_path: a Hub name or folder of transformers (CLIP, CLIPResNet, SigLIP, ...) or
                open_clip, a file in OpenAI's layout, or `"lite"`; see `load_dual_encoder`. `"tiny"` is a small CLIP
                with random weights for tests and the built-in example.
            class_names: the classes; their embeddings are made at once. Without, call `set_class_names` later.
            tokenizer: default: the processor's, or the checkpoint's own.
            templates: prompts with `{}` for the name.
            adapter_ratio: lambda, see [`BalladConfig`].
            adapter_init: `"identity"` or `"random"`.
            logit_scale: a fixed scale, or `None` for the checkpoint's own.
            processing_class: a processor with `image_processor` and `tokenizer`, kept as `model.processing_class`;
                default: the checkpoint's own, where it has one.
            dataset: the training split, instead of `class_names`: its classes and the images of each are taken over.
            seed: of the random weights of `"tiny"`.
            kwargs: for `from_pretrained`, such as `revision`, `token`, `dtype`.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ImportError: the package ballad_hf is not installed, and this class came from a Hub repository.
            ValueError: it is no checkpoint, lacks weights, or is no dual encoder; both `dataset` and `class_names`.
        """
        images = None if dataset is None else _package("data.image_dataset").as_image_dataset(dataset)
        if images is not None:
            if class_names is not None:
                raise ValueError("Give either dataset or class_names: the dataset has class names of its own.")
            class_names = images.class_names
        config_values = {
            "templates": templates,
            "adapter_ratio": adapter_ratio,
            "adapter_init": adapter_init,
            "logit_scale": logit_scale,
        }
        if pretrained_model_name_or_path == "tiny":
            texts = [*(templates or [DEFAULT_TEMPLATE]), *(class_names or ())]
            clip, processing_class = _conversion("tiny_clip").tiny_clip_for(texts, seed)
            model = cls.from_dual_encoder(clip, class_names, processing_class=processing_class, **config_values)
        else:
            model = cls._from_checkpoint(
                pretrained_model_name_or_path, class_names, tokenizer, processing_class, config_values, kwargs
            )
        model.pretrained = pretrained_model_name_or_path != "tiny"
        if images is not None:
            model.config.class_counts = images.class_counts.tolist()
        return model

    @classmethod
    def _from_checkpoint(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        class_names: Sequence[str] | None,
        tokenizer: PreTrainedTokenizerBase | None,
        processing_class: Any,
        config_values: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> BalladForImageClassification:
        encoders = _conversion("dual_encoders")
        hub = encoders.hub_arguments(kwargs)
        half = _HALF_PRECISION.get(str(kwargs.get("dtype")).removeprefix("torch."))
        if half is not None:  # cast at the end, as loading would round the logit scale too
            kwargs["dtype"] = torch.float32
        clip = encoders.load_dual_encoder(pretrained_model_name_or_path, **kwargs)
        if tokenizer is None and processing_class is not None:
            tokenizer = processing_class.tokenizer
        if tokenizer is None and class_names is not None:
            tokenizer = encoders.load_tokenizer(pretrained_model_name_or_path, clip.config, **hub)
        if processing_class is None and not os.path.isfile(pretrained_model_name_or_path):
            # A checkpoint need not have one; whoever needs it later gets the error.
            with contextlib.suppress(ImportError, OSError, ValueError):
                processing_class = encoders.load_processor(
                    pretrained_model_name_or_path, clip.config, tokenizer, **hub
                )
        model = cls.from_dual_encoder(
            clip,
            class_names=class_names,
            tokenizer=tokenizer,
            processing_class=processing_class,
            **config_values,
        )
        return model if half is None else model.to(half)

    @classmethod
    def from_dual_encoder(
        cls,
        clip: PreTrainedModel,
        class_names: Sequence[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        processing_class: Any = None,
        **config_values: Any,
    ) -> BalladForImageClassification:
        """Wrap a dual encoder that is in memory; the arguments are those of `from_clip`. The encoder is not copied."""
        values = {name: value for name, value in config_values.items() if value is not None}
        names = check_class_names(class_names) if class_names is not None else None
        if names is not None:
            values["id2label"] = dict(enumerate(names))
        dtype = next(clip.vision_model.parameters()).dtype
        model = cls._from_config(BalladConfig(clip_config=clip.config, **values), dtype=dtype)
        model.clip = clip
        model.processing_class = processing_class
        model.to(clip.device).eval()
        if tokenizer is None and processing_class is not None:
            tokenizer = processing_class.tokenizer
        if tokenizer is not None:
            remember_padding(clip.config, tokenizer)
        if names is not None:
            if tokenizer is None:
                tokenizer = _conversion("dual_encoders").load_tokenizer(clip.config.name_or_path, clip.config)
            model.set_class_names(names, tokenizer)
        return model

    @torch.no_grad()
    def fold_adapter(self) -> PreTrainedModel:
        """This model as a plain dual encoder, such as a `CLIPModel`, with the adapter in its image projection.

        The adapter is linear and follows a linear projection `P` (with a bias `b` in a modified ResNet), so

            lambda * W (P x + b) + (1 - lambda) * (P x + b) = (A P) x + A b,   A = lambda * W + (1 - lambda) * I

        for every feature x: the same `logits_per_image`, with the weights of the dual encoder alone. The class
        embeddings and the prior correction stay behind.

        Returns:
            A copy, of the dual encoder's own class, in evaluation mode.

        Raises:
            ValueError: the image tower has no linear projection (SigLIP), or the text tower was removed.
        """
        projection = getattr(self.clip, "visual_projection", None)
        if not isinstance(projection, nn.Linear):
            raise ValueError(
                f"A {type(self.clip).__name__} has no linear image projection to fold the adapter into: save the "
                "model as it is. CLIP, CLIPResNet, MetaCLIP 2, AltCLIP and Chinese-CLIP have one."
            )
        if not self.config.has_text_tower:
            raise ValueError("A model without its text tower can't become a dual encoder: fold the full model.")
        # In float64, so that the product is rounded once; on the CPU, as not every device has float64.
        adapter = self.adapter.linear.weight.detach().cpu().double()  # (dim, dim)
        mixed = torch.lerp(torch.eye(len(adapter), dtype=torch.float64), adapter, float(self.config.adapter_ratio))
        folded = copy.deepcopy(self.clip).eval()
        target = folded.visual_projection
        target.weight.copy_(mixed @ projection.weight.detach().cpu().double())  # (dim, width)
        if target.bias is not None:
            target.bias.copy_(mixed @ projection.bias.detach().cpu().double())  # (dim,)
        if self.config.logit_scale is not None:
            folded.logit_scale.fill_(math.log(self.config.logit_scale))
        folded.logit_scale.data = folded.logit_scale.to(target.weight.dtype)  # a stock model has one dtype
        return folded

    def remove_text_tower(self) -> int:
        """Remove the text tower, in place: the model then serves its stored classes alone.

        Returns:
            The bytes that a checkpoint is smaller by.

        Raises:
            ValueError: there are no class embeddings to serve.
        """
        self.stored_class_embeds()
        self.config.has_text_tower = False
        return remove_text_tower(self.clip)


class RemovedTextTower(nn.Module):
    """Stands where a text tower or its projection was removed, and says so when it is asked for text."""

    # Initialising a dual encoder draws its text projection's weight; drawing no numbers is harmless.
    weight = torch.empty(0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "This is a vision-only model: its text tower was removed, so it compares images with its stored classes "
            "and no other text. Use the full model for new text."
        )


def remove_text_tower(clip: PreTrainedModel) -> int:
    """Take the text tower out of a dual encoder, in place.

    Args:
        clip: the dual encoder, of any family of transformers with a `text_model`.

    Returns:
        The bytes that a checkpoint is smaller by.
    """
    removed = 0
    for name in ("text_model", "text_projection"):
        tower = getattr(clip, name, None)
        if not isinstance(tower, nn.Module):
            continue  # SigLIP's text tower projects by itself
        removed += sum(tensor.nbytes for tensor in tower.state_dict().values())
        setattr(clip, name, RemovedTextTower())
    return removed


def _conversion(module: str) -> Any:
    return _package(f"conversion.{module}")


def _package(module: str) -> Any:
    """A module of the package that does not travel with the model's code."""
    try:
        return importlib.import_module(f"ballad_hf.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "ballad_hf":
            raise
        raise ImportError(
            "Loading other checkpoints needs the whole package, not only the model's code: pip install ballad_hf."
        ) from error


def check_finite_logits(logits: torch.Tensor) -> None:
    """Refuse to classify with logits that are not finite.

    Args:
        logits: (batch, classes).

    Raises:
        ValueError: some are not, with the images of the batch.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or bool(torch.isfinite(logits).all()):
        return
    images = (~torch.isfinite(logits).all(dim=-1)).nonzero().flatten().tolist()
    raise ValueError(
        f"The logits of the images {images[:10]} of this batch are not finite: the weights hold NaN or infinite "
        "values (a diverged training, a damaged file), the pixel_values do, or the features are too large for "
        "float16. Load other weights, look at the images, or compute in float32 or bfloat16."
    )


def check_finite_weights(model: nn.Module, source: str | os.PathLike = "the model") -> None:
    """Refuse weights that are not finite.

    Raises:
        ValueError: with their names.
    """
    wrong = [name for name, value in model.state_dict().items() if not bool(torch.isfinite(value).all())]
    if wrong:
        raise ValueError(
            f"{len(wrong)} weights of {source} hold NaN or infinite values, such as {', '.join(wrong[:3])}: take a "
            "checkpoint from before the training diverged, or get the file again."
        )


def build_dual_encoder(clip_config: PreTrainedConfig) -> PreTrainedModel:
    """The dual encoder of a config, without weights from a checkpoint."""
    if clip_config.model_type == "clip_resnet":
        from .modeling_clip_resnet import CLIPResNetModel

        return CLIPResNetModel._from_config(clip_config, dtype=torch.get_default_dtype())
    if clip_config.model_type == "joined_towers":
        from .modeling_joined_towers import JoinedTowersModel

        return JoinedTowersModel._from_config(clip_config, dtype=torch.get_default_dtype())
    # The default dtype is what the caller builds in; the config's own may be left from another checkpoint.
    return AutoModel.from_config(clip_config, dtype=torch.get_default_dtype())
