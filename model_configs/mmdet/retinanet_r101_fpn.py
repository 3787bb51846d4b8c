# RetinaNet with ResNet-101: the pyramid begins at the second level and has its extra levels from the input.
_base_ = "faster-rcnn_r50_fpn.py"

model = dict(
    _delete_=True,
    type="RetinaNet",
    data_preprocessor={{_base_.model.data_preprocessor}},
    backbone=dict(**_base_.model.backbone),
    neck=dict(**_base_.model.neck),
    bbox_head=dict(type="RetinaHead", num_classes=80, in_channels=_base_.model.neck.out_channels),
)
model["backbone"].update(depth=101)
model["neck"].update(dict(start_level=1, add_extra_convs="on_input"))
