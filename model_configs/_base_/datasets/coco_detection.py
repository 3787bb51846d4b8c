# COCO at a short side of 800 pixels. A client's images keep their own size instead.
dataset_type = "CocoDataset"
backend_args = None
test_pipeline = [
    dict(type="LoadImageFromFile", backend_args=backend_args),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(type="PackDetInputs"),
]
test_dataloader = dict(
    batch_size=1, dataset=dict(type=dataset_type, data_root="data/coco/", pipeline=test_pipeline)
)
