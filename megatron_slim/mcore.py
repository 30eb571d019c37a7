"""Importing this module makes the process able to run Megatron-Core, with or without a GPU.

Every module that imports Megatron imports this one first, so the order in which a caller imports ours never matters.
Only Megatron itself must not have been imported before, on a machine without CUDA. Nothing else calls `compat.install`.
"""

import logging
import sys
import warnings

from megatron_slim.compat.install import install

# What Megatron and torch announce at import, such as the libraries that are missing, is the doctor's to report.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
with warnings.catch_warnings():
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    install()
warnings.filterwarnings("ignore", message="full scope is deprecated", module=r"megatron\.")  # of its own default
