"""The parts of a detector behind its backbone, and how many there are of each."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from swinv2_scale.models.detection.heads import BoxHead, MaskHead, ProposalHead, SemanticHead
from swinv2_scale.models.detection.matching import ProposalNetwork
from swinv2_scale.models.swin_v2 import Block, LayerNorm, SwinTransformerV2

BOX_SIDE, MASK_SIDE = 7, 14  # of what RoIAlign cuts out
STRIDES = (4, 8, 16, 32, 64)
RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors


class Anchors(AnchorGenerator):
    """torchvision's, with the true strides: it divides sizes, which is wrong where the coarsest map is rounded up."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors (A, 4) of each image, over all maps."""
        first = feature_maps[0]
        self.set_cell_anchors(first.dtype, first.device)
        strides = [[torch.full((), stride, device=first.device)] * 2 for stride in STRIDES]
        anchors = torch.cat(self.grid_anchors([list(one.shape[2:]) for one in feature_maps], strides))
        return [anchors] * len(image_list.image_sizes)


class StageOutput(nn.Module):
    """Normalises a backbone's map and brings its channels forward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, C) -> (B, C, Y, X)"""
        return self.norm(x).permute(0, 3, 1, 2)


class Decoder(nn.Module):
    """What a CascadeRCNN has beside its encoder; the arguments are explained there. Its forward is the detector's."""

    attention: Block | None
    semantic_head: SemanticHead | None

    def __init__(
        self,
        encoder: SwinTransformerV2,
        *,
        num_classes: int,
        stages: int,
        masks: bool,
        mask_information_flow: bool,
        semantic_classes: int,
        global_attention: bool,
        channels: int,
        box_convolutions: int,
        box_features: int,
        mask_convolutions: int,
        semantic_convolutions: int,
        anchor_sizes: Sequence[int],
        proposals: int,
        crowd_overlap: float,
    ) -> None:
        super().__init__()
        self.attention = None
        if global_attention:
            last = encoder.blocks()[-1][-1]
            self.attention = Block(
                encoder.widths[-1],
                last.attn.num_heads,
                window=[1 << 20, 1 << 20],  # which shrinks to the map
                shifted=False,
                reference=[-(-side // 8) for side in encoder.absolute_grid],
                mlp_ratio=last.mlp.fc1.out_features / encoder.widths[-1],
                drop_path_rate=0.0,
                extra_norm=False,
                position_bias="log",
            )
        self.outputs = nn.ModuleList(StageOutput(width) for width in encoder.widths[:-1])
        self.neck = FeaturePyramidNetwork(encoder.widths, channels, LastLevelMaxPool())
        self.rpn = ProposalNetwork(
            Anchors(tuple((size,) for size in anchor_sizes), (RATIOS,) * len(STRIDES)),
            ProposalHead(channels, len(RATIOS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * proposals, "testing": proposals},  # of each map
            post_nms_top_n={"training": proposals, "testing": proposals},
            nms_thresh=0.7,
        )
        self.rpn.crowd_overlap = crowd_overlap
        names = [str(number) for number in range(4)]
        self.box_pool = MultiScaleRoIAlign(names, BOX_SIDE, 2)
        self.mask_pool = MultiScaleRoIAlign(names, MASK_SIDE, 2)
        self.semantic_pool = MultiScaleRoIAlign(["semantic"], MASK_SIDE, 2)
        box_head = {"convolutions": box_convolutions, "features": box_features, "side": BOX_SIDE}
        self.box_heads = nn.ModuleList(BoxHead(channels, num_classes=num_classes, **box_head) for _ in range(stages))
        self.mask_heads = nn.ModuleList(
            MaskHead(
                channels,
                convolutions=mask_convolutions,
                num_classes=num_classes,
                follows=mask_information_flow and stage > 0,
            )
            for stage in range(stages if masks else 0)
        )
        self.semantic_head = None
        if semantic_classes:
            sizes = {"convolutions": semantic_convolutions, "num_classes": semantic_classes}
            self.semantic_head = SemanticHead(channels, maps=len(STRIDES), **sizes)
