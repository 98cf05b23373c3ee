"""The data check: finds and reports every defect of every configured dataset, not only the first.

`evaluation/data_check.py` calls `refer_files.py` for the annotation files of REFER datasets, read directly because
their loader stops at the first error, and `items.py` for the items of any source. Both add to the same `Findings`;
`report.py` formats them as text and JSON. For example

    trouble   duplicate ref_id   refs(unc).p: record 7   found ref_id 3 again (first in record 2), expected ...
"""
