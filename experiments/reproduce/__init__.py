"""The claims of both papers, tried on the embedded world, where the true reward of every response is known.

    python -m experiments.reproduce                   all claims, 4 seeds; what is finished is not run again
    python -m experiments.reproduce O6 S3             these alone, and the runs that they need
    python -m experiments.reproduce --quick           a tenth of the steps, one seed: does all of it work?
    python -m experiments.reproduce hh --data=FILES   Sr-DPO and Sr-IPO on HH-RLHF, a small model from scratch

A run is an ordinary training (runs.py), a measurement of it is arrays over prompts and pairs (measure.py),
and a claim is a few comparisons of those, with the difference that would matter beside each (claims.py).
jobs.py carries them out.
"""
