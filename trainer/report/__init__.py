"""Reports: what a run, or a comparison of many, has measured, as one page with figures."""
