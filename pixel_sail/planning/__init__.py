"""Estimates the cost of a run before it starts: `workload` (content of a step), `parameters`, `flops`, `activations`,
`memory`, `disk`, and `plan`, which combines them for `tools/plan_run.py`. `checks` evaluates the measurements of
`tools/doctor.py`. All are pure functions."""
