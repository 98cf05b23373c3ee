"""What a run will cost, computed before it starts: `workload` (what a step holds), `parameters`, `flops`,
`activations`, `memory`, `disk`, and `plan`, which joins them; `tools/plan_run.py` prints it. `checks` judges what
`tools/doctor.py` finds on a machine. Pure functions all of them."""
