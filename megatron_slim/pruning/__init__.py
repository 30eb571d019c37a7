"""Measuring, deciding and cutting.

- `calibrate`: a pass with one block in memory
- `parallel`: the same pass inside Megatron, over many processes
- `recorder`, `importance`, `statistics`: sums, their definitions, the file
- `carried_statistics`: statistics through a plan, instead of a new calibration
- `plan`, `depth`, `experts`, `inner_axes`: the decision: widths, layers, experts, neurons and heads
- `elastic`, `elastic_plans`, `elastic_slices`: several sizes in one checkpoint
- `nesting`, `within`: each within the one before, checked and planned
- `between`, `sorting`, `order_reader`: mixtures of two of them, and an order that has the smaller ones first
- `target`, `recipe_checks`: the sizes that a recipe asks for, and what cannot be met
- `allocation`, `sensitivity`: experts allocated to layers, and what each layer loses
- `search`, `search_grid`, `shares`, `candidates`: sizes that meet a budget, their scores, and what the best ones lose
- `plan_reader`: reading a decision back
- `apply`, `selection`, `align`: pruned tensors, what survives of each, neurons matched before a merge
- `pipeline`, `report`: the whole, before and after
- `plan_view`, `plan_tables`, `plan_plots`, `plan_page`: a plan as numbers, tables, pictures and a page

Planning is a pure function of recipe, statistics and shape; applying is one of plan and tensors.
"""
