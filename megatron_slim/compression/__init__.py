"""A compression from a recipe to a finished model, and its report.

- `report`: writes the report: a page, its numbers as JSON, and the model card
- `report_inputs`: what lies in the directory of a run, read and checked
- `report_facts`, `report_curves`: the numbers of the report; losses of all phases over tokens
- `report_tables`, `report_page`: its tables, the page
- `card`, `card_source`: the model card; what the teacher's own card and licence say
"""
