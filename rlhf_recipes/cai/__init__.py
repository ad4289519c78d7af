"""Constitutional AI: replies critiqued, revised and judged against written principles (recipes/cai.py).

`constitution` (the principles), `layout` (how things are put to a model), `backend` with `local` and `server` (what
answers), `judge` (soft labels and their worth), `gate` (before the spend), `steps` (prompts to records), `filters`
(what is unfit), `dataset` (records to parquet), `report` (card, picture, summary).
"""
