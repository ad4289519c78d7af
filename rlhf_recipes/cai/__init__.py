"""Constitutional AI: replies critiqued, revised and judged against written principles (recipes/cai.py).

`constitution` (the principles), `prompt_templates` (how things are put to a model), `backend` with `local` and
`server` (what answers), `served` (what endpoints serve), `flight` (requests on their way), `judge` (soft labels and
their worth), `gate` (before the spend), `make_pairs` (prompts to records), `overlap` (many prompts at one time),
`filters` (what is unfit), `dataset` (records to parquet), `report` (card, picture, summary).
"""
