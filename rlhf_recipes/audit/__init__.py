"""Audit of preference data and a reward model: what the signal captured, and where it cannot be trusted.

`steps` scores what every part asks for (`scoring`, `answers`) and hands rows and numbers to the parts, which load no
model: preference, calibration, uncertainty, stress, probes, overoptimisation, coverage, disagreement (`judgements`),
consistency (`cycles`) and credit. Each returns a `section`; `verdict` holds their figures against `gates`; `page` and
`report` write them.
"""
