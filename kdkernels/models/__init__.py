"""Networks, taps into any network's layers, and weights from files."""

from .bifpn import SelfTeacher
from .enet import ENet
from .exits import Exits
from .fusion import FusionModule, Gate
from .mobilenet import MobileNetV2, mobilenet_v2
from .resnet import (
    ResNet,
    resnet8,
    resnet8x4,
    resnet14,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from .resnet_four_stages import FourStageResNet, resnet18, resnet34
from .shufflenet import ShuffleNetV1, ShuffleNetV2, shufflenet_v1, shufflenet_v2
from .sskd import (
    MobileNet,
    PlainVGG,
    ResNeXt,
    sskd_mobilenet_student,
    sskd_mobilenet_teacher,
    sskd_resnext_student,
    sskd_resnext_teacher,
    sskd_vgg_student,
    sskd_vgg_teacher,
)
from .taps import FeatureTaps, pair_features
from .tiny_bifpn import TinyBiFPN
from .tiny_cnn import TinyCNN
from .tiny_fcn import TinyFCN
from .vgg import VGG, vgg8, vgg11, vgg13
from .weights import from_checkpoint, load_weights
from .wrn import WideResNet, wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2

# The usual taps of each family, from the first to the last layer. Their shapes: docs/models.md.
TAPS: dict[type, tuple[str, ...]] = {
    ResNet: ("relu", "layer1", "layer2", "layer3"),
    FourStageResNet: ("relu", "layer1", "layer2", "layer3", "layer4"),
    WideResNet: ("conv1", "block1", "block2", "block3"),
    VGG: ("relu0", "relu1", "relu2", "relu3", "relu4"),
    MobileNetV2: ("conv1", "blocks.1", "blocks.2", "blocks.4", "blocks.6"),
    ShuffleNetV1: ("relu", "layer1", "layer2", "layer3"),
    ShuffleNetV2: ("relu", "layer1", "layer2", "layer3"),
    PlainVGG: ("pool0", "pool1", "pool2", "pool3"),
    MobileNet: ("stage0", "stage1", "stage2", "stage3"),
    ResNeXt: ("stem", "stage0", "stage1", "stage2"),
    TinyCNN: ("block1", "block2", "block3"),
    TinyFCN: ("block1", "block2", "block3"),
    TinyBiFPN: ("refined1", "refined2", "refined3"),
    ENet: ("encoder1", "encoder2", "encoder3", "encoder4"),
}

__all__ = [
    "TAPS",
    "VGG",
    "ENet",
    "Exits",
    "FeatureTaps",
    "FourStageResNet",
    "FusionModule",
    "Gate",
    "MobileNet",
    "MobileNetV2",
    "PlainVGG",
    "ResNeXt",
    "ResNet",
    "SelfTeacher",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "TinyBiFPN",
    "TinyCNN",
    "TinyFCN",
    "WideResNet",
    "from_checkpoint",
    "load_weights",
    "mobilenet_v2",
    "pair_features",
    "resnet8",
    "resnet8x4",
    "resnet14",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet34",
    "resnet44",
    "resnet56",
    "resnet110",
    "shufflenet_v1",
    "shufflenet_v2",
    "sskd_mobilenet_student",
    "sskd_mobilenet_teacher",
    "sskd_resnext_student",
    "sskd_resnext_teacher",
    "sskd_vgg_student",
    "sskd_vgg_teacher",
    "vgg8",
    "vgg11",
    "vgg13",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
]
