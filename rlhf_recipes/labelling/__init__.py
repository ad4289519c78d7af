"""People label: two replies side by side on a page of this machine (recipes/label.py).

`pairs` (what is labelled), `answers` (prompts that the policy answers first), `plan` (who is shown what, where),
`choices` (what was chosen, on disk), `written` (what others read of it), `agreement` (what the labels are worth),
`guard` (who may ask), `app` (the page), `server` (the address), `labels` (from start to end).
"""
