# A detector's whole config in mmdet's own Python: its backbone, neck and preprocessing are served.
_base_ = [
    "../_base_/models/faster-rcnn_r50_fpn.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/default_runtime.py",
]
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.02 * 2 / 16, momentum=0.9))
