"""Neural style transfer: one photograph in the manner of another, or of several.

A picture is optimised, or a network is, until its features are those of the content and their Gram
matrices those of the style.
"""

from hessreg.style.features import (
    FeatureExtractor,
    Features,
    RandomFeatures,
    VGG19Features,
    WeightsError,
    load_features,
)
from hessreg.style.images import ImageError, keep_colors, load_image, save_image
from hessreg.style.losses import (
    StyleObjective,
    content_loss,
    feature_gram,
    style_loss,
    total_variation,
)
from hessreg.style.networks import (
    ContentNetwork,
    FeedForwardNetwork,
    StyleNetwork,
    SynthesisNetwork,
)
from hessreg.style.synthesis import CropSampler, SynthesisTrainer, load_network, save_network
from hessreg.style.three_networks import ThreeNetworkTransfer

__all__ = [
    "ContentNetwork",
    "CropSampler",
    "FeatureExtractor",
    "Features",
    "FeedForwardNetwork",
    "ImageError",
    "RandomFeatures",
    "StyleNetwork",
    "StyleObjective",
    "SynthesisNetwork",
    "SynthesisTrainer",
    "ThreeNetworkTransfer",
    "VGG19Features",
    "WeightsError",
    "content_loss",
    "feature_gram",
    "keep_colors",
    "load_features",
    "load_image",
    "load_network",
    "save_image",
    "save_network",
    "style_loss",
    "total_variation",
]
