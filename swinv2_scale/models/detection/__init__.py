"""Object detection and instance segmentation: Cascade Mask R-CNN and HTC++ on torchvision's parts.

    cascade.py     the detector: backbone, pyramid, proposals, stages; its losses and its detections
    parts.py       what it has beside the backbone
    heads.py       box, mask and semantic heads
    matching.py    which box is which object: assignment, crowd regions, refinement from stage to stage
    suppression.py soft-NMS
    views.py       an image at several scales and mirrored, and boxes from one view to another

Boxes are float (N, 4): x1, y1, x2, y2 in pixels of the image that they belong to.
"""
