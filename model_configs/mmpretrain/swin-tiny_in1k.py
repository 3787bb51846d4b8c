# A classifier's whole config in mmpretrain's own Python: the test pipeline's resize and crop are done, too.
_base_ = ["../_base_/datasets/imagenet_bicubic_224.py"]
default_scope = "mmpretrain"

model = dict(
    type="ImageClassifier",
    backbone=dict(type="SwinTransformer", arch="tiny", img_size=224, drop_path_rate=0.2),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=1000, in_channels=768),
)
# Only training reads this, and it is no data: it is left alone.
lr_scale = (lambda batch_size: batch_size / 512)(1024)
