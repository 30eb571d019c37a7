"""On the path of vLLM's processes: torchvision next to a build of torch that it was not built for.

Its operators do not load then, and it does not even import without the name of this one. No model here uses any.
"""

import importlib.util

if importlib.util.find_spec("torch") and importlib.util.find_spec("torchvision"):
    import torch

    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
