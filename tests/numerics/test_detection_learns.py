"""HTC++ learns two images by heart, and finds in them what COCO's evaluation asks for."""

import torch
from tiny_detector import batch, detector

from swinv2_scale.data import coco
from swinv2_scale.tasks.detection import as_results

STEPS = 55


def test_two_images_are_learnt_by_heart():
    model = detector(seed=1, channels=16, proposals=20, samples=12).train()
    images, sizes, targets = batch()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 5, (STEPS - step) / 25)
        optimizer.zero_grad()
        losses = model(images, sizes, targets)
        losses.pop("rpn_box_reg")  # proposals stay near the anchors: finding the boxes is left to the stages
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    records, results = [], []
    for number, (found, target) in enumerate(zip(model.eval().detect(images, sizes), targets, strict=True)):
        annotations = [
            {"id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "label": label, "category_id": label, "iscrowd": 0}
            | {"segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]]}
            for (x1, y1, x2, y2), label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)
        ]
        record = {"image_id": number, "file_name": "", "width": 64, "height": 64, "annotations": annotations}
        records.append(record)
        results += as_results(found, (64, 64), record)
    numbers = coco.evaluate(records, results, range(3), kinds=["box", "mask"])
    assert numbers["box_ap"] > 0.6 and numbers["mask_ap"] > 0.6, numbers
    assert numbers["box_ap50"] > 0.9 and numbers["mask_ap50"] > 0.9, numbers
