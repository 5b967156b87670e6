"""torchvision's Mask R-CNN in the place of HTC++, with the same backbone, data, steps and settings of the optimiser.

    deepspeed --num_accelerators 2 launch/finetune.py experiment=demo_detection
    python docs/benchmarks/mask_rcnn.py runs/demo_detection            # trains the other, prints a row for each
    python docs/benchmarks/mask_rcnn.py runs/demo_detection --stop 350 # both as they are after 350 of their steps

Settings that the first command has got beside the experiment's are to be given to the second one too. torchvision's
model gets a pyramid of the same width, heads and samples of the same size, the same anchors, and the weights that the
backbone of the run started from. It trains in this process, in float32 (HTC++ in the precision of its run), in a plain
loop, on the same images in the same order, cut and pasted alike. Held-out images and what judges are the same too.
"""

import argparse
import json
import math
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from swinv2_scale import config, run
from swinv2_scale.models.detection.cascade import Detections
from swinv2_scale.models.detection.parts import BOX_SIDE, RATIOS, StageOutput
from swinv2_scale.optim import parameter_groups
from swinv2_scale.tasks.detection import Detection, as_results, merged_numbers, targets_of
from swinv2_scale.train import seeded

SHOWN = ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75")


class Backbone(nn.Module):
    """A Swin Transformer V2, a LayerNorm for each map, torchvision's pyramid: what it calls a backbone."""

    def __init__(self, encoder: Any, channels: int) -> None:
        super().__init__()
        self.encoder, self.out_channels = encoder, channels
        self.outputs = nn.ModuleList(StageOutput(width) for width in encoder.widths[:-1])
        self.neck = FeaturePyramidNetwork(encoder.widths, channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, Y, X) -> maps by name, (B, C, Y/s, X/s)."""
        *maps, last = self.encoder.forward_features(images)
        maps = [output(one) for output, one in zip(self.outputs, maps, strict=True)]
        maps.append(self.encoder.norm(last).permute(0, 3, 1, 2))
        return self.neck(OrderedDict((str(number), one) for number, one in enumerate(maps)))


class AsTheyAre(GeneralizedRCNNTransform):
    """Only pads: the stream's images are resized and normalised, and `as_results` pastes masks."""

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target

    def postprocess(self, result: list[dict[str, Tensor]], *_: Any) -> list[dict[str, Tensor]]:
        return result


def mask_rcnn(cfg: Any) -> MaskRCNN:
    """torchvision's model, as large as the configuration's detector, on the weights that the backbone starts from."""
    of = cfg.task.detector
    backbone = Backbone(config.instantiate(cfg.model, num_classes=0), of.channels)
    starting = run.starting_weights(cfg, backbone)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.startswith("encoder."):
                parameter.copy_(starting(name))
    classes = cfg.model.num_classes + 1  # the first is the background
    model = MaskRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(tuple((size,) for size in of.anchor_sizes), (RATIOS,) * 5),
        rpn_pre_nms_top_n_train=2 * of.proposals,
        rpn_post_nms_top_n_train=of.proposals,
        rpn_pre_nms_top_n_test=of.proposals,
        rpn_post_nms_top_n_test=of.proposals,
        box_head=TwoMLPHead(of.channels * BOX_SIDE**2, of.box_features),
        box_predictor=FastRCNNPredictor(of.box_features, classes),
        box_batch_size_per_image=of.samples,
        box_positive_fraction=of.positive_share,
        box_score_thresh=of.score_threshold,
        box_detections_per_img=of.detections,
        mask_head=MaskRCNNHeads(of.channels, [of.channels] * of.mask_convolutions, 1),
        mask_predictor=MaskRCNNPredictor(of.channels, of.channels, classes),
    )
    model.transform = AsTheyAre(0, 0, [], [])
    return model


def images_of(batch: dict[str, Any]) -> list[Tensor]:
    """The images of a batch, (3, Y, X) each, without what they were padded with."""
    return [image[:, :rows, :columns] for image, (rows, columns) in zip(batch["image"], batch["size"], strict=True)]


def train(cfg: Any, task: Detection, model: MaskRCNN, stop: int) -> None:
    """The first `stop` steps of the configuration, on one rank."""
    optim, data = cfg.optim, run.open_data(cfg)
    groups = parameter_groups(model, cfg.model.depths, weight_decay=optim.weight_decay, layer_decay=None)
    optimizer = torch.optim.AdamW(groups, betas=tuple(optim.betas), eps=optim.eps, fused=True)
    order = data.order(seed=cfg.seed, global_batch=cfg.global_batch)
    schedule = run.build_schedule(optim, cfg.global_batch, cfg.steps, order.steps_per_epoch)
    parts = cfg.global_batch // cfg.micro_batch
    model.train()
    for number, batch in enumerate(seeded(run.open_stream(cfg, task, data, order, 0, stop))):
        targets = [{**own, "labels": own["labels"] + 1} for own in targets_of(batch)]
        loss = sum(model(images_of(batch), targets).values())
        (loss / parts).backward()
        step, part = divmod(number, parts)
        if part == parts - 1:
            for group in optimizer.param_groups:
                group["lr"] = schedule(step)
            if optim.gradient_clip:
                nn.utils.clip_grad_norm_(model.parameters(), optim.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % cfg.log_every == 0:
                print(f"step {step + 1}/{cfg.steps}  loss {float(loss.detach()):.4f}", flush=True)


@torch.inference_mode()
def judged(cfg: Any, task: Detection, model: MaskRCNN) -> dict[str, float]:
    """COCO's numbers on the held-out images."""
    held_out = run.open_held_out(cfg, task)
    assert held_out is not None
    seen = {}
    for batch in held_out[0]:
        for own, size, record in zip(model.eval()(images_of(batch)), batch["size"], batch["record"], strict=True):
            found = Detections(own["boxes"], own["scores"], own["labels"] - 1, own["masks"])
            seen[record["image_id"]] = (record, as_results(found, size, record))
    return merged_numbers([seen], cfg.model.num_classes, masks=True)


def row(name: str, parameters: float, steps: int, minutes: float | None, numbers: dict[str, float]) -> str:
    """A line of the table."""
    cells = [name, f"{parameters / 1e6:.2f} M", str(steps), "-" if minutes is None else f"{minutes:.1f}"]
    return f"| {' | '.join([*cells, *(f'{100 * numbers[key]:.1f}' for key in SHOWN)])} |"


def main() -> None:
    """Train, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run of experiment=demo_detection")
    parser.add_argument("--stop", type=int, help="step of an evaluation of the run; the last one by default")
    arguments, overrides = parser.parse_known_args()
    record = [json.loads(line) for line in (arguments.run / "metrics.jsonl").read_text().splitlines()]
    start = next(line for line in record if line["event"] == "start")
    evaluations = {line["step"]: line for line in record if line["event"] == "evaluation"}
    stop = arguments.stop or max(evaluations)
    htc = evaluations[stop]
    cfg = config.compose("finetune", ["experiment=demo_detection", *overrides])
    if cfg.optim.encoder_scale != 1 or cfg.optim.layer_decay not in (None, 1):
        raise ValueError(
            "optim.encoder_scale and optim.layer_decay are not for torchvision's names: leave them 1 and null"
        )
    task = config.instantiate(cfg.task)
    torch.manual_seed(cfg.seed)
    model = mask_rcnn(cfg)
    begin = time.process_time()
    train(cfg, task, model, stop)
    minutes = (time.process_time() - begin) / 60
    parameters = sum(math.prod(parameter.shape) for parameter in model.parameters())
    print("| model | parameters | steps | CPU minutes of training | " + " | ".join(SHOWN) + " |")
    print("|---" * (4 + len(SHOWN)) + "|")
    print(row("torchvision's Mask R-CNN", parameters, stop, minutes, judged(cfg, task, model)))
    print(row("HTC++", start["parameters"], stop, None, htc))


if __name__ == "__main__":
    main()
