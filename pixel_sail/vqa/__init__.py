"""General visual questions (MME, MMBench, SEED-Bench, MMStar), asked and scored by an outside evaluation kit.

The kit, lmms-eval, is an optional extra. Everything but `lmms_eval_model.py`, `lmms_eval_plugin.py` and `__main__.py`
works without it. `docs/vqa.md` has the commands.
"""
