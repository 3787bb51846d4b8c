# YOLOv5-s as mmyolo writes it: widths and depths are variables.
default_scope = "mmyolo"
deepen_factor = 0.33
widen_factor = 0.5
img_scale = (640, 640)
last_stage_out_channels = 1024
norm_cfg = dict(type="BN", momentum=0.03, eps=0.001)
channels = [256, 512, last_stage_out_channels]

model = dict(
    type="YOLODetector",
    data_preprocessor=dict(
        type="mmdet.DetDataPreprocessor", mean=[0.0, 0.0, 0.0], std=[255.0, 255.0, 255.0], bgr_to_rgb=True
    ),
    backbone=dict(
        type="YOLOv5CSPDarknet",
        deepen_factor=deepen_factor,
        widen_factor=widen_factor,
        norm_cfg=norm_cfg,
        act_cfg=dict(type="SiLU", inplace=True),
    ),
    neck=dict(
        type="YOLOv5PAFPN",
        deepen_factor=deepen_factor,
        widen_factor=widen_factor,
        in_channels=channels,
        out_channels=channels,
        num_csp_blocks=3,
        norm_cfg=norm_cfg,
        act_cfg=dict(type="SiLU", inplace=True),
    ),
    bbox_head=dict(type="YOLOv5Head", head_module=dict(in_channels=channels, num_classes=80)),
)
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="YOLOv5KeepRatioResize", scale=img_scale),
    dict(type="LetterResize", scale=img_scale, allow_scale_up=False, pad_val=dict(img=114)),
]
