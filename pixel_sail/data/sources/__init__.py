"""One module per dataset family, each with a keyword-only `load` that a config names as `_target_`.

`load` returns a `Source` (training) or a list of `Expression` (evaluation). Example:
`pixel_sail.data.sources.refer.load(root="data/ref_seg", dataset="refcoco", split="train")`.
"""
