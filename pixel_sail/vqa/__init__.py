"""Visual question answering benchmarks (MME, MMBench, SEED-Bench, MMStar), run and scored by lmms-eval.

lmms-eval is an optional extra. Only `lmms_eval_model.py`, `lmms_eval_plugin.py` and `__main__.py` need it.
`docs/vqa.md` has the commands.
"""
