"""The data layer: shards on disk, the order in which they are read, and what is done to each sample.

    manifest.py     what a directory of shards holds: names, sizes, hashes, and where each sample begins
    shards.py       reading one sample, checking all of them
    folder.py       plain folders of pictures, and what a sample is before it is packed
    layouts.py      what can be packed: image folders, tables, COCO, ADE20K, Kinetics
    pack.py         the samples of a source into shards with a manifest
    writer.py       shards written by several processes, and kept when they are interrupted
    idx.py          manifests for shards that somebody else packed
    stream.py       the order of samples as a pure function, and the loader that follows it
    transforms.py   one sample -> one training example; samples -> a batch
    segmentation.py the same for images with the class of each pixel
    coco.py         COCO's annotations, results and evaluation
    boxes.py        images with objects: joint transforms, pasting, batches
    videos.py       encoded videos, of which single frames are decoded
    clips.py        videos -> clips: which frames, and what is done to all of them alike
    demo.py         real images that ship inside scikit-image and scikit-learn
    scenes.py       photographs with digits on them, for segmentation and detection
    motions.py      photographs and digits in motion, for videos

Nothing here knows of models, engines or configuration files.
"""
