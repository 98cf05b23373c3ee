"""The data check: every damage of every configured dataset found and named, none hidden by the first.

`evaluation/data_check.py` calls `refer_files.py` for the annotation files of REFER datasets, which are read as they lie
on disk because their loader stops at the first error, and `items.py` for the items of any source. Both add to the same
`Findings`; `report.py` turns them into text and JSON. For example

    trouble   duplicate ref_id   refs(unc).p: record 7   found ref_id 3 again (first in record 2), expected ...
"""
