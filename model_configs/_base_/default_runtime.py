# What a training run needs beside the model; nothing of it is served but the scope of types.
default_scope = "mmdet"
custom_imports = dict(imports=["my_project.hooks"], allow_failed_imports=True)
default_hooks = dict(timer=dict(type="IterTimerHook"), checkpoint=dict(type="CheckpointHook", interval=1))
env_cfg = dict(cudnn_benchmark=False, dist_cfg=dict(backend="nccl"))
load_from = None
resume = False
