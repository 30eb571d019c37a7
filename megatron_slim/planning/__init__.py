"""Which parallel layouts fit on so many GPUs, and how fast they should be; no torch but in ``build``.

- `sources`, `layouts`, `search`: models of a run, candidates, which fit
- `parameters`, `activations`, `memory`: what a rank holds
- `schedule`, `speed`, `hardware`: 1F1B, the time of a step, what is assumed of a GPU
- `preparation`: calibration and conversion before it
- `build`, `buffers`: the modules of every distinct rank on the meta device, and their buffers, to compare
- `flags`, `report`: flags to paste, tables and JSON
"""
