"""Measuring, deciding and cutting.

- `calibrate`, `streaming`, `block`, `hidden_states`, `work_dir`: a pass with one block in memory, resumed after a
  kill
- `parallel`: the same pass inside Megatron, over many processes
- `recorder`, `importance`, `statistics`, `samples`: sums, their definitions, the file, the data
- `carried_statistics`: statistics through a plan, instead of a new calibration
- `plan`, `depth`, `experts`, `inner_axes`: the decision: widths, layers, experts, neurons and heads
- `search`: sizes that meet a budget
- `plan_reader`, `fingerprint`: reading a decision back, and which checkpoint it is for
- `apply`, `align`, `pipeline`, `report`: pruned tensors, neurons matched before a merge, the whole, before and after
- `plan_view`, `plan_tables`, `plan_plots`, `plan_page`: a plan as numbers, tables, pictures and a page

Planning is a pure function of recipe, statistics and shape; applying is one of plan and tensors.
"""
